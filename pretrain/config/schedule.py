"""The learning rate, a pure function of the step number."""

import math

from pretrain.config.recipe import Recipe, ScheduleRecipe


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleRecipe) -> float:
    """The rate of step 0, 1, ... total_steps - 1: a pure function of the step.

    Linear warm-up to the peak; then a cosine or a line to `final_fraction` of it at the last step,
    or the peak until the last `decay` steps, which go down in a line (wsd), or the peak to the end
    (constant).
    """
    warmup = schedule.warmup(total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    decay = total_steps - warmup
    if schedule.kind == "wsd":
        decay = schedule.decay(total_steps)
    if schedule.kind == "constant" or decay == 0:
        return peak
    stable_until = total_steps - decay
    if step < stable_until:
        return peak
    progress = (step - stable_until + 1) / decay
    if schedule.kind == "cosine":
        above_final = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        above_final = 1.0 - progress
    final = schedule.final_fraction
    return peak * (final + (1.0 - final) * above_final)


def rate_of(recipe: Recipe, step: int) -> float:
    """The learning rate that a recipe gives a step."""
    peak = recipe.optimizer.peak_learning_rate
    return learning_rate(step, recipe.total_steps, peak, recipe.schedule)

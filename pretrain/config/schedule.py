"""The learning rate, a pure function of the step number."""

import math

from pretrain.config.recipe import ScheduleRecipe


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleRecipe) -> float:
    """The rate of step 0, 1, ... total_steps - 1: a pure function of the step.

    Linear warm-up to the peak; then a cosine or a line to `final_fraction` of it at the last step,
    or the peak until the last `decay` steps, which go down in a line (wsd), or the peak to the end
    (constant).
    """
    warmup = schedule.warmup(total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    decay = {"wsd": schedule.decay(total_steps), "constant": 0}.get(
        schedule.kind, total_steps - warmup
    )
    progress = (step - (total_steps - decay) + 1) / decay if decay else 0.0
    if progress <= 0.0:
        return peak
    above_final = (
        0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1.0 - progress
    )
    return peak * (schedule.final_fraction + (1.0 - schedule.final_fraction) * above_final)

"""The optimizer and the learning rate: AdamW with decay on matrices only, and a rate set from
the step number.
"""

import math

import torch
from torch import nn

from pretrain.config.recipe import OptimizerRecipe, ScheduleRecipe


def build_optimizer(model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.AdamW:
    """Fused AdamW over two groups: matrices, which decay, and vectors (biases, LayerNorm), which
    don't.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(
        groups, lr=recipe.peak_learning_rate, betas=betas, eps=recipe.eps, fused=True
    )


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

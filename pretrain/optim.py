"""The optimizer and the learning rate: AdamW with decay on matrices only, and a rate set from the step number."""

import math

import torch
from torch import nn

from pretrain.config import OptimizerRecipe, ScheduleRecipe


def build_optimizer(model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.AdamW:
    """Fused AdamW over two groups: matrices, which decay, and vectors (biases, LayerNorm), which don't."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(groups, lr=recipe.peak_learning_rate, betas=betas, eps=recipe.eps, fused=True)


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleRecipe) -> float:
    """The rate of step 0, 1, ... total_steps - 1: linear warm-up to the peak, cosine to its final fraction."""
    warmup_steps = math.ceil(schedule.warmup_fraction * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps + 1) / (total_steps - warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (schedule.final_fraction + (1.0 - schedule.final_fraction) * cosine)

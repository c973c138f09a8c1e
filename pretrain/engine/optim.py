"""The optimizer: AdamW with decay on matrices only."""

import torch
from torch import nn

from pretrain.config.recipe import OptimizerRecipe


def build_optimizer(model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.AdamW:
    """Fused AdamW over two groups: matrices, which decay, and vectors, which don't.

    Vectors are biases and LayerNorm's.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        of_its_kind = matrices if parameter.ndim >= 2 else vectors
        of_its_kind.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=recipe.peak_learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        fused=True,
    )

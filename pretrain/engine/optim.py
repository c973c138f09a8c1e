"""The optimizer and the learning rate: AdamW with decay on matrices only, and a rate set from
the step number.
"""

import torch
from torch import nn

from pretrain.config.recipe import OptimizerRecipe


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

"""Activation checkpointing: which blocks forget their activations and compute them again in the backward pass.

none        keep everything
full        a recomputed block keeps only its input
selective   a recomputed block keeps its matrix products and attention, and recomputes what is cheap
            (LayerNorm, GELU, rotations, additions)
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts, noop_context_fn

from pretrain.modeling_tablefree import TableFreeForCausalLM

ATEN = torch.ops.aten
EXPENSIVE = frozenset(
    {
        ATEN.mm.default,
        ATEN.addmm.default,
        ATEN.bmm.default,
        ATEN._scaled_dot_product_flash_attention.default,
        ATEN._scaled_dot_product_efficient_attention.default,
        ATEN._scaled_dot_product_cudnn_attention.default,
        ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def keep_expensive(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save the results of matrix products and attention; recompute everything else."""
    return CheckpointPolicy.MUST_SAVE if operator in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpointing(model: TableFreeForCausalLM, mode: str, every_n_layers: int) -> None:
    """Recompute every n-th block in the given mode."""
    recomputed = range(0, len(model.layers), every_n_layers) if mode != "none" else ()
    model.recomputed_layers = frozenset(recomputed)
    selective = partial(create_selective_checkpoint_contexts, keep_expensive)
    model.recompute_context = selective if mode == "selective" else noop_context_fn

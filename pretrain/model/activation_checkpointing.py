"""Activation checkpointing: which blocks forget activations and compute them again, going back.

none        keep everything
full        a recomputed block keeps only its input
selective   a recomputed block keeps its matrix products and attention, and recomputes what is cheap
            (LayerNorm, GELU, rotations, additions)
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from pretrain.modeling_tablefree import Block, TableFreeForCausalLM

ATEN = torch.ops.aten
EXPENSIVE = frozenset(
    {
        ATEN.mm.default,
        ATEN.addmm.default,
        ATEN.bmm.default,
        torch.ops.higher_order.flex_attention,
        ATEN._scaled_dot_product_flash_attention.default,
        ATEN._scaled_dot_product_flash_attention_for_cpu.default,
        ATEN._scaled_dot_product_efficient_attention.default,
        ATEN._scaled_dot_product_cudnn_attention.default,
    }
)


def keep_expensive(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save the results of matrix products and attention; recompute everything else."""
    return (
        CheckpointPolicy.MUST_SAVE if operator in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE
    )


def run_keeping_input(block: Block, *inputs: Any) -> Tensor:
    """Run a block that keeps its input and recomputes everything."""
    hidden: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return hidden


def run_keeping_expensive(block: Block, *inputs: Any) -> Tensor:
    """Run a block that recomputes what is cheap."""
    contexts = partial(create_selective_checkpoint_contexts, keep_expensive)
    hidden: Tensor = checkpoint(
        block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return hidden


def apply_activation_checkpointing(
    model: TableFreeForCausalLM, mode: str, every_n_layers: int
) -> None:
    """Recompute every n-th block in the given mode."""
    if mode == "none":
        return
    run = run_keeping_expensive if mode == "selective" else run_keeping_input
    recomputed = range(0, len(model.model.layers), every_n_layers)
    model.model.block_runners = dict.fromkeys(recomputed, run)

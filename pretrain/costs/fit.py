"""Whether a run fits into a device's memory, and what would."""

from dataclasses import replace
from typing import Any

from data_prep.errors import UserError
from pretrain.config.recipe import Recipe
from pretrain.costs.memory import MODES, needed_bytes


def with_micro_batch(recipe: Recipe, micro_batch_size: int, mode: str) -> Recipe:
    """The recipe with another micro-batch and checkpointing mode."""
    checkpointing = replace(recipe.activation_checkpointing, mode=mode)  # type: ignore[type-var, arg-type]
    batch = replace(recipe.batch, micro_batch_size=micro_batch_size)  # type: ignore[type-var]
    return replace(recipe, batch=batch, activation_checkpointing=checkpointing)  # type: ignore[type-var]


def largest_micro_batch(
    recipe: Recipe,
    engine_config: dict[str, Any],
    world_size: int,
    device_type: str,
    available: float,
    mode: str,
) -> int | None:
    """The largest that divides the batch and fits in that mode; None: not even one window does."""
    for size in range(recipe.global_batch_size // world_size, 0, -1):
        if recipe.global_batch_size % (world_size * size) == 0:
            smaller = with_micro_batch(recipe, size, mode)
            if needed_bytes(smaller, engine_config, world_size, device_type) <= available:
                return size
    return None


def check_it_fits(
    recipe: Recipe,
    engine_config: dict[str, Any],
    world_size: int,
    available_bytes: float,
    device_type: str = "cuda",
) -> None:
    """Raise UserError where a rank needs more than it has, saying how much more, and what would
    fit.
    """
    needed = needed_bytes(recipe, engine_config, world_size, device_type)
    if needed <= available_bytes:
        return
    ways = []
    for mode in MODES[MODES.index(recipe.activation_checkpointing.mode) :]:
        size = largest_micro_batch(
            recipe, engine_config, world_size, device_type, available_bytes, mode
        )
        ways += (
            [f"batch.micro_batch_size {size} with activation_checkpointing.mode {mode}"]
            if size
            else []
        )
    fitting = (
        " or ".join(ways) or "nothing; take more ranks, an offloaded optimizer or a smaller model"
    )
    batch = (
        f"batch.micro_batch_size {recipe.batch.micro_batch_size} x {recipe.model.seq_len:,} tokens"
    )
    needs = (
        f"needs {needed / 1e9:.1f} GB on a {device_type} rank that has {available_bytes / 1e9:.1f}"
    )
    raise UserError(
        f"{batch} {needs}: {(needed - available_bytes) / 1e9:.1f} GB too much; what fits: {fitting}"
    )

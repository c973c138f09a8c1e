"""Whether a run fits into a device's memory, and what would. No torch."""

from dataclasses import replace
from typing import Any

from data_prep.errors import UserError
from pretrain.config.recipe import Recipe
from pretrain.costs.memory import MODES, Sizes, needed_bytes, sizes_of


def with_micro_batch(recipe: Recipe, micro_batch_size: int, mode: str) -> Recipe:
    """The recipe with another micro-batch and checkpointing mode."""
    checkpointing = replace(recipe.activation_checkpointing, mode=mode)  # type: ignore[arg-type]
    batch = replace(recipe.batch, micro_batch_size=micro_batch_size)
    return replace(recipe, batch=batch, activation_checkpointing=checkpointing)


def largest_micro_batch(sizes: Sizes, available_bytes: float, mode: str) -> int | None:
    """The largest that divides the batch and fits in that mode; None: not even one window does."""
    recipe = sizes.recipe
    for size in range(recipe.global_batch_size // sizes.ranks, 0, -1):
        if recipe.global_batch_size % (sizes.ranks * size) != 0:
            continue
        smaller = with_micro_batch(recipe, size, mode)
        needed = needed_bytes(smaller, sizes.engine_config, sizes.ranks, sizes.device_type)
        if needed <= available_bytes:
            return size
    return None


def check_it_fits(
    recipe: Recipe,
    engine_config: dict[str, Any],
    world_size: int,
    available_bytes: float,
    device_type: str = "cuda",
) -> None:
    """Raise UserError where a rank needs more than it has.

    It says how much more, and what would fit.
    """
    needed = needed_bytes(recipe, engine_config, world_size, device_type)
    if needed <= available_bytes:
        return
    sizes = sizes_of(recipe, engine_config, world_size, device_type)
    fitting = " or ".join(ways_to_fit(sizes, available_bytes))
    if not fitting:
        fitting = "nothing; take more ranks, an offloaded optimizer or a smaller model"
    missing = needed - available_bytes
    raise UserError(
        f"batch.micro_batch_size {recipe.batch.micro_batch_size} x {recipe.model.seq_len:,} tokens "
        f"needs {needed / 1e9:.1f} GB on a {device_type} rank that has "
        f"{available_bytes / 1e9:.1f}: {missing / 1e9:.1f} GB too much; what fits: {fitting}"
    )


def ways_to_fit(sizes: Sizes, available_bytes: float) -> list[str]:
    """The largest micro-batch of the recipe's checkpointing mode, and of those that keep less."""
    ways = []
    for mode in MODES[MODES.index(sizes.mode) :]:
        size = largest_micro_batch(sizes, available_bytes, mode)
        if size is not None:
            ways.append(f"batch.micro_batch_size {size} with activation_checkpointing.mode {mode}")
    return ways

"""Validation while training: always the same windows, from all over the split, shared by ranks."""

from collections.abc import Iterator

import numpy as np

from data_prep.shards import Tokens
from pretrain.config.recipe import Recipe
from pretrain.data.loader import ValidationWindows
from pretrain.distributed.agree import met_alone
from pretrain.distributed.world import World


def windows_to_validate(split: ValidationWindows, recipe: Recipe) -> int:
    """How many whole windows a validation takes, over all ranks."""
    wanted = recipe.validation.eval_tokens // recipe.model.seq_len
    return min(split.whole_windows, max(1, wanted))


def validation_batches(
    split: ValidationWindows, recipe: Recipe, world: World
) -> tuple[int, Iterator[Tokens]]:
    """How many batches this rank takes of a validation, and their ids.

    A batch has shape (windows, seq_len + 1).
    """
    windows = windows_to_validate(split, recipe)
    if windows == 0:
        return 1, whole_split(split, world)
    spread = np.arange(windows) * split.whole_windows // windows  # over all sources
    mine = spread[world.rank :: world.world_size]
    at_once = recipe.batch.micro_batch_size
    groups = [mine[start : start + at_once] for start in range(0, len(mine), at_once)]

    def read() -> Iterator[Tokens]:
        with met_alone():
            for group in groups:
                yield split.windows(group)

    return max(1, len(groups)), read()


def whole_split(split: ValidationWindows, world: World) -> Iterator[Tokens]:
    """The one window of a split that is shorter than a whole one; rank 0 takes it."""
    if world.is_main:
        with met_alone():
            yield split.window(0)[None]

"""Validation while training: always the same windows, spread over the whole split, shared by the
ranks.
"""

from collections.abc import Iterator

import numpy as np

from data_prep.shards import Tokens
from pretrain.config.recipe import Recipe
from pretrain.data.loader import ValidationWindows
from pretrain.distributed.agree import met_alone
from pretrain.distributed.world import World


def windows_to_validate(split: ValidationWindows, recipe: Recipe) -> int:
    """How many whole windows a validation takes, over all ranks."""
    return min(split.whole_windows, max(1, recipe.validation.eval_tokens // recipe.model.seq_len))


def validation_batches(
    split: ValidationWindows, recipe: Recipe, world: World
) -> tuple[int, Iterator[Tokens]]:
    """How many batches this rank takes of a validation, and their ids, (windows, seq_len + 1)
    each.
    """
    windows, at_once = windows_to_validate(split, recipe), recipe.batch.micro_batch_size
    spread = np.arange(windows) * split.whole_windows // max(1, windows)  # over all sources
    mine = spread[world.rank :: world.world_size]
    groups = [mine[start : start + at_once] for start in range(0, len(mine), at_once)]

    def read() -> Iterator[Tokens]:
        with met_alone():
            if windows == 0 and world.is_main:  # the whole split is shorter than one window
                yield split.window(0)[None]
            for group in groups:
                yield split.windows(group)

    return max(1, len(groups)), read()

"""Batches: which windows a rank takes of every step and of a validation, made while others train.

They are a function of the step and the rank alone. So a rank takes up any step of a run anywhere,
and whichever way the ranks are cut, a step's rows are the same.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from data_prep.shards import Tokens
from pretrain.config.recipe import Recipe
from pretrain.data.loader import TrainingLoader, ValidationWindows
from pretrain.distributed.agree import met_alone
from pretrain.distributed.world import World

T = TypeVar("T")


def widened(ids: Tokens, *, pinned: bool) -> Tensor:
    """Ids as int64; `pinned`: in memory from which a GPU copies without the host's waiting.

    All ids up to 65,535 are ordinary, and torch has no arithmetic for uint16: so it never sees it.
    """
    wide = torch.from_numpy(ids.astype("int64"))
    return wide.pin_memory() if pinned else wide


def rows_of(micro_step: int, micro_batch_size: int, world: World) -> slice:
    """Which rows of the global batch this rank takes in a micro-step: rank after rank."""
    start = (micro_step * world.world_size + world.rank) * micro_batch_size
    return slice(start, start + micro_batch_size)


class StepBatches:
    """This rank's micro-batches of every step.

    `samples_before` are those that the run drew from other data sets: the loader begins behind
    them, with its own sample 0.
    """

    def __init__(
        self,
        loader: TrainingLoader,
        recipe: Recipe,
        world: World,
        *,
        pinned: bool,
        samples_before: int = 0,
    ) -> None:
        self.loader = loader
        self.samples_before = samples_before
        self.rows = recipe.global_batch_size  # of a step, over all ranks
        self.micro_batch_size = recipe.batch.micro_batch_size
        self.world = world
        self.pinned = pinned
        self.micro_steps = self.rows // (self.micro_batch_size * world.world_size)

    def samples_of(self, step: int) -> range:
        """The loader's numbers of a step's samples, those of all ranks, in the run's order."""
        first = step * self.rows - self.samples_before
        return range(first, first + self.rows)

    def of_step(self, step: int) -> list[Tensor]:
        """A tensor for each micro-step, int64, (micro_batch_size, seq_len + 1).

        Raises what reading raises, as met by this rank alone.
        """
        numbers = np.array(self.samples_of(step))
        batches = []
        with met_alone():
            for micro_step in range(self.micro_steps):
                own = numbers[rows_of(micro_step, self.micro_batch_size, self.world)]
                batches.append(widened(self.loader.samples(own), pinned=self.pinned))
        return batches


class Prefetch(Generic[T]):
    """Makes the batches of the next step in a thread while this one trains."""

    def __init__(self, make: Callable[[int], T], stop_at_step: int) -> None:
        self.make = make
        self.stop_at_step = stop_at_step
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[T]] | None = None  # the step, and its batches

    def take(self, step: int) -> T:
        """What `make(step)` gives; begins with the next step's."""
        if self._ahead and self._ahead[0] == step:
            ready = self._ahead[1].result()
        else:
            ready = self.make(step)
        if step + 1 < self.stop_at_step:
            self._ahead = (step + 1, self._thread.submit(self.make, step + 1))
        return ready

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


def windows_to_validate(split: ValidationWindows, recipe: Recipe) -> int:
    """How many whole windows a validation takes, over all ranks."""
    asked = max(1, recipe.validation.eval_tokens // recipe.model.seq_len)
    return min(split.whole_windows, asked)


def validation_batches(
    split: ValidationWindows, recipe: Recipe, world: World
) -> tuple[int, Iterator[Tokens]]:
    """How many batches this rank takes of a validation, and their ids, (windows, seq_len + 1)
    each: always the same windows, spread over the whole split.
    """
    windows = windows_to_validate(split, recipe)
    if windows == 0:
        return 1, whole_split(split, world)
    at_once = recipe.batch.micro_batch_size
    spread = np.arange(windows) * split.whole_windows // windows  # over all sources
    mine = spread[world.rank :: world.world_size]
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

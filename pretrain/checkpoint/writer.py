"""Saving off the critical path: a copy of the rank's state in host memory, written by a thread
while training goes on.

The ranks' threads meet in a process group of their own, so that they never mix with the exchanges
of training. What they write, and how, is in pretrain/checkpoint/saving.py.
"""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.checkpoint.layout import (
    checkpoints_dir,
    naming_the_disk,
    saved_steps,
    step_name,
    step_of,
)
from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.checkpoint.patience import patiently
from pretrain.checkpoint.reader import Fragment
from pretrain.checkpoint.retention import prune
from pretrain.checkpoint.saving import Callback, Savers, save_checkpoint
from pretrain.config.recipe import CheckpointsRecipe
from pretrain.distributed.agree import together
from pretrain.distributed.world import World


@dataclass(frozen=True, kw_only=True)
class AroundSaves:
    """What others do around a save; all of it is called in the thread that writes."""

    before: Callback = None  # on rank 0: make durable what a checkpoint counts on
    # On rank 0: note that a checkpoint after so many steps is there.
    saved: Callable[[int], None] | None = None
    wrote_block: Callback = None  # on every rank, as writing moves on
    failed: Callback = None  # on every rank
    # On rank 0: names of checkpoints that something reads, so that they are not dropped yet.
    in_use: Callable[[], Collection[str]] = frozenset


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that is there."""

    step: int  # so many steps are in it
    at: float  # in seconds since the epoch


class CheckpointWriter:
    """Saves a run's checkpoints, one at a time; made and used by all ranks alike.

    Where a save fails, every rank's next `save` or `wait` raises the error. The memory it takes is
    that of this rank's fragments, once.
    """

    def __init__(
        self, run_dir: Path, recipe: CheckpointsRecipe, world: World, around: AroundSaves
    ) -> None:
        self.run_dir = run_dir
        self.recipe = recipe
        self.around = around
        group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.newest: Saved | None = None  # on rank 0: the last that this start saved, or began with
        self._savers = Savers(world=world, group=group, on_block=around.wrote_block)
        self._memory = torch.empty(0)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._passed_over: set[str] = set()
        self._counted_from: Path | None = None  # the checkpoint that the last ones were dropped for

    def pass_over_newer(self, step: int) -> list[str]:
        """Leave the checkpoints after a step, which was gone on from because they are damaged, out
        of the retention.

        Returns the names of those that were not left out before. No save may be under way.
        """
        names = [
            path.name
            for path in patiently(lambda: saved_steps(self.run_dir))
            if (step_of(path.name) or 0) > step
        ]
        new = [name for name in names if name not in self._passed_over]
        self._passed_over.update(new)
        return new

    def begin_with(self, step: int) -> None:
        """Note the checkpoint that a start goes on from, if it is not the first one."""
        if step > 0:
            path = checkpoints_dir(self.run_dir) / step_name(step)
            self.newest = Saved(step=step, at=path.stat().st_mtime)

    def save(
        self, fragments: Sequence[Fragment], manifest: CheckpointManifest, *, prunes: bool = True
    ) -> None:
        """Have the state after `manifest.step` steps written as it is now, and the oldest
        checkpoints dropped, if it `prunes`.

        Waits for the save before, and raises its error.
        """
        self.wait()
        work = (self._copy(fragments), manifest, prunes)
        name = f"save of step {manifest.step}"
        self._thread = threading.Thread(target=self._write, args=work, name=name)
        self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint is there; raises UserError on all ranks if it could not be
        written.
        """
        if self._thread:
            self._thread.join()
        error = self._error
        self._thread = None
        self._error = None
        if error:
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif self._thread:
            # What ended the run is to be told; the checkpoint under way is to be whole all the
            # same.
            self._thread.join()

    def _copy(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """The fragments in host memory of their own, in the order in which they are written."""
        sizes = [values.numel() for fragment in fragments for values in fragment.states.values()]
        if sum(sizes) != len(self._memory):
            self._memory = host_memory(sum(sizes))
        places = iter(self._memory.split(sizes))
        copies = []
        # Into the same memory at every save, which is registered with the GPU once (host_memory).
        for fragment in fragments:
            states = {key: next(places).copy_(values) for key, values in fragment.states.items()}
            copies.append(replace(fragment, states=states))
        return copies

    def _write(
        self, fragments: Sequence[Fragment], manifest: CheckpointManifest, prunes: bool
    ) -> None:
        """Body of the thread."""
        try:
            together(self._begin, self._savers.group)
            saved = save_checkpoint(self.run_dir, fragments, manifest, self._savers)
            together(lambda: self._conclude(saved, manifest.step, prunes), self._savers.group)
        except Exception as error:
            self._error = error
            if self.around.failed:
                self.around.failed()

    def _begin(self) -> None:
        if self._savers.world.is_main and self.around.before:
            self.around.before()

    def _conclude(self, saved: Path, step: int, prunes: bool) -> None:
        """Note what is saved, then drop the oldest checkpoints."""
        if not self._savers.world.is_main:
            return
        with naming_the_disk(self.run_dir):
            if self.around.saved:
                self.around.saved(step)
        self.newest = Saved(step=step, at=time.time())
        self._passed_over.discard(saved.name)  # a good one has taken its place
        if prunes:
            self._counted_from = saved
            self.prune_again()

    def prune_again(self) -> None:
        """Drop what was in use when the oldest checkpoints were dropped, and is no more.

        No save may be under way.
        """
        if self._counted_from:
            recipe = self.recipe
            in_use = self.around.in_use()
            prune(
                self._counted_from,
                recipe.keep_last,
                recipe.keep_every,
                self._passed_over,
                in_use,
            )


def host_memory(elements: int) -> Tensor:
    """So many fp32 in host memory, from which and to which a GPU copies at full speed.

    Registered, not `pin_memory()`, whose allocator rounds up to a power of two: up to twice as
    much.
    """
    memory = torch.empty(elements)
    if torch.cuda.is_available():
        torch.cuda.check_error(
            torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        )
    return memory

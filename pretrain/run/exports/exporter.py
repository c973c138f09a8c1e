"""Exports made while a run trains (`checkpoints.export_every_steps`), off its critical path.

A process of low priority reads a checkpoint that is on the disk, as anybody could, and writes
`exports/step-N` beside it: no rank holds memory, a lock or a GPU for it. Rank 0 starts one at a
time, from a thread. It ends with its run, however that ends; what a kill or a signal leaves unmade,
the next start makes up for. An export that fails is a warning, and no step waits for one.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from data_prep.errors import os_error_line
from pretrain.checkpoint.layout import step_name
from pretrain.config.recipe import CheckpointsRecipe
from pretrain.distributed.agree import gather, inform, say
from pretrain.distributed.world import World
from pretrain.run.exports.places import (
    clear_leftovers,
    export_place,
    exports_dir,
    is_due,
    prune_exports,
    steps_without_export,
)
from pretrain.run.exports.process import ExportProcess

POLL_S = 0.5  # between two looks at whether the last export is made


class Exporter:
    """What a run exports; made by all ranks alike, at work on rank 0."""

    def __init__(
        self, run_dir: Path, recipe: CheckpointsRecipe, total_steps: int, world: World
    ) -> None:
        self.run_dir = run_dir
        self.recipe = recipe
        self.total_steps = total_steps
        self.world = world
        self._lock = threading.Lock()
        self._at_work: int | None = None  # the step whose export is being made
        self._waiting: list[int] = []  # steps whose export follows
        self._process: ExportProcess | None = None
        self._is_ending = False

    @property
    def left(self) -> list[int]:
        """The steps whose exports are not made yet, the one at work first."""
        with self._lock:
            at_work = [] if self._at_work is None else [self._at_work]
            return [*at_work, *self._waiting]

    def in_use(self) -> frozenset[str]:
        """Names of the checkpoints that exports are to be made of."""
        return frozenset(map(step_name, self.left))

    # What is to be exported

    def make_up(self, steps_done: int) -> None:
        """Have the exports made that a start before this one did not come to."""
        if not self.world.is_main or self.recipe.export_every_steps is None:
            return
        try:
            clear_leftovers(self.run_dir)
            missing = steps_without_export(self.run_dir, self.recipe, steps_done, self.total_steps)
        except OSError as error:
            say(self.world, f"warning: {exports_dir(self.run_dir)}: {os_error_line(error)}")
            return
        for step in missing:
            self._add(step)

    def saved(self, step: int) -> None:
        """Have the checkpoint after so many steps exported, if it is due.

        Where exports take longer than the steps between them, one waits: of those that would wait
        with it, whose checkpoints would pile up, only the newest is made.
        """
        if not is_due(step, self.recipe, self.total_steps):
            return
        with self._lock:
            passed_over = list(self._waiting)
            self._waiting.clear()
        for other in passed_over:
            say(
                self.world,
                f"warning: {export_place(self.run_dir, other)}: not made, since step {step} is due "
                "and the export before it still goes on; raise checkpoints.export_every_steps",
            )
        self._add(step)

    def _add(self, step: int) -> None:
        with self._lock:
            if self._is_ending:
                return
            self._waiting.append(step)
            if self._at_work is None:
                self._at_work = self._waiting.pop(0)
                threading.Thread(target=self._run, name="exports", daemon=True).start()

    # In the thread

    def _run(self) -> None:
        """Body of the thread: export what is waiting, until nothing is."""
        try:
            while self._at_work is not None:
                self._export(self._at_work)
                with self._lock:
                    goes_on = self._waiting and not self._is_ending
                    self._at_work = self._waiting.pop(0) if goes_on else None
        finally:
            self._at_work = None

    def _export(self, step: int) -> None:
        """Make one export, or say why there is none."""
        output = export_place(self.run_dir, step)
        began = time.monotonic()
        try:
            output.parent.mkdir(exist_ok=True)
            with self._lock:
                if self._is_ending:
                    return
                self._process = ExportProcess(self.run_dir, step, output, self.recipe)
            problem = self._process.why_it_failed()
        except OSError as error:
            problem = os_error_line(error)
        if self._is_ending:
            return
        if problem is not None:
            say(self.world, f"warning: {output}: not exported: {problem}; training goes on")
            return
        inform(self.world, f"{output}: exported in {time.monotonic() - began:.0f} s")
        prune_exports(output, self.recipe)

    # The end

    def wait(self, is_told_to_end: Callable[[], bool], note_progress: Callable[[], None]) -> bool:
        """Until nothing is left to be exported, which it returns, or any rank is told to end.

        Called by all ranks.
        """
        if self.recipe.export_every_steps is None:
            return True
        if names := self._names():
            inform(self.world, f"{self.run_dir}: waiting for the export of {names}")
        while any(gather(self.left)):
            if any(gather(is_told_to_end())):
                return False
            note_progress()
            time.sleep(POLL_S)
        return True

    def _names(self) -> str:
        """The steps that are left, for a line."""
        return " and ".join(f"step {step}" for step in self.left)

    def stop(self) -> None:
        """End what is under way, at once; the next start makes up for it."""
        names = self._names()
        with self._lock:
            self._is_ending = True
            self._waiting.clear()
            process = self._process
        if names:
            inform(
                self.world, f"{self.run_dir}: {names} not exported yet; the same command does that"
            )
        if process and names:
            process.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.stop()

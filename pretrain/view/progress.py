"""What a run says while it trains: a block on a terminal, a line now and then anywhere else.

It reads records, and adds nothing to them.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar

from data_prep.manifest import MANY_EPOCHS
from pretrain.config.recipe import Recipe
from pretrain.data.loader import TrainingLoader
from pretrain.data.stages import DataStage, steps_of_stage
from pretrain.distributed.agree import LOG, WARNING
from pretrain.distributed.world import World
from pretrain.metrics.step_record import AnyStep, StepRecord
from pretrain.view.block import About, Block, Look
from pretrain.view.log_lines import LogLines
from pretrain.view.terminal import Terminal, is_terminal
from pretrain.view.time_left import TimeLeft

T = TypeVar("T")


def stages_lines(stages: Sequence[DataStage]) -> list[str]:
    """The data sets of a run that has several, a line each."""
    if len(stages) < 2:
        return []
    lines = []
    for stage in stages:
        steps = steps_of_stage(stages, stage)
        lines.append(f"data set {stage.fingerprint} {steps}: {stage.data_dir}")
    return lines


def epochs_lines(recipe: Recipe, loader: TrainingLoader, stage: DataStage) -> list[str]:
    """How often each source of a stage is gone through, and a warning where that is too often."""
    steps = recipe.total_steps - stage.first_step
    epochs = loader.manifest.epochs(steps * recipe.batch.global_batch_tokens)
    seen = ", ".join(f"{name} {count:.2f}" for name, count in epochs.items())
    tail = sum(loader.unseen_tail_tokens().values())
    lines = [
        f"epochs: {seen}; {tail:,} tokens at the ends of sources fill no window and are never seen"
    ]
    for name, count in epochs.items():
        if count > MANY_EPOCHS:
            lines.append(
                f"{WARNING}{name} is gone through {count:.1f} times; beyond {MANY_EPOCHS}, "
                "repetition is worth little"
            )
    return lines


class View(Protocol):
    """One way to show a run."""

    def show(self, record: AnyStep, left_s: float | None) -> None:
        """A finished step, and how long the run still takes after it, if that is known."""

    def validating(self, done: int, count: int) -> None:
        """So many of a validation's batches are done."""

    def close(self) -> None:
        """The run ends here."""


class Nothing:
    """The view of a quiet run, and of every rank but the first."""

    def show(self, record: AnyStep, left_s: float | None) -> None:
        """Nothing."""

    def validating(self, done: int, count: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class LiveBlock:
    """A block that stays in place on the terminal of stderr, drawn by a thread."""

    def __init__(self, about: About, total_steps: int) -> None:
        encoding = (sys.stderr.encoding or "").lower()
        look = Look(
            has_unicode=encoding.startswith("utf"),
            has_colours="NO_COLOR" not in os.environ,  # as no-color.org has it
        )
        block = Block(about, total_steps, look)
        self.show = block.show
        self.validating = block.validating
        terminal = Terminal(sys.stderr, block)
        self.close = terminal.close
        terminal.open()


class Progress:
    """Shows a run on rank 0 until it is closed: it takes records, and keeps the time left."""

    def __init__(
        self,
        time_left: TimeLeft,
        start_step: int,
        world: World,
        about: About | None = None,
    ) -> None:
        self.time_left = time_left
        self.start_step = start_step
        recipe = time_left.recipe
        self.view: View = Nothing()
        if not world.is_main or LOG.is_quiet:
            return
        if is_terminal(sys.stderr):
            self.view = LiveBlock(about or About(), recipe.total_steps)
        else:
            self.view = LogLines(world, recipe.log, recipe.total_steps)

    def show(self, record: AnyStep) -> None:
        """Report a finished step."""
        left_s = None
        if isinstance(record, StepRecord):
            self.time_left.saw_step(record.step_s, record.seconds["forward"])
            if record.step > self.start_step:  # the first one compiles and fills caches
                left_s = self.time_left.seconds(record.step + 1)
        self.view.show(record, left_s)

    def validating(self, batches: Iterable[T], count: int) -> Iterator[T]:
        """This rank's validation batches, so many, while the view follows them."""
        for done, batch in enumerate(batches):
            self.view.validating(done, count)
            yield batch

    def close(self) -> None:
        """Leave the terminal clean."""
        self.view.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

"""The figures of a run's steps as columns, and what is drawn of them: groups of steps, of which no
extreme is lost.

A record of a step is 2 kB of Python's memory, a row of figures here 136 bytes: a run of a million
steps is looked at as a table.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.errors import UserError, what_it_says
from pretrain.metrics.metrics_file import METRICS_NAME, stream_steps
from pretrain.metrics.records import ADVICE
from pretrain.metrics.step_record import AnyStep, Sample, SkippedStep, StepRecord

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

PHASES = ("data", "forward", "backward", "optimizer", "other")
# Names as in StepRecord; NaN where a step has no such figure.
FIGURES = (
    "step",
    "tokens",
    "loss",
    "val_loss",
    "learning_rate",
    "gradient_norm",
    "tokens_per_s",
    "ranks",
    "step_s",
    "peak_memory_bytes",
    "mfu",
    "mfu_of_matmul",
    *PHASES,
)
NONE = float("nan")
MOST_SAMPLED = 64  # steps whose samples are kept
# what a line that holds something else in the place of a figure raises
NO_FIGURE = (KeyError, TypeError, AttributeError, ValueError, ArithmeticError)


@dataclass(frozen=True, kw_only=True)
class SampledStep:
    """What the model generated after a step."""

    step: int  # from 0
    samples: tuple[Sample, ...]


class SampledSteps:
    """Of all steps that have samples the first, the last, and some evenly between.

    A run of many validations would hold megabytes of text.
    """

    def __init__(self) -> None:
        self.seen = 0
        self._kept: list[SampledStep] = []
        self._every = 1  # of those seen is kept
        self._last: SampledStep | None = None

    def add(self, record: AnyStep) -> None:
        """Look at the next step that has samples."""
        self._last = SampledStep(step=record.step, samples=record.samples)
        if self.seen % self._every == 0:
            self._kept.append(self._last)
        self.seen += 1
        if len(self._kept) == MOST_SAMPLED:  # which leaves room for the last one
            self._kept = self._kept[::2]
            self._every *= 2

    def kept(self) -> tuple[SampledStep, ...]:
        """At most MOST_SAMPLED, in order."""
        if self._last is None or self._kept[-1] is self._last:
            return tuple(self._kept)
        return (*self._kept, self._last)


@dataclass(frozen=True, kw_only=True)
class StepColumns:
    """The steps of a run: a row each, in order, those that were skipped too."""

    table: Floats  # (steps, figures)
    skipped: tuple[SkippedStep, ...] = ()
    sampled: tuple[SampledStep, ...] = ()
    all_sampled: int = 0  # how many steps had samples, also those that were thinned out

    def __len__(self) -> int:
        return len(self.table)

    def column(self, figure: str) -> Floats:
        """A figure of every step, (steps,)."""
        column: Floats = self.table[:, FIGURES.index(figure)]
        return column

    @property
    def missing(self) -> int:
        """How many steps before the last have no line."""
        if len(self) == 0:
            return 0
        return int(self.column("step")[-1]) + 1 - len(self)

    def seconds_so_far(self) -> Floats:
        """Of training, at the end of each step; a skipped step has no time, (steps,)."""
        seconds: Floats = np.cumsum(np.nan_to_num(self.column("step_s")))
        return seconds

    def gpu_seconds(self) -> float:
        """Of all ranks together, in the steps of the record."""
        return float(np.nansum(self.column("step_s") * self.column("ranks")))


def row_of(record: AnyStep) -> tuple[float, ...]:
    """A step's figures, in the order of FIGURES.

    A skipped step keeps its learning rate and tokens alone: its loss never reached the weights.
    """
    val_loss = NONE if record.val_loss is None else record.val_loss
    if isinstance(record, SkippedStep):
        known = (record.step, record.tokens, NONE, val_loss, record.learning_rate)
        return known + (NONE,) * (len(FIGURES) - len(known))
    return (
        record.step,
        record.tokens,
        record.loss,
        val_loss,
        record.learning_rate,
        record.gradient_norm,
        record.tokens_per_s,
        ranks_of(record),
        record.step_s,
        record.peak_memory_bytes,
        NONE if record.mfu is None else record.mfu,
        NONE if record.mfu_of_matmul is None else record.mfu_of_matmul,
        *map(record.seconds.__getitem__, PHASES),
    )


def ranks_of(record: StepRecord) -> float:
    """How many ranks a step had, which its two speeds tell."""
    if record.tokens_per_s_per_rank <= 0:
        return NONE
    return round(record.tokens_per_s / record.tokens_per_s_per_rank)


def columns_of(records: Iterable[AnyStep], path: Path) -> StepColumns:
    """The columns of steps, a line of `path` each.

    Raises UserError, naming the line, where they are out of order or lack a figure.
    """
    figures = array("d")
    skipped: list[SkippedStep] = []
    sampled = SampledSteps()
    before = -1
    for number, record in enumerate(records, start=1):
        if record.step <= before:
            raise UserError(
                f"{path}: line {number}: is of step {record.step}, and the line before it of step "
                f"{before}, where steps only rise; delete the lines that stand there twice, then "
                "the same command goes on"
            )
        before = record.step
        try:
            figures.extend(row_of(record))
        except NO_FIGURE as error:
            why = f"a figure is missing or no number: {what_it_says(error)}"
            raise UserError(f"{path}: line {number}: damaged ({why}); {ADVICE}") from None
        if isinstance(record, SkippedStep):
            skipped.append(record)
        if record.samples:
            sampled.add(record)
    table = np.frombuffer(figures).reshape(-1, len(FIGURES))  # in place, so never held twice
    return StepColumns(
        table=table,
        skipped=tuple(skipped),
        sampled=sampled.kept(),
        all_sampled=sampled.seen,
    )


def read_columns(run_dir: Path) -> StepColumns:
    """The columns of a run's steps; no rows where it never trained.

    Raises UserError for a damaged line, a figure that is missing, and steps out of order.
    """
    return columns_of(stream_steps(run_dir), run_dir / METRICS_NAME)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Rows of steps in groups of as many steps each, counted from step 0.

    Runs that are grouped alike have their groups at the same steps.
    """

    steps: StepColumns
    size: int
    starts: Integers = field(init=False)  # the first row of each group, (groups,)
    ends: Integers = field(init=False)  # the last one, (groups,)

    def __post_init__(self) -> None:
        numbers = self.steps.column("step").astype(np.int64) // self.size
        is_first = np.diff(numbers, prepend=-1) > 0
        starts = np.flatnonzero(is_first)
        object.__setattr__(self, "starts", starts)
        object.__setattr__(self, "ends", np.append(starts[1:], len(numbers))[: len(starts)] - 1)

    def last(self, values: Floats) -> Floats:
        """Of each group its last row's, (groups,)."""
        last: Floats = values[self.ends]
        return last

    def least(self, values: Floats) -> Floats:
        """Of each group, NaN only where all are, (groups,)."""
        least: Floats = np.fmin.reduceat(values, self.starts)
        return least

    def most(self, values: Floats) -> Floats:
        """Of each group, NaN only where all are, (groups,)."""
        most: Floats = np.fmax.reduceat(values, self.starts)
        return most

    def mean(self, values: Floats) -> Floats:
        """Of each group over the values that are none of NaN, (groups,)."""
        if self.size == 1:
            return values
        sums = np.add.reduceat(np.nan_to_num(values), self.starts)
        counts = np.add.reduceat((~np.isnan(values)).astype(np.float64), self.starts)
        with np.errstate(invalid="ignore"):
            mean: Floats = sums / counts
        return mean


def extremes(values: Floats, most: int) -> Integers:
    """Rows of at most so many values that are to be shown, in order, NaN left out.

    Of each group of neighbours the least and the greatest, so that no extreme is lost.
    """
    rows = np.flatnonzero(~np.isnan(values))
    if len(rows) <= most:
        return rows
    kept: set[int] = {int(rows[0]), int(rows[-1])}
    for part in np.array_split(rows, max(1, most // 2 - 1)):
        kept.add(int(part[np.argmin(values[part])]))
        kept.add(int(part[np.argmax(values[part])]))
    return np.array(sorted(kept), np.int64)

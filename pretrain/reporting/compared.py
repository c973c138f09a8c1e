"""A run compared with itself: whether it still improves, was slow, and which steps stand out."""

from dataclasses import dataclass

import numpy as np

from data_prep.errors import printable
from pretrain.metrics.step_columns import Floats, StepColumns
from pretrain.reporting.power_law import law_of
from pretrain.reporting.reported_run import ReportedRun

TENTH = 10
FEWEST_STEPS = 20  # of which a tenth says nothing
STEPS_BEFORE = 100  # with whose mean a step's loss is compared
SLOW_MEDIANS = 2.0  # a step is slow from so many medians on
MOST_STEPS = 10  # that are named


@dataclass(frozen=True, kw_only=True)
class Trend:
    """The mean training loss of the last tenth of a run's steps, and of the tenth before."""

    last: float
    before: float
    error: float  # of their difference: the standard error, steps taken for independent

    @property
    def words(self) -> str:
        """Whether the run still improves."""
        fall = self.before - self.last
        if abs(fall) <= 2 * self.error:
            return f"flat: {self.last:.4f}, within its noise of {self.before:.4f}"
        if fall > 0:
            return f"still falling: {self.last:.4f}, {fall:.4f} less than before"
        return f"rising: {self.last:.4f}, {-fall:.4f} more than before"


@dataclass(frozen=True, kw_only=True)
class Slowness:
    """Steps that took SLOW_MEDIANS times the median or more."""

    steps: int
    seconds: float  # that they took beyond the median


@dataclass(frozen=True, kw_only=True)
class StandsOut:
    """A step whose loss is far above that of the steps before it."""

    step: int
    loss: float
    above: float  # the mean of the steps before


def trend_of(steps: StepColumns) -> Trend | None:
    """How the loss goes; None where too few steps were trained."""
    column = steps.column("loss")
    losses = column[np.isfinite(column)]
    size = len(losses) // TENTH
    if len(losses) < FEWEST_STEPS:
        return None
    last = losses[-size:]
    before = losses[-2 * size : -size]
    variance = last.var() + before.var()
    return Trend(
        last=float(last.mean()),
        before=float(before.mean()),
        error=float(np.sqrt(variance / size)),
    )


def slowness_of(steps: StepColumns) -> Slowness | None:
    """How often and how long a run was slow; None where it never trained."""
    column = steps.column("step_s")
    seconds = column[np.isfinite(column)]
    if len(seconds) == 0:
        return None
    median = np.median(seconds)
    slow = seconds[seconds >= SLOW_MEDIANS * median]
    return Slowness(steps=len(slow), seconds=float((slow - median).sum()))


def means_before(losses: Floats) -> Floats:
    """Of each loss, the mean of those before it, at most STEPS_BEFORE; NaN of the first."""
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    ends = np.arange(len(losses))
    begins = np.maximum(ends - STEPS_BEFORE, 0)
    with np.errstate(invalid="ignore"):
        means: Floats = (sums[ends] - sums[begins]) / (ends - begins)
    return means


def worst_steps(steps: StepColumns) -> list[StandsOut]:
    """The steps whose loss lies highest above the steps before them, the highest first."""
    column = steps.column("loss")
    rows = np.flatnonzero(np.isfinite(column))
    losses = column[rows]
    above = np.nan_to_num(losses - means_before(losses))
    highest = np.argsort(-above, kind="stable")[:MOST_STEPS]
    found = []
    for place in highest.tolist():
        if above[place] <= 0:
            break
        step = steps.column("step")[rows[place]]
        found.append(
            StandsOut(step=int(step), loss=float(losses[place]), above=float(above[place]))
        )
    return found


def said_first(run: ReportedRun, *, is_alone: bool) -> list[str]:
    """What the command prints of a run: what people look for first.

    Of a run that is reported alone, each step that stands out has a line of its own.
    """
    lines = []
    trend = trend_of(run.steps)
    if trend:
        lines.append(f"training loss of the last tenth of its steps {trend.words}")
        law = law_of(run.steps, run.recipe.schedule.warmup(run.recipe.total_steps))
        lines.append(f"that tenth against a power law of the tokens N: {law.words}")
    slow = slowness_of(run.steps)
    if slow and slow.steps:
        lines.append(
            f"steps of {SLOW_MEDIANS:g} medians or more: {slow.steps:,}, which took "
            f"{slow.seconds:,.3g} s more"
        )
    worst = worst_steps(run.steps)
    if worst and not is_alone:
        steps = ", ".join(f"{found.step:,} ({found.loss:.4f})" for found in worst)
        lines.append(f"steps of the highest loss: {steps}")
    elif worst:
        lines += [line_on(run, found) for found in worst]
    return [printable(f"{run.name}: {line}") for line in lines]


def line_on(run: ReportedRun, found: StandsOut) -> str:
    """A step that stands out, with the document that had most of its batch."""
    line = f"step {found.step:,}: loss {found.loss:.4f}, {found.above:.4f} above those before"
    documents = run.documents.get(found.step)
    if documents is None:
        return line
    return f"{line}; {documents.named[0]}"

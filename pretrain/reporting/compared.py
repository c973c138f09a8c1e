"""A run compared with itself: whether it still improves, was slow, and which steps stand out."""

from dataclasses import dataclass

import numpy as np

from data_prep.errors import printable
from pretrain.metrics.step_columns import Floats, StepColumns
from pretrain.reporting.power_law import law_of
from pretrain.reporting.reported_run import ReportedRun, StandsOut, WorstSteps
from pretrain.reporting.words import NOT_KNOWN

TENTH = 10
FEWEST_STEPS = 100  # of which a tenth, 10 steps, says something
STEPS_BEFORE = 100  # with whose median a step's loss is compared at most
FEWEST_BEFORE = 5
WINDOWS = 10  # that a short run has, of the steps with whose median each is compared
WINDOWS_AT_ONCE = 10_000
DEVIATIONS = 5.0  # of the noise from step to step, above which a step stands out
DEVIATIONS_OF_MEDIAN = 1.4826  # normal standard deviations in a median of absolute values
LEAST_SHARE = 0.01  # of the median loss: less is nothing to look at, however calm the run
SLOW_MEDIANS = 2.0  # a step is slow from so many medians on
MOST_STEPS = 10  # that are named
TREND = "training loss, last tenth of the steps against the tenth before"
SLOW = "slow steps, of twice the median time or more"
WORST = "steps whose loss stands out"


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
        means = f"{self.last:.4f} after {self.before:.4f}"
        if abs(fall) <= 2 * self.error:
            return f"flat ({means}, a difference within the noise)"
        if fall > 0:
            return f"still falling ({means}, {fall:.4f} less)"
        return f"rising ({means}, {-fall:.4f} more)"


@dataclass(frozen=True, kw_only=True)
class Slowness:
    """Steps that took SLOW_MEDIANS times the median or more."""

    steps: int
    seconds: float  # that they took beyond the median


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


def trend_words(steps: StepColumns) -> str:
    """How the loss goes, or why that is not told."""
    trend = trend_of(steps)
    if trend is None:
        return f"not told of fewer than {FEWEST_STEPS} steps"
    return trend.words


def slowness_of(steps: StepColumns) -> Slowness | None:
    """How often and how long a run was slow; None where it never trained."""
    column = steps.column("step_s")
    seconds = column[np.isfinite(column)]
    if len(seconds) == 0:
        return None
    median = np.median(seconds)
    slow = seconds[seconds >= SLOW_MEDIANS * median]
    return Slowness(steps=len(slow), seconds=float((slow - median).sum()))


def worst_steps(steps: StepColumns) -> WorstSteps | None:
    """The steps whose loss lies highest above the median of the steps before them, the highest
    first; None where too few were trained.

    That median leaves a spike as high as it is, and follows a loss that falls, since of a short run
    it is one of few steps. What lies within the noise from step to step is no step that stands out.
    """
    column = steps.column("loss")
    rows = np.flatnonzero(np.isfinite(column))
    losses = column[rows]
    before = min(STEPS_BEFORE, max(FEWEST_BEFORE, len(losses) // WINDOWS))
    if len(losses) <= before:
        return None
    above = losses[before:] - medians_before(losses, before)
    # of second differences: a steady fall is none, and their variance is 1 + 4 + 1 times
    # that of a step
    bends = np.abs(np.diff(losses, 2))
    noise = DEVIATIONS_OF_MEDIAN * np.median(bends) / np.sqrt(6)
    least = float(max(DEVIATIONS * noise, LEAST_SHARE * np.median(losses)))
    found = []
    for place in np.argsort(-above, kind="stable")[:MOST_STEPS].tolist():
        if above[place] <= least:
            break
        row = rows[before + place]
        own = StandsOut(
            done=int(steps.column("step")[row]) + 1,
            loss=float(column[row]),
            above=float(above[place]),
        )
        found.append(own)
    return WorstSteps(steps=tuple(found), before=before, least=least)


def medians_before(losses: Floats, before: int) -> Floats:
    """Of each loss but the first `before` the median of so many before it, (losses - before,)."""
    windows = np.lib.stride_tricks.sliding_window_view(losses, before)[:-1]
    # a median copies its windows: some of them at a time
    parts = range(0, len(windows), WINDOWS_AT_ONCE)
    medians = [np.median(windows[part : part + WINDOWS_AT_ONCE], axis=1) for part in parts]
    found: Floats = np.concatenate(medians)
    return found


def slow_words(slow: Slowness | None) -> str:
    """How often a run was slow, and what that cost."""
    if slow is None:
        return NOT_KNOWN
    if slow.steps == 0:
        return "none"
    return f"{slow.steps:,}, which cost {duration(slow.seconds)} beyond the median"


def duration(seconds: float) -> str:
    """So long, as people say it."""
    for name, size in (("h", 3_600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.3g} s"


def none_words(worst: WorstSteps | None) -> str:
    """That no step stands out, and what would have."""
    if worst is None:
        return "not looked for: the run is too short"
    return f"none lies more than {worst.least:.4f} above the median of the {worst.before} before it"


def said_first(run: ReportedRun, *, is_alone: bool) -> list[str]:
    """What the command prints of a run: what people look for first.

    Of a run that is reported alone, each step that stands out has a line of its own.
    """
    lines = []
    if len(run.steps):
        lines.append(f"{TREND}: {trend_words(run.steps)}")
    if trend_of(run.steps):
        law = law_of(run.steps, run.recipe.schedule.warmup(run.recipe.total_steps))
        lines.append(f"that tenth against a power law of the tokens N: {law.words}")
    slow = slowness_of(run.steps)
    if slow and slow.steps:
        lines.append(f"{SLOW}: {slow_words(slow)}")
    if run.worst is None or not run.worst.steps:
        if len(run.steps):
            lines.append(f"{WORST}: {none_words(run.worst)}")
    elif is_alone:
        lines += [line_on(run, found) for found in run.worst.steps]
    else:
        steps = ", ".join(f"{found.done:,} ({found.loss:.4f})" for found in run.worst.steps)
        lines.append(f"{WORST}: {steps}")
    return [printable(f"{run.name}: {line}") for line in lines]


def line_on(run: ReportedRun, found: StandsOut) -> str:
    """A step that stands out, with the document that had most of its batch."""
    line = f"step {found.done:,}: loss {found.loss:.4f}, {found.above:.4f} above those before"
    documents = run.documents.get(found.done - 1)
    if documents is None:
        return line
    return f"{line}; {documents.named[0]}"

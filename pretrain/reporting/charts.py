"""What the charts of a report draw, as numbers of JSON.

Of each run that is at most so many groups of steps, each with its mean, its least and its greatest
figure.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pretrain.config.changes import MAY_CHANGE_ON_RESUME, flatten
from pretrain.config.load import recipe_to_dict
from pretrain.config.recipe import Recipe
from pretrain.costs.flops import flops_per_token
from pretrain.metrics.step_columns import (
    PHASES,
    Floats,
    Groups,
    Integers,
    StepColumns,
    extremes,
)

# A number takes about 9 bytes of the page: all charts together stay near a megabyte.
MOST_NUMBERS = 110_000
NUMBERS_OF_A_GROUP = 25
MOST_GROUPS = 2_000
FEWEST_GROUPS = 50
MOST_VALIDATIONS = 400  # points of each run that are drawn
MOST_MARKS = 200  # of each kind and run that are drawn
DIGITS = 7
GIGA = 1e9
PERCENT = 100
SECONDS_OF_AN_HOUR = 3600
# Keys and sections of a recipe that change nothing of what is learned. The engine's file may: it
# tells the precision.
LEARNS_THE_SAME = (MAY_CHANGE_ON_RESUME | {"seed"}) - {"engine"}

Numbers = list[float | None]  # None: no number


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something that happened to a run after so many steps."""

    kind: str  # checkpoint, restart, data, skip or stall
    step: int
    words: str


@dataclass(frozen=True, kw_only=True)
class EarlierRatios:
    """Bytes a token of a data set that a run had before its newest; None where not known."""

    end: int  # the first step of the next data set, from 0
    training: float | None
    validation: float | None


@dataclass(frozen=True, kw_only=True)
class Curves:
    """A run as its charts need it."""

    name: str
    recipe: Recipe
    fingerprint: str | None  # of the data set
    steps: StepColumns
    bytes_per_token: float | None  # of the text that it trains on; None where that isn't known
    validation_bytes_per_token: float | None
    marks: tuple[Mark, ...] = field(default=())
    earlier: tuple[EarlierRatios, ...] = ()  # oldest first

    def ratios_at(self, rows: Integers, *, is_validation: bool) -> Floats:
        """Bytes a token of the data set of some rows of its steps; NaN where that isn't known."""
        newest = self.validation_bytes_per_token if is_validation else self.bytes_per_token
        steps = self.steps.column("step")[rows]
        ratios = np.full(len(steps), np.nan if newest is None else newest)
        for stage in reversed(self.earlier):
            own = stage.validation if is_validation else stage.training
            ratios[steps < stage.end] = np.nan if own is None else own
        return ratios

    def ratios_drawn(self, rows: Integers, *, is_validation: bool) -> float | Numbers | None:
        """The one ratio of a run of one data set; of several, that of each row."""
        if self.earlier:
            return numbers(self.ratios_at(rows, is_validation=is_validation))
        return self.validation_bytes_per_token if is_validation else self.bytes_per_token

    def differs_by_seed(self, other: "Curves") -> bool:
        """Whether nothing but the seed tells two runs apart."""
        if (self.fingerprint, self.earlier) != (other.fingerprint, other.earlier):
            return False
        return what_is_learned(self.recipe) == what_is_learned(other.recipe)


def what_is_learned(recipe: Recipe) -> dict[str, object]:
    """By dotted key, all of a recipe that a run's losses follow from, but for the seed."""
    kept = {}
    for key, value in flatten(recipe_to_dict(recipe)).items():
        if key not in LEARNS_THE_SAME and key.partition(".")[0] not in LEARNS_THE_SAME:
            kept[key] = value
    return kept


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where points lie on each axis."""

    steps: Numbers
    tokens: Numbers
    hours: Numbers  # of training


@dataclass(frozen=True, kw_only=True)
class Series:
    """A figure in each group of steps."""

    mean: Numbers
    low: Numbers | None = None  # None where each group is one step
    high: Numbers | None = None


@dataclass(frozen=True, kw_only=True)
class DrawnMarks:
    """Marks of a run and where they lie."""

    kinds: list[str]
    places: Places


@dataclass(frozen=True, kw_only=True)
class DrawnRun:
    """What the page's script draws of a run, or of several as one."""

    name: str
    flops_per_token: float
    # a number or, where the run had several data sets, one for each point
    bytes_per_token: float | Numbers | None
    validation_bytes_per_token: float | Numbers | None
    places: Places
    series: dict[str, Series]
    validations: Places
    validation_loss: Numbers
    marks: DrawnMarks


@dataclass(frozen=True, kw_only=True)
class Charts:
    """All that the page's script draws."""

    runs: list[DrawnRun]
    bands: list[DrawnRun]  # over runs that only the seed tells apart
    steps_in_a_group: int
    is_bits_only: bool  # losses as bits per byte alone


NOWHERE = Places(steps=[], tokens=[], hours=[])
NO_MARKS = DrawnMarks(kinds=[], places=NOWHERE)


def number(value: float) -> float | None:
    """As JSON has it, without digits that nobody sees: what is no number becomes null."""
    if not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")


def numbers(values: Floats) -> Numbers:
    """Several of them."""
    return [number(value) for value in values]


def group_size(steps: int, runs: int) -> int:
    """Of how many steps a group is, so that all runs together stay a page of moderate size."""
    share = MOST_NUMBERS // (NUMBERS_OF_A_GROUP * runs)
    groups = min(MOST_GROUPS, max(FEWEST_GROUPS, share))
    return max(1, math.ceil(steps / groups))


def last_step(steps: StepColumns) -> int:
    """How many steps a run has behind it."""
    if len(steps) == 0:
        return 0
    last = steps.column("step")[-1]
    return int(last) + 1


def places(steps: StepColumns, rows: Integers) -> Places:
    """Where the ends of some steps lie."""
    done = steps.column("step") + 1
    tokens = steps.column("tokens")
    hours = steps.seconds_so_far() / SECONDS_OF_AN_HOUR
    return Places(
        steps=numbers(done[rows]),
        tokens=numbers(tokens[rows]),
        hours=numbers(hours[rows]),
    )


def series_of(groups: Groups, values: Floats) -> Series:
    """A figure's mean in each group and, where groups have several steps, its extremes."""
    mean = numbers(groups.mean(values))
    if groups.size == 1:
        return Series(mean=mean)
    return Series(
        mean=mean,
        low=numbers(groups.least(values)),
        high=numbers(groups.most(values)),
    )


def figures_drawn(steps: StepColumns) -> dict[str, Floats]:
    """By name, the figures that charts draw."""
    drawn = {
        "loss": steps.column("loss"),
        "learning_rate": steps.column("learning_rate"),
        "gradient_norm": steps.column("gradient_norm"),
        "tokens_per_s": steps.column("tokens_per_s"),
        "step_s": steps.column("step_s"),
        "memory": steps.column("peak_memory_bytes") / GIGA,
    }
    # against a device's peak, or where that is not known against a measured matrix product
    for name in ("mfu", "mfu_of_matmul"):
        share = steps.column(name)
        if not np.isnan(share).all():
            drawn[name] = share * PERCENT
    return drawn


def draw_run(run: Curves, size: int) -> DrawnRun:
    """What is drawn of one run, in groups of `size` steps."""
    steps = run.steps
    groups = Groups(steps=steps, size=size)
    series = {}
    for name, values in figures_drawn(steps).items():
        series[name] = series_of(groups, values)
    for phase in PHASES:
        mean = groups.mean(steps.column(phase))
        series[phase] = Series(mean=numbers(mean))
    val_loss = steps.column("val_loss")
    validated = extremes(val_loss, MOST_VALIDATIONS)
    return DrawnRun(
        name=run.name,
        flops_per_token=flops_per_token(run.recipe.model),
        bytes_per_token=run.ratios_drawn(groups.ends, is_validation=False),
        validation_bytes_per_token=run.ratios_drawn(validated, is_validation=True),
        places=places(steps, groups.ends),
        series=series,
        validations=places(steps, validated),
        validation_loss=numbers(val_loss[validated]),
        marks=draw_marks(run),
    )


def draw_marks(run: Curves) -> DrawnMarks:
    """The newest marks of each kind, and where they lie."""
    steps = run.steps
    if len(steps) == 0:
        return NO_MARKS
    by_kind: dict[str, list[Mark]] = defaultdict(list)
    for mark in run.marks:
        by_kind[mark.kind].append(mark)
    kept: list[Mark] = []
    for marks in by_kind.values():
        kept += marks[-MOST_MARKS:]
    # of step N, the row that ends after N steps, or the next one that there is
    done = [mark.step for mark in kept]
    rows = np.searchsorted(steps.column("step") + 1, done)
    rows = np.minimum(rows, len(steps) - 1)
    kinds = [mark.kind for mark in kept]
    return DrawnMarks(kinds=kinds, places=places(steps, rows))


def of_several_seeds(runs: Sequence[Curves]) -> list[list[int]]:
    """Which runs, by number, differ in nothing but the seed; two or more each."""
    alike: list[list[int]] = []
    for index, run in enumerate(runs):
        for found in alike:
            first = runs[found[0]]
            if first.differs_by_seed(run):
                found.append(index)
                break
        else:
            alike.append([index])
    return [found for found in alike if len(found) > 1]


def draw_band(members: Sequence[DrawnRun], name: str) -> DrawnRun:
    """The mean loss over runs of several seeds, and between which ones they lie.

    Their groups are of the same steps, and only those that all of them have are taken.
    """
    shortest = min(members, key=lambda member: len(member.places.steps))
    count = len(shortest.places.steps)
    losses = [member.series["loss"].mean[:count] for member in members]
    means = np.array(losses, np.float64)  # None becomes NaN
    loss = Series(
        mean=numbers(means.mean(axis=0)),
        low=numbers(means.min(axis=0)),
        high=numbers(means.max(axis=0)),
    )
    return replace(
        shortest,
        name=name,
        series={"loss": loss},
        validations=NOWHERE,
        validation_loss=[],
        marks=NO_MARKS,
    )


def is_whole(steps: StepColumns) -> bool:
    """Whether there are steps, and none is missing."""
    return len(steps) > 0 and steps.missing == 0


def draw_bands(runs: Sequence[Curves], drawn: Sequence[DrawnRun]) -> list[DrawnRun]:
    """A band for every set of runs that only the seed tells apart, where they have trained.

    Runs that lack lines of some steps have other groups, and enter none.
    """
    bands = []
    for indices in of_several_seeds(runs):
        whole = [index for index in indices if is_whole(runs[index].steps)]
        if len(whole) < 2:
            continue
        seeds = sorted(runs[index].recipe.seed for index in whole)
        name = f"mean of seeds {', '.join(map(str, seeds))}"
        members = [drawn[index] for index in whole]
        bands.append(draw_band(members, name))
    return bands


def draw_charts(runs: Sequence[Curves], *, is_bits_only: bool) -> Charts:
    """All that is drawn of some runs, in groups of the same steps."""
    longest = max(last_step(run.steps) for run in runs)
    size = group_size(longest, len(runs))
    drawn = [draw_run(run, size) for run in runs]
    bands = draw_bands(runs, drawn)
    return Charts(runs=drawn, bands=bands, steps_in_a_group=size, is_bits_only=is_bits_only)

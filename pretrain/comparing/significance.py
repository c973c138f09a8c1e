"""What few seeds show of a difference, and what they don't.

Two sources of chance, kept apart by name:

    over seeds       another seed draws other weights and another order of samples. Treatment and
                     baseline of one seed share both, so their losses are subtracted seed by seed;
                     the differences are taken for normal, and have Student's t interval.
    over documents   another validation text. Within a seed both models score the same documents,
                     which are drawn anew, both models' nats together: a paired bootstrap
                     (pretrain/evaluation/intervals.py).

Several treatments against one baseline: p values are adjusted by Holm's step-down method
(Scandinavian Journal of Statistics 6, 1979). Power is that of the two-sided paired t test, by the
noncentral t distribution, at the strictest level that Holm's method asks of any of the treatments.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pretrain.evaluation.documents import DocumentScores
from pretrain.evaluation.intervals import Bootstrap, Interval, intervals

LEVEL = 0.05  # of a test; an interval covers the rest
POWER = 0.8  # with which a difference that is there is to be seen
RESAMPLES = 2_000
FEWEST_SEEDS = 2  # of which a spread can be told
MOST_SEEDS = 10_000  # that are counted up to


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure over seeds."""

    mean: float
    deviation: float | None  # the standard deviation of a sample; None of one seed


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Differences of pairs, over seeds."""

    mean: float
    deviation: float
    interval: Interval
    p_value: float  # two-sided, of no difference


def figure_of(values: Sequence[float]) -> Figure:
    """Mean and standard deviation over seeds."""
    deviation = None
    if len(values) >= FEWEST_SEEDS:
        deviation = float(np.std(values, ddof=1))
    return Figure(mean=float(np.mean(values)), deviation=deviation)


def paired_test(differences: Sequence[float]) -> PairedTest:
    """Student's t interval and test of the mean of some differences, two or more."""
    from scipy import stats

    count = len(differences)
    mean = float(np.mean(differences))
    deviation = float(np.std(differences, ddof=1))
    error = deviation / math.sqrt(count)
    reach = error * float(stats.t.isf(LEVEL / 2, count - 1))
    # Differences that are all the same leave no doubt, or show nothing at all.
    p_value = 0.0 if mean else 1.0
    if error > 0:
        p_value = 2 * float(stats.t.sf(abs(mean) / error, count - 1))
    return PairedTest(
        mean=mean,
        deviation=deviation,
        interval=Interval(low=mean - reach, high=mean + reach),
        p_value=p_value,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: each is to be held against LEVEL itself."""
    count = len(p_values)
    smallest_first = sorted(range(count), key=p_values.__getitem__)
    adjusted = [1.0] * count
    largest = 0.0
    for rank, index in enumerate(smallest_first):
        scaled = (count - rank) * p_values[index]
        largest = max(largest, scaled)  # none is below that of a smaller p value
        adjusted[index] = min(largest, 1.0)
    return adjusted


def power_of(effect: float, seeds: int, level: float) -> float:
    """The chance that a two-sided paired t test of so many seeds shows a difference.

    `effect` is the difference over the standard deviation of the pairs' differences.
    """
    from scipy import stats

    shift = abs(effect) * math.sqrt(seeds)
    limit = float(stats.t.isf(level / 2, seeds - 1))
    above = float(stats.nct.sf(limit, seeds - 1, shift))
    # The chance of the wrong sign; far out scipy gives NaN for what is no chance at all.
    below = float(np.nan_to_num(stats.nct.cdf(-limit, seeds - 1, shift)))
    return above + below


def detectable_effect(seeds: int, level: float) -> float:
    """The smallest difference, over the deviation, that so many seeds show with POWER."""
    low = 0.0
    high = 1.0
    while power_of(high, seeds, level) < POWER:
        low = high
        high *= 2
    # Halved until nothing of a float's digits is left: the power rises with the effect.
    for _ in range(50):
        middle = (low + high) / 2
        if power_of(middle, seeds, level) < POWER:
            low = middle
        else:
            high = middle
    return high


def seeds_to_see(difference: float, deviation: float, level: float) -> int | None:
    """The fewest seeds that show a difference with POWER; None above MOST_SEEDS."""
    if deviation == 0:
        return FEWEST_SEEDS
    effect = abs(difference) / deviation
    if power_of(effect, MOST_SEEDS, level) < POWER:
        return None
    too_few = FEWEST_SEEDS - 1
    enough = MOST_SEEDS
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if power_of(effect, middle, level) < POWER:
            too_few = middle
        else:
            enough = middle
    return enough


def strictest_level(treatments: int) -> float:
    """The level that Holm's method holds the smallest of so many p values against."""
    return LEVEL / treatments


def paired_documents(treatment: DocumentScores, baseline: DocumentScores) -> DocumentScores:
    """Documents whose nats are the treatment's less the baseline's; drawn as pairs, that is.

    Raises ValueError where the two are not of the same documents.
    """
    if not np.array_equal(treatment.targets, baseline.targets):
        raise ValueError("scored on other documents")
    return replace(baseline, nats=treatment.nats - baseline.nats)


def over_documents(differences: DocumentScores) -> Interval | None:
    """Where the difference of losses lies, in nats a target; None of fewer than two documents."""
    return intervals(differences, Bootstrap(level=1 - LEVEL, resamples=RESAMPLES)).loss

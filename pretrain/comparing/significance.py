"""What few seeds show of a difference, and what they don't.

Two sources of chance, kept apart by name:

    over seeds       another seed draws other weights and another order of samples. Treatment and
                     baseline of one seed share both, so their losses are subtracted seed by seed;
                     the differences are taken for normal, and have Student's t interval.
    over documents   another validation text. Within a seed both models score the same documents,
                     which are drawn anew with replacement, both models' nats together (a paired
                     bootstrap of a ratio, with its percentiles: Efron and Tibshirani, An
                     Introduction to the Bootstrap, 1993, chapter 13).

Several treatments against one baseline: p values are adjusted by Holm's step-down method
(Scandinavian Journal of Statistics 6, 1979). Power is that of the two-sided paired t test, by the
noncentral t distribution, at the strictest level that Holm's method asks of any of the treatments.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.errors import UserError

LEVEL = 0.05  # of a test; an interval covers the rest
POWER = 0.8  # with which a difference that is there is to be seen
RESAMPLES = 2_000
FEWEST_SEEDS = 2  # of which a spread can be told
MOST_SEEDS = 10_000  # that are counted up to

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Where a figure lies, at 95 %."""

    low: float
    high: float


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


def check_scipy() -> None:
    """Raise UserError where scipy, which has the distributions, is not installed."""
    try:
        import scipy.stats  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(
            "intervals follow from scipy's distributions, and it is missing; "
            "pip install 'tablefree[compare]' installs it"
        ) from None


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


def bootstrap_over_documents(
    differences_DP: Floats, targets_D: npt.NDArray[np.int64], seed: int
) -> list[Interval]:
    """Where each pair's difference of losses lies, in nats a target, over drawn validation texts.

    `differences_DP`, (documents, pairs), holds nats of the treatment less those of the baseline;
    `targets_D`, (documents,), how many ids were predicted. Each drawing is the same for all pairs.
    """
    generator = np.random.default_rng(seed)
    documents = len(targets_D)
    summed_DC = np.column_stack([differences_DP, targets_D.astype(np.float64)])
    drawn_RC = np.empty((RESAMPLES, summed_DC.shape[1]))
    for resample in range(RESAMPLES):
        picked = generator.integers(documents, size=documents)
        times = np.bincount(picked, minlength=documents)
        drawn_RC[resample] = times @ summed_DC
    losses_RP = drawn_RC[:, :-1] / drawn_RC[:, -1:]
    low_P, high_P = np.quantile(losses_RP, [LEVEL / 2, 1 - LEVEL / 2], axis=0)
    return [
        Interval(low=float(low), high=float(high)) for low, high in zip(low_P, high_P, strict=True)
    ]

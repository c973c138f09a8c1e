"""Whether a run goes on as a power law that is fitted to its own curve: loss = E + A N^-b.

N are tokens. A law of one run describes it and foretells nothing: the schedule bends the curve, and
a learning rate that falls at the end takes it below its law.
"""

from dataclasses import dataclass

import numpy as np

from pretrain.metrics.step_columns import Floats, StepColumns

FEWEST_STEPS = 100  # to be fitted
LEAST_GROWTH = 4.0  # of the tokens over these steps
POINTS = 200  # medians of steps, evenly on a log scale of tokens
MOST_OF_A_POINT = 1_000  # steps whose median it is, evenly spread where it stands for more
TENTH = 10  # the last one is not fitted: it is what is looked at
LEAST_EXPONENT = 0.02  # below, a power law is a straight line over log N, and E anything
MOST_EXPONENT = 3.0
EXPONENTS = 40  # tried at a time
ROUNDS = 3  # each finer around the best of the one before
WEIGHINGS = 20
# A law that leaves more than so much of what a constant leaves explains nothing.
MOST_LEFT = 0.5


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """A law, and how the last tenth of the steps lies to it."""

    floor: float  # E, nats a token
    factor: float  # A, nats a token
    exponent: float  # b
    scatter: float  # of the fitted points about it: their median distance, nats a token
    first_step: int  # of those that were fitted
    last_step: int
    distance: float  # of the last tenth from the law, the median: below it where negative

    @property
    def words(self) -> str:
        """The law, and where the end of the run lies."""
        side = "above" if self.distance > 0 else "below"
        return (
            f"{abs(self.distance):.4f} {side} {self.floor:.4g} + {self.factor:.3g} × "  # noqa: RUF001
            f"N^-{self.exponent:.3f}, fitted to steps {self.first_step:,} to {self.last_step:,}, "
            f"which scatter by {self.scatter:.4f} about it"
        )


@dataclass(frozen=True, kw_only=True)
class NoLaw:
    """Why none was fitted."""

    words: str


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law as it was fitted, on tokens as a share of some number of them."""

    floor: float
    factor: float
    exponent: float
    left: float  # mean distance of the points, nats a token
    scatter: float  # their median distance, which spikes do not move

    def at(self, shares: Floats) -> Floats:
        """The law's loss, (shares,)."""
        losses: Floats = self.floor + self.factor * shares**-self.exponent
        return losses


def law_of(steps: StepColumns, warmup: int) -> PowerLaw | NoLaw:
    """Fit a law to the steps after the warm-up, and see how the last tenth of them lies to it."""
    numbers = steps.column("step")
    column = steps.column("loss")
    rows = np.flatnonzero(np.isfinite(column) & (numbers >= warmup))
    fitted = rows[: len(rows) - len(rows) // TENTH]
    if len(fitted) < FEWEST_STEPS:
        return NoLaw(words=f"not fitted: that takes {FEWEST_STEPS} steps after the warm-up")
    tokens = steps.column("tokens")
    if tokens[fitted[-1]] < LEAST_GROWTH * tokens[fitted[0]]:
        return NoLaw(words="not fitted: the tokens do not grow fourfold after the warm-up")
    whole = float(tokens[fitted[-1]])
    shares, losses = points(tokens[fitted] / whole, column[fitted])
    fit = fit_law(shares, losses)
    constant = float(np.median(np.abs(losses - np.median(losses))))
    if fit is None or fit.scatter > MOST_LEFT * constant:
        return NoLaw(words="not fitted: the loss does not fall as a power of the tokens")
    if not LEAST_EXPONENT * 1.1 < fit.exponent < MOST_EXPONENT / 1.1:
        return NoLaw(words="not fitted: the curve does not tell the exponent")
    last = rows[len(fitted) :]
    expected = fit.at(tokens[last] / whole)
    return PowerLaw(
        floor=fit.floor,
        factor=fit.factor * whole**fit.exponent,
        exponent=fit.exponent,
        scatter=fit.scatter,
        first_step=int(numbers[fitted[0]]) + 1,
        last_step=int(numbers[fitted[-1]]) + 1,
        distance=float(np.median(column[last] - expected)),
    )


def points(shares: Floats, losses: Floats) -> tuple[Floats, Floats]:
    """The median of each group of steps, evenly on a log scale: spikes weigh nothing, and the many
    steps of the end no more than the few of the beginning.
    """
    edges = np.geomspace(shares[0], shares[-1], POINTS + 1)[1:-1]
    starts = np.unique(np.searchsorted(shares, edges, side="right"))
    of_groups = []
    for own, values in zip(np.split(shares, starts), np.split(losses, starts), strict=True):
        if len(own) == 0:
            continue
        every = -(-len(own) // MOST_OF_A_POINT)
        of_groups.append((np.median(own[::every]), np.median(values[::every])))
    found = np.array(of_groups, np.float64)
    return found[:, 0], found[:, 1]


def fit_law(shares: Floats, losses: Floats) -> Fit | None:
    """The law of the least mean distance; None where the loss does not fall."""
    least = LEAST_EXPONENT
    most = MOST_EXPONENT
    best: Fit | None = None
    for _ in range(ROUNDS):
        exponents = np.geomspace(least, most, EXPONENTS)
        for fit in fit_lines(shares, losses, exponents):
            if fit.factor > 0 and fit.floor >= 0 and (best is None or fit.left < best.left):
                best = fit
        if best is None:
            return None
        step = float(exponents[1] / exponents[0])
        least = max(LEAST_EXPONENT, best.exponent / step)
        most = min(MOST_EXPONENT, best.exponent * step)
    return best


def fit_lines(shares: Floats, losses: Floats, exponents: Floats) -> list[Fit]:
    """Floor and factor for each exponent, by the least mean distance.

    That is weighted least squares, again and again: each point weighs less the further it lies.
    """
    powers = shares ** -exponents[:, np.newaxis]  # (exponents, points)
    weights = np.ones_like(powers)
    tiny = 1e-6 * float(np.ptp(losses)) + 1e-12  # a point on the line does not weigh all
    for _ in range(WEIGHINGS):
        weights /= weights.sum(axis=1, keepdims=True)
        mean_power = (weights * powers).sum(axis=1, keepdims=True)
        mean_loss = (weights * losses).sum(axis=1, keepdims=True)
        aside = powers - mean_power
        spread = (weights * aside**2).sum(axis=1, keepdims=True)
        common = (weights * aside * (losses - mean_loss)).sum(axis=1, keepdims=True)
        factors = common / np.maximum(spread, tiny)
        floors = mean_loss - factors * mean_power
        distances = np.abs(losses - floors - factors * powers)
        weights = 1 / np.maximum(distances, tiny)
    return [
        Fit(
            floor=float(floors[row, 0]),
            factor=float(factors[row, 0]),
            exponent=exponent,
            left=float(distances[row].mean()),
            scatter=float(np.median(distances[row])),
        )
        for row, exponent in enumerate(exponents.tolist())
    ]

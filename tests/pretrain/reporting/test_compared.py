"""The steps that stand out, found where there are some, and the trend, told where there is one."""

import numpy as np
import pytest
from support.reports import columns_of

from pretrain.metrics.step_columns import Floats
from pretrain.reporting.compared import trend_words, worst_steps


def noisy(steps: int) -> Floats:
    """Losses that fall steeply at first, as those of short runs do."""
    noise = np.random.default_rng(steps).normal(0, 0.05, steps)
    losses: Floats = 7.0 + 4.0 * np.exp(-np.arange(steps) / 6) + noise
    return losses


@pytest.mark.parametrize("steps", [40, 400, 30_000])
def test_spikes_are_found_by_their_height_and_noise_is_none(steps: int) -> None:
    losses = noisy(steps)
    calm = worst_steps(columns_of(losses))
    assert calm is not None
    assert calm.steps == ()
    places = [steps // 2, 3 * steps // 4, steps - 3]
    losses[places] += [1.4, 3.0, 1.0]
    losses[steps // 2 + 3] = np.nan
    found = worst_steps(columns_of(losses))
    assert found is not None
    expected = [3 * steps // 4 + 1, steps // 2 + 1, steps - 2]  # from 1
    assert [step.done for step in found.steps] == expected
    assert [step.above for step in found.steps] == pytest.approx([3.0, 1.4, 1.0], abs=0.2)


def test_at_most_ten_are_named_and_a_run_of_few_steps_has_none() -> None:
    losses = noisy(400)
    losses[100::20] += np.arange(15.0) + 1
    found = worst_steps(columns_of(losses))
    assert found is not None
    assert [step.done for step in found.steps] == list(range(381, 181, -20))
    assert worst_steps(columns_of(losses[:5])) is None


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        (noisy(99), "not told of fewer than 100 steps"),
        (noisy(400), "flat ("),
        (9.0 - np.arange(400.0) / 100, "still falling ("),
        (3.0 + np.arange(400.0) / 100, "rising ("),
    ],
)
def test_a_trend_is_told_of_enough_steps(losses: Floats, words: str) -> None:
    assert trend_words(columns_of(losses)).startswith(words)

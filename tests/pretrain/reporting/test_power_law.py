"""The power law of a run's own curve: found where there is one, and not where there is none."""

import re

import numpy as np
import pytest
from support.reports import TOKENS, columns_of

from pretrain.metrics.step_columns import Floats
from pretrain.reporting.power_law import NoLaw, PowerLaw, law_of


def falling(steps: int) -> Floats:
    """Losses that follow 2 + 300 N^-0.4, as noisy as real ones."""
    tokens = (np.arange(steps) + 1.0) * TOKENS
    noise = np.random.default_rng(1).normal(0, 0.02, steps)
    losses: Floats = 2.0 + 300.0 * tokens**-0.4 + noise
    return losses


@pytest.mark.parametrize("spikes", [0, 60])
def test_a_law_is_found_through_noise_and_spikes(spikes: int) -> None:
    losses = falling(6_000)
    losses[np.random.default_rng(2).integers(60, 6_000, spikes)] = 50.0
    losses[4_000] = np.nan
    law = law_of(columns_of(losses), 60)
    assert isinstance(law, PowerLaw)
    assert law.floor == pytest.approx(2.0, abs=0.02)
    assert law.exponent == pytest.approx(0.4, abs=0.01)
    assert law.factor == pytest.approx(300.0, rel=0.1)
    assert abs(law.distance) < 0.005
    assert law.scatter < 0.01
    assert (law.first_step, law.last_step) == (61, 5_407)


def test_the_last_tenth_is_held_against_the_law_of_the_steps_before_it() -> None:
    losses = falling(4_000)
    losses[-400:] -= 0.25
    law = law_of(columns_of(losses), 0)
    assert isinstance(law, PowerLaw)
    assert law.distance == pytest.approx(-0.25, abs=0.01)
    law_itself = r"2\.0\d* \+ \d+ × N\^-0\.\d{3}"  # noqa: RUF001
    assert re.match(rf"0\.2\d{{3}} below {law_itself}, fitted to steps 1 to 3,600", law.words)


def test_the_warm_up_is_no_part_of_it() -> None:
    losses = falling(4_000)
    losses[:400] = 11.0
    law = law_of(columns_of(losses), 400)
    assert isinstance(law, PowerLaw)
    assert law.exponent == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(
    ("losses", "warmup", "words"),
    [
        (falling(100), 0, "that takes 100 steps after the warm-up"),
        (falling(4_000), 3_000, "the tokens do not grow fourfold after the warm-up"),
        (np.full(1_000, 3.0), 10, "the loss does not fall as a power of the tokens"),
        (3.0 + np.arange(1_000.0) / 1_000, 10, "the loss does not fall as a power"),
        (np.random.default_rng(1).normal(3, 0.1, 1_000), 10, "the loss does not fall as a power"),
        (np.full(500, np.nan), 10, "that takes 100 steps"),
        (np.empty(0), 0, "that takes 100 steps"),
    ],
)
def test_where_there_is_no_law_it_says_why(losses: Floats, warmup: int, words: str) -> None:
    law = law_of(columns_of(losses), warmup)
    assert isinstance(law, NoLaw)
    assert law.words.startswith(f"not fitted: {words}")

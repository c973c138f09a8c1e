"""Figures in a fixed width, durations, and lines of bars."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.view.figures import BARS, History, duration, fitted, sparkline


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3.14159, "3.1416"),
        (11.0904, "11.090"),
        (123456.7, "123457"),
        (1.5e9, " 2e+09"),
        (0.00004, "0.0000"),
        (None, "      "),
        (math.nan, "   nan"),
        (math.inf, "   inf"),
        (-0.5, "-0.500"),
    ],
)
def test_a_figure_has_as_many_decimals_as_fit(value: float | None, shown: str) -> None:
    assert fitted(value, 6) == shown


@given(st.floats(-99_999, 999_999))
def test_figures_of_usual_size_take_the_same_width(value: float) -> None:
    assert len(fitted(value, 6)) == 6
    assert float(fitted(value, 6)) == pytest.approx(value, abs=0.5)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m"),
        (3569, "59m"),
        (3571, "1h00m"),
        (86_399, "1d00h"),
        (86_400 * 99, "99d00h"),
    ],
)
def test_a_duration_has_two_units_at_most(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
    assert len(shown) <= 6


def test_bars_are_high_where_values_are() -> None:
    assert sparkline([1.0, 2.0, 3.0], 3, "._^") == "._^"
    assert sparkline([2.0, 2.0], 5) == BARS[0] * 2
    assert sparkline([], 5) == ""
    assert sparkline([1.0], 0) == ""


def test_the_first_steps_do_not_flatten_the_others() -> None:
    drawn = sparkline([11.0, 9.0] + [3.0 - 0.01 * step for step in range(38)], 40)
    assert drawn[:2] == BARS[-1] * 2
    assert set(drawn[2:]) == set(BARS)


@given(st.lists(st.floats(0, 20), max_size=300), st.integers(1, 200))
def test_bars_never_take_more_than_their_width(values: list[float], width: int) -> None:
    drawn = sparkline(values, width)
    assert len(drawn) <= width
    assert bool(drawn) == bool(values)
    assert set(drawn) <= set(BARS)


def test_a_history_of_a_million_steps_takes_a_bounded_memory_and_keeps_its_course() -> None:
    history = History()
    for step in range(1_000_000):
        history.add(float(step))
    history.add(math.nan)
    assert History.LENGTH // 2 <= len(history.values) < History.LENGTH
    assert history.values == sorted(history.values)
    assert history.values[0] < 2_000
    assert history.values[-1] > 997_000

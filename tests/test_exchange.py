"""What the ranks of a step tell each other, packed as numbers and unpacked."""

import math

import pytest

from pretrain.engine.clock import PHASES
from pretrain.engine.engine import norm_of, slowest_of
from pretrain.engine.exchange import HostFigures, RankReport
from pretrain.metrics.step_record import RankFigures


def step_of(rank: int, **seconds: float) -> RankFigures:
    every_phase = dict.fromkeys(PHASES, 0.0) | seconds
    return RankFigures(rank=rank, seconds=every_phase, peak_memory_bytes=10**9 + rank)


def report(norm: float = 1.0, last_step: RankFigures | None = None) -> RankReport:
    host = HostFigures(last_step=last_step, wants_end=0)
    return RankReport(loss_sum=2.0, gradient_norm=norm, host=host)


@pytest.mark.parametrize("last_step", [None, step_of(3, data=0.25, backward=1.5)])
@pytest.mark.parametrize("wants_end", [0, 15, 1000])
def test_what_a_host_packs_is_what_the_others_unpack(
    last_step: RankFigures | None, wants_end: int
) -> None:
    host = HostFigures(last_step=last_step, wants_end=wants_end)
    numbers = host.pack()
    assert len(numbers) == len(PHASES) + 2
    assert HostFigures.unpack(numbers, rank=3) == host


def test_the_slowest_is_whose_data_and_forward_pass_took_longest() -> None:
    waits_for_others = step_of(0, data=0.1, forward=0.2, backward=9.0)
    holds_others_up = step_of(1, data=0.2, forward=0.3, backward=1.0)
    reports = [report(last_step=waits_for_others), report(last_step=holds_others_up)]
    assert slowest_of(reports) == holds_others_up


def test_at_the_first_step_nobody_has_been_slow() -> None:
    assert slowest_of([report(), report()]) is None


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ((0.5, 0.5), 0.5),
        ((0.5, -1.0), math.inf),  # DeepSpeed's word for an overflow
        ((math.nan, 0.5), math.inf),
        ((0.5, math.nan), math.inf),
        ((0.5, math.inf), math.inf),
    ],
)
def test_a_norm_that_is_no_number_on_one_rank_is_none_on_all(
    norms: tuple[float, float], expected: float
) -> None:
    assert norm_of([report(norm) for norm in norms]) == expected

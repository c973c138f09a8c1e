"""Statistics of a comparison, against published figures, closed forms and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from pretrain.comparing.significance import (
    LEVEL,
    MOST_SEEDS,
    detectable_effect,
    figure_of,
    holm,
    over_documents,
    paired_documents,
    paired_test,
    power_of,
    seeds_to_see,
    strictest_level,
)
from pretrain.evaluation.documents import DocumentScores

# Extra hours of sleep of ten patients after two drugs (Student, Biometrika 6, 1908), R's `sleep`.
FIRST_DRUG = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
SECOND_DRUG = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)


def sleep() -> list[float]:
    return [first - second for first, second in zip(FIRST_DRUG, SECOND_DRUG, strict=True)]


def test_a_paired_test_gives_the_figures_that_r_prints_for_student_s_own_data() -> None:
    """t.test(extra ~ group, data = sleep, paired = TRUE)."""
    test = paired_test(sleep())
    assert test.mean == pytest.approx(-1.58)
    assert test.interval.low == pytest.approx(-2.4598858, abs=1e-7)
    assert test.interval.high == pytest.approx(-0.7001142, abs=1e-7)
    assert test.p_value == pytest.approx(0.002833, abs=1e-6)
    independent = stats.ttest_rel(FIRST_DRUG, SECOND_DRUG)
    assert test.p_value == pytest.approx(independent.pvalue, rel=1e-12)


def test_two_pairs_have_the_interval_of_the_cauchy_distribution() -> None:
    """Student's t of one degree of freedom has a closed form."""
    test = paired_test([0.1, 0.4])
    quantile = math.tan(math.pi * (1 - LEVEL) / 2)
    half = quantile * 0.15  # the standard error of two values is half their distance
    assert test.interval.high - test.mean == pytest.approx(half, rel=1e-9)
    t = 0.25 / 0.15
    assert test.p_value == pytest.approx(1 - 2 * math.atan(t) / math.pi, rel=1e-9)


def test_differences_that_are_all_the_same_leave_no_doubt() -> None:
    same = paired_test([0.25, 0.25, 0.25])
    assert (same.interval.low, same.interval.high, same.p_value) == (0.25, 0.25, 0.0)
    assert paired_test([0.0, 0.0]).p_value == 1.0


def test_holm_s_adjustment_is_that_of_r() -> None:
    """p.adjust(c(.01, .02, .03, .04, .05), "holm"), and the worked example in Holm's order."""
    adjusted = holm([0.01, 0.02, 0.03, 0.04, 0.05])
    assert adjusted == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    # p.adjust(c(.04, .01, .5), "holm")
    assert holm([0.04, 0.01, 0.5]) == pytest.approx([0.08, 0.03, 0.5])
    assert holm([0.7, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_power_and_numbers_are_those_of_published_tables() -> None:
    """G*Power 3.1 and R's power.t.test(type = "paired"), two-sided, at 0.05."""
    assert power_of(0.5, 34, 0.05) == pytest.approx(0.8078, abs=1e-4)
    assert [seeds_to_see(effect, 1.0, 0.05) for effect in (0.2, 0.5, 0.8)] == [199, 34, 15]
    assert detectable_effect(10, 0.05) == pytest.approx(0.9960, abs=1e-4)
    assert power_of(0.0, 5, 0.05) == pytest.approx(0.05, abs=1e-9)


def test_numbers_of_seeds_at_their_bounds() -> None:
    assert seeds_to_see(1.0, 0.0, 0.05) == 2
    assert seeds_to_see(1e-6, 1.0, 0.05) is None
    assert seeds_to_see(0.03, 1.0, 0.05) is not None
    assert power_of(50.0, MOST_SEEDS, 0.05) == pytest.approx(1.0)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_difference_that_can_be_shown_is_shown_in_4_of_5_simulations(seeds: int) -> None:
    """Simulated without the distributions that the figure was found by, but for the limit."""
    random = np.random.default_rng(1)
    values = random.normal(detectable_effect(seeds, LEVEL), 1.0, (100_000, seeds))
    t = values.mean(axis=1) / (values.std(axis=1, ddof=1) / math.sqrt(seeds))
    limit = stats.t.ppf(1 - LEVEL / 2, seeds - 1)
    assert (abs(t) > limit).mean() == pytest.approx(0.8, abs=0.006)


def test_intervals_over_three_seeds_hold_the_truth_in_95_of_100_simulations() -> None:
    random = np.random.default_rng(2)
    tests = [paired_test(random.normal(0.3, 2.0, 3).tolist()) for _ in range(4_000)]
    held = np.mean([test.interval.low <= 0.3 <= test.interval.high for test in tests])
    assert held == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


def test_of_three_treatments_without_effect_one_is_seen_in_at_most_5_of_100_simulations() -> None:
    """They share their baseline, so their differences are correlated; Holm's method allows it."""
    random = np.random.default_rng(3)
    seen = 0
    for _ in range(2_000):
        losses = random.normal(0.0, 1.0, (4, 3))  # a baseline and three treatments, three seeds
        p_values = [paired_test((row - losses[0]).tolist()).p_value for row in losses[1:]]
        seen += min(holm(p_values)) < LEVEL
    assert 0.01 < seen / 2_000 < LEVEL + 0.015


def test_what_the_strictest_level_shows_holm_s_method_shows() -> None:
    """A difference as large as said is seen beside others that are not there at all."""
    level = strictest_level(3)
    effect = detectable_effect(5, level)
    t = effect * math.sqrt(5)
    p_value = 2 * stats.t.sf(t, 4)
    assert holm([p_value, 0.9, 0.8])[0] < LEVEL


def test_one_seed_has_a_mean_and_no_deviation() -> None:
    assert figure_of([2.5]).deviation is None
    figure = figure_of([1.0, 2.0, 4.0])
    assert figure.mean == pytest.approx(7 / 3)
    assert figure.deviation == pytest.approx(math.sqrt(7 / 3))


def documents(nats: list[float], targets: list[int]) -> DocumentScores:
    return DocumentScores(
        nats=np.array(nats, np.float64),
        targets=np.array(targets, np.int64),
        text_bytes=4 * np.array(targets, np.int64),
        sources=("text",),
        source_of=np.zeros(len(nats), np.int32),
    )


def test_documents_are_drawn_as_pairs() -> None:
    """Documents differ much, and the two models on each by as much per target: no doubt is left."""
    random = np.random.default_rng(4)
    targets = random.integers(50, 500, 200)
    nats = targets * random.normal(4.0, 1.0, 200)
    baseline = documents(nats.tolist(), targets.tolist())
    treatment = documents((nats + 0.1 * targets).tolist(), targets.tolist())
    interval = over_documents(paired_documents(treatment, baseline))
    assert interval is not None
    assert interval.low == pytest.approx(0.1, abs=1e-9)
    assert interval.high == pytest.approx(0.1, abs=1e-9)


def test_an_interval_over_documents_has_the_width_of_the_ratio_s_standard_error() -> None:
    """Against the delta method, W. Cochran, Sampling Techniques, 1977, chapter 6."""
    random = np.random.default_rng(5)
    targets = random.integers(50, 500, 400)
    gaps = targets * random.normal(0.05, 0.3, 400)
    baseline = documents((4.0 * targets).tolist(), targets.tolist())
    treatment = documents((4.0 * targets + gaps).tolist(), targets.tolist())
    interval = over_documents(paired_documents(treatment, baseline))
    assert interval is not None
    ratio = gaps.sum() / targets.sum()
    error = np.std(gaps - ratio * targets, ddof=1) / math.sqrt(400) / targets.mean()
    assert (interval.low + interval.high) / 2 == pytest.approx(ratio, abs=0.15 * error)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_scores_of_other_documents_make_no_pairs() -> None:
    with pytest.raises(ValueError, match="other documents"):
        paired_documents(documents([1.0, 2.0], [3, 4]), documents([1.0, 2.0], [4, 3]))
    alone = documents([1.0], [2])
    assert over_documents(paired_documents(alone, alone)) is None

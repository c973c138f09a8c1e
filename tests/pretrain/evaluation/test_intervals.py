"""Intervals hold what they promise: seeded, as wide as theory says, around the true figure."""

import math

import numpy as np
import pytest

from pretrain.evaluation.documents import DocumentScores
from pretrain.evaluation.intervals import Bootstrap, Interval, intervals, resample

NATS_PER_BYTE = 0.7


def drawn_documents(number: int, seed: int) -> DocumentScores:
    """Documents of lognormal lengths, whose nats a byte vary by 10 %."""
    generator = np.random.default_rng(seed)
    text_bytes = np.ceil(np.exp(generator.normal(7, 1, number)))
    rate = NATS_PER_BYTE * (1 + 0.1 * generator.normal(size=number))
    return DocumentScores(
        nats=text_bytes * rate,
        targets=np.ceil(text_bytes / 4).astype(np.int64),
        text_bytes=text_bytes.astype(np.int64),
        sources=("a",),
        source_of=np.zeros(number, np.int32),
    )


def test_an_interval_is_that_of_its_seed_and_holds_the_figure() -> None:
    documents = drawn_documents(100, 0)
    first = intervals(documents, Bootstrap(resamples=500))
    assert first == intervals(documents, Bootstrap(resamples=500))
    assert first != intervals(documents, Bootstrap(resamples=500, seed=2))
    assert first.loss is not None
    assert first.loss.low < documents.nats.sum() / documents.targets.sum() < first.loss.high
    narrower = intervals(documents, Bootstrap(resamples=500, level=0.5))
    assert narrower.loss is not None
    assert narrower.loss.high - narrower.loss.low < first.loss.high - first.loss.low


def test_it_is_as_wide_as_the_error_of_a_ratio_by_the_delta_method() -> None:
    documents = drawn_documents(400, 1)
    sums = resample(documents, Bootstrap(resamples=4_000))
    ratio = documents.nats.sum() / documents.text_bytes.sum()
    residuals = documents.nats - ratio * documents.text_bytes
    expected = math.sqrt((residuals**2).sum()) / documents.text_bytes.sum()
    assert (sums.nats / sums.text_bytes).std() == pytest.approx(expected, rel=0.06)


def test_nineteen_of_twenty_intervals_hold_the_true_figure() -> None:
    true = NATS_PER_BYTE / math.log(2)
    held = 0
    for seed in range(200):
        interval = intervals(
            drawn_documents(100, seed), Bootstrap(resamples=300, seed=seed)
        ).bits_per_byte
        assert interval is not None
        held += interval.low <= true <= interval.high
    assert 0.88 <= held / 200 <= 0.98


def test_without_documents_to_draw_or_bytes_to_divide_by_there_is_no_interval() -> None:
    one = drawn_documents(1, 0)
    assert intervals(one, Bootstrap()).loss is None
    assert intervals(one, Bootstrap()).bits_per_byte is None
    without_text = DocumentScores(
        nats=np.array([1.0, 2.0]),
        targets=np.array([1, 1]),
        text_bytes=np.array([0, 0]),
        sources=("a",),
        source_of=np.zeros(2, np.int32),
    )
    found = intervals(without_text, Bootstrap())
    assert found.loss == Interval(low=1.0, high=2.0)
    assert found.bits_per_byte is None

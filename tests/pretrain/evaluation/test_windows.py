"""Windows over a stream: every target once, with as much before it as was promised."""

import numpy as np
import pytest

from data_prep.errors import UserError
from pretrain.evaluation.text import HeldIds
from pretrain.evaluation.windows import windows_of


@pytest.mark.parametrize("stride", [None, 1, 3, 7, 8])
@pytest.mark.parametrize("tokens", [2, 5, 8, 9, 10, 17, 33, 40])
def test_every_target_is_counted_once_and_has_enough_before_it(
    tokens: int, stride: int | None
) -> None:
    seq_len = 8
    windows = windows_of(seq_len, stride)
    position = 1
    for batch in windows.batches(HeldIds(np.arange(tokens, dtype=np.uint16))):
        assert batch.ids.shape[1] <= seq_len + 1
        for ids in batch.ids:
            # Each id is its own position: the counted targets follow on those of before.
            targets = ids[-batch.counted :].tolist()
            assert targets == list(range(position, position + batch.counted))
            before = len(ids) - batch.counted
            assert before >= min(position, seq_len - windows.stride + 1)
            position += batch.counted
    assert position == tokens


def test_a_stride_of_the_context_gives_blocks() -> None:
    stream = HeldIds(np.arange(45, dtype=np.uint16))
    blocks = list(windows_of(8, None).batches(stream))
    same = list(windows_of(8, 8).batches(stream))
    assert [batch.ids.tolist() for batch in blocks] == [batch.ids.tolist() for batch in same]


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_leaves_targets_out_is_refused(stride: int) -> None:
    with pytest.raises(UserError, match=rf"--stride {stride}: .* context is 8 .* from 1 to 8$"):
        windows_of(8, stride)

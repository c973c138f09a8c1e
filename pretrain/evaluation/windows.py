"""Windows over a stream of ids, in which each id after the first is a target exactly once.

A window holds up to `seq_len` ids that the model sees, and begins `stride` ids behind the one
before. The first counts all of its targets, each other one those that no window before it has seen:
the last `stride`. So with a stride of `seq_len` they are blocks side by side, whose targets have
from 1 to `seq_len` ids before them; with a smaller one every target but the first `seq_len` has at
least `seq_len - stride` and the text costs `seq_len / stride` times as much. This is the usual
definition, as in the guide to perplexity of fixed-length models of Hugging Face transformers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.errors import UserError
from data_prep.shards import Tokens
from pretrain.evaluation.text import IdStream

BATCH_TOKENS = 4_096  # ids that a model sees at once; twice as many were 3 % slower on a CPU


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowBatch:
    """Windows of one length, to be scored together."""

    ids: Tokens  # (B, length + 1), the last of each only a target
    counted: int  # of each window's targets, the last so many


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How a stream is cut."""

    seq_len: int
    given_stride: int | None = None  # None: blocks side by side

    @property
    def stride(self) -> int:
        """From the begin of a window to that of the next."""
        return self.given_stride or self.seq_len

    def batches(self, stream: IdStream) -> Iterator[WindowBatch]:
        """Whole windows in groups, then the partial one by itself; positions in order."""
        targets = stream.tokens - 1
        whole = 0
        counted = 0
        if targets >= self.seq_len:
            whole = 1 + (targets - self.seq_len) // self.stride
            counted = self.seq_len + (whole - 1) * self.stride
        at_once = max(1, BATCH_TOKENS // self.seq_len)
        first = 0
        while first < whole:
            # The first window by itself, unless all count alike.
            past_last = min(first + at_once, whole)
            if first == 0 and self.stride < self.seq_len:
                past_last = 1
            starts = np.arange(first, past_last) * self.stride
            ids = stream.windows(starts, self.seq_len + 1)
            yield WindowBatch(ids=ids, counted=self.seq_len if first == 0 else self.stride)
            first = past_last
        if counted < targets:
            start = whole * self.stride
            ids = stream.read(start, stream.tokens - start)
            yield WindowBatch(ids=ids[None], counted=targets - counted)


def windows_of(seq_len: int, stride: int | None) -> Windows:
    """Blocks, or sliding windows where a stride is given.

    Raises UserError for a stride that would leave targets out.
    """
    if stride is not None and not 1 <= stride <= seq_len:
        raise UserError(
            f"--stride {stride:,}: the model's context is {seq_len:,} tokens; give a stride from 1 "
            f"to {seq_len:,}"
        )
    return Windows(seq_len=seq_len, given_stride=stride)

"""Arrow arrays as NumPy arrays and back, through their buffers.

pyarrow's own conversions (`to_numpy`, `pa.array`, `pa.scalar`) import pandas when they are first
used, only to ask whether a value is one of its own: 0.25 s of CPU and more
(findings/pyarrow_imports_pandas.sh).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Offsets = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def bounds_of(lengths: npt.ArrayLike) -> Offsets:
    """Where each of some neighbours begins, and where the last one ends, by their lengths."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.append(np.int64(0), ends)


def numbers_at(bounds: Offsets, places: Offsets) -> Offsets:
    """In which of some neighbours, by their bounds, each place lies."""
    return np.searchsorted(bounds, places, side="right") - 1


def text_bounds(texts: pa.LargeStringArray) -> Offsets:
    """Where each text begins in the array's bytes, and where the last ends, shape (texts + 1,)."""
    if not len(texts):
        return np.zeros(1, np.int64)
    _, bounds, _ = texts.buffers()
    start = texts.offset  # an array may be a slice of another
    stop = start + len(texts) + 1
    return np.frombuffer(bounds, np.int64)[start:stop]


def byte_lengths(texts: pa.LargeStringArray) -> Offsets:
    """Bytes of each text, shape (texts,); 0 of a null."""
    lengths = np.diff(text_bounds(texts))
    lengths[null_mask(texts)] = 0
    return lengths


def character_counts(texts: pa.LargeStringArray) -> Offsets:
    """Characters of each text, shape (texts,); none of them is null."""
    return np.from_dlpack(pc.utf8_length(texts)).astype(np.int64, copy=False)


def null_mask(array: pa.Array) -> Mask:
    """Which elements are null, shape (elements,)."""
    if not array.null_count:
        return np.zeros(len(array), np.bool_)
    nulls = pc.is_null(array)
    _, packed = nulls.buffers()
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
    start = nulls.offset
    stop = start + len(nulls)
    return bits[start:stop].astype(np.bool_)


def arrow_mask(chosen: Mask) -> pa.BooleanArray:
    """A mask that `filter` takes."""
    buffer = pa.py_buffer(np.packbits(chosen, bitorder="little"))
    return pa.BooleanArray.from_buffers(pa.bool_(), len(chosen), [None, buffer])


def arrow_ids(ids: npt.NDArray[np.uint32]) -> pa.UInt32Array:
    """Indices that `take` takes."""
    buffer = pa.py_buffer(np.ascontiguousarray(ids))
    return pa.UInt32Array.from_buffers(pa.uint32(), len(ids), [None, buffer])


def large_strings(texts: Sequence[bytes]) -> pa.LargeStringArray:
    """Texts, as UTF-8, that are not checked to be so."""
    lengths = [len(text) for text in texts]
    bounds = pa.py_buffer(bounds_of(lengths))
    data = pa.py_buffer(b"".join(texts))
    return pa.LargeStringArray.from_buffers(len(texts), bounds, data)

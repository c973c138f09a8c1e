"""Which documents are held out for validation: those whose text has a low hash."""

import itertools

import numpy as np
import pyarrow as pa
import xxhash

from data_prep.formats.flat_arrays import (
    text_bounds,
)
from data_prep.shards import Index


def validation_threshold(fraction: float) -> np.uint64:
    """Documents whose `hash_texts` is below it are the validation documents."""
    return np.uint64(min(int(fraction * 2**64), 2**64 - 1))


def hash_texts(texts: pa.LargeStringArray) -> Index:
    """xxh3-64 of each text's UTF-8 bytes: a document's split, and its place in the parity
    sample.
    """
    view = memoryview(texts.buffers()[2])
    bounds = text_bounds(texts).tolist()
    hashes = (
        xxhash.xxh3_64_intdigest(view[start:stop]) for start, stop in itertools.pairwise(bounds)
    )
    return np.fromiter(hashes, np.uint64, len(texts))

"""Which documents are held out for validation: those whose text has a low hash.

So copies of a text fall on the same side, and no order of files or documents matters.
"""

import itertools

import numpy as np
import pyarrow as pa
import xxhash

from data_prep.formats.flat_arrays import text_bounds
from data_prep.shards import Index


def validation_threshold(fraction: float) -> np.uint64:
    """Documents whose `hash_texts` is below it are the validation documents."""
    hashes = 2**64
    threshold = int(fraction * hashes)
    # A fraction close to 1 is rounded up to all, which 64 bits don't hold.
    return np.uint64(min(threshold, hashes - 1))


def hash_texts(texts: pa.LargeStringArray) -> Index:
    """xxh3-64 of each text's UTF-8 bytes, shape (texts,).

    It chooses a document's split, and its place in the sample that is proved.
    """
    view = memoryview(texts.buffers()[2])
    bounds = text_bounds(texts).tolist()
    hashes = (
        xxhash.xxh3_64_intdigest(view[start:stop]) for start, stop in itertools.pairwise(bounds)
    )
    return np.fromiter(hashes, np.uint64, len(texts))

"""Encode texts fast, and by the reference; decode ids.

gigatoken does the work, `tokenizers` is the reference. Both give the same ids; where gigatoken
can't load a tokenizer, `tokenizers` takes its place, and that is said. Strings that spell a special
token are ordinary text to both.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.errors import one_line
from data_prep.formats.flat_arrays import (
    Offsets,
    arrow_ids,
    bounds_of,
    large_strings,
    numbers_at,
    text_bounds,
)
from data_prep.tokenizer.load import Backend, LoadedTokenizer, for_gigatoken, load_gigatoken
from data_prep.tokenizer.reference import Reference

Ids = npt.NDArray[np.uint32]
Encoded = tuple[Ids, Offsets]  # flat ids, and offsets of each text's ids (texts + 1)
Encode = Callable[[pa.LargeStringArray], Encoded]


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Texts to ids."""

    name: str  # with its version
    encode: Encode
    is_reference: bool
    fallback_reason: str | None = None


def new_encoder(tokenizer: LoadedTokenizer, *, prefer: str) -> Encoder:
    """gigatoken if it is preferred and able; else the reference, with the reason."""
    if prefer != "gigatoken":
        return _reference_encoder(tokenizer, None)
    directory = tokenizer.directory
    why_not = tokenizer.not_for_gigatoken
    if why_not:
        reason = f"gigatoken gives other ids with {directory} ({why_not})"
        return _reference_encoder(tokenizer, reason)
    backend = tokenizer.gigatoken or load_gigatoken(for_gigatoken(tokenizer))
    if isinstance(backend, Exception):
        reason = f"gigatoken can't load {directory} ({one_line(backend)})"
        return _reference_encoder(tokenizer, reason)
    return Encoder(
        name=f"gigatoken {version('gigatoken')}",
        encode=_gigatoken_encode(tokenizer, backend),
        is_reference=False,
    )


def _reference_encoder(tokenizer: LoadedTokenizer, fallback_reason: str | None) -> Encoder:
    """`tokenizers`, in this process."""
    return Encoder(
        name=f"tokenizers {version('tokenizers')}",
        encode=partial(_reference_encode, tokenizer.here),
        is_reference=True,
        fallback_reason=fallback_reason,
    )


def decode_ids(tokenizer: LoadedTokenizer, ids: Ids, offsets: Offsets) -> pa.LargeStringArray:
    """The texts of documents, exact for a byte-level tokenizer.

    What isn't UTF-8 stays so, for the caller to find.
    """
    if tokenizer.token_bytes is None:
        bounds = itertools.pairwise(offsets.tolist())
        rows = [ids[start:stop].tolist() for start, stop in bounds]
        texts = tokenizer.reference.decode_batch(rows, skip_special_tokens=False)
        return large_strings([text.encode() for text in texts])
    tokens = tokenizer.token_bytes.take(arrow_ids(ids))
    _, token_bounds, data = tokens.buffers()
    # Where a document begins, in bytes: where its first token does.
    bounds_in_bytes = np.frombuffer(token_bounds, np.int64)[offsets]
    documents = len(offsets) - 1
    return pa.LargeStringArray.from_buffers(documents, pa.py_buffer(bounds_in_bytes), data)


def reference_ids(tokenizer: LoadedTokenizer, text: str) -> Ids:
    """What the shards must hold for a text, end-of-document aside."""
    (ids,) = tokenizer.by_reference.encode([text])
    return np.array(ids, np.uint32)


def special_documents(tokenizer: LoadedTokenizer, ids: Ids, offsets: Offsets) -> dict[int, str]:
    """Documents whose text gave a special id, which no text may.

    Returns their numbers, and what is wrong with each.
    """
    reasons: dict[int, str] = {}
    for of_no_text in tokenizer.ranges_of_no_text:
        first = np.uint32(of_no_text.start)
        if len(of_no_text) == 1:
            is_special = ids == first
        else:
            above_first = ids - first  # unsigned: what lies below the range is far above it then
            is_special = above_first < len(of_no_text)
        if not np.count_nonzero(is_special):
            continue
        places = np.flatnonzero(is_special)
        numbers = numbers_at(offsets, places)
        for number, special in zip(numbers.tolist(), ids[places].tolist(), strict=True):
            token = tokenizer.name_of(special)
            reasons[number] = (
                f"its text gives the special token {token!r} (id {special}), which stands for no "
                "text"
            )
    return reasons


def _gigatoken_encode(tokenizer: LoadedTokenizer, backend: Backend) -> Encode:
    """Arrow buffers in, flat ids out, no Python object per document.

    All threads share what is loaded. Inside, each of gigatoken's own threads keeps its own memory
    of words, and a batch is encoded by all that are free.
    """
    import awkward as ak

    def of_gigatoken(texts: pa.LargeStringArray) -> Encoded:
        _, _, buffer = texts.buffers()
        data = np.frombuffer(buffer, np.uint8)
        characters = ak.contents.NumpyArray(data, parameters={"__array__": "char"})
        bounds = ak.index.Index64(text_bounds(texts))
        of_strings = {"__array__": "string"}
        strings = ak.contents.ListOffsetArray(bounds, characters, parameters=of_strings)
        encoded = backend.encode_batch(ak.Array(strings), parallel=True)
        rows = encoded.layout
        return rows.content.data, rows.offsets.data

    def encode(texts: pa.LargeStringArray) -> Encoded:
        """Texts with characters of which the two may think differently are the reference's part."""
        numbers = tokenizer.doubtful.find(texts)
        encoded = of_gigatoken(texts)
        if not len(numbers):
            return encoded
        doubtful = texts.take(arrow_ids(numbers.astype(np.uint32)))
        of_reference = _reference_encode(tokenizer.by_reference, doubtful)
        return _replaced(encoded, numbers, of_reference)

    return encode


def _replaced(encoded: Encoded, numbers: Offsets, others: Encoded) -> Encoded:
    """The ids of texts, those of some, by their numbers, replaced by others."""
    ids, offsets = encoded
    other_ids, other_offsets = others
    parts = []
    done = 0  # texts
    for number, bounds in zip(
        numbers.tolist(), itertools.pairwise(other_offsets.tolist()), strict=True
    ):
        start, stop = bounds
        parts.append(ids[offsets[done] : offsets[number]])
        parts.append(other_ids[start:stop])
        done = number + 1
    parts.append(ids[offsets[done] :])
    lengths = np.diff(offsets)
    lengths[numbers] = np.diff(other_offsets)
    return np.concatenate(parts), bounds_of(lengths)


def _reference_encode(reference: Reference, texts: pa.LargeStringArray) -> Encoded:
    """The same through `tokenizers`."""
    rows = reference.encode(texts.to_pylist())
    ids = [np.array(row, np.uint32) for row in rows]
    return np.concatenate(ids), bounds_of([len(row) for row in rows])

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
from data_prep.formats.flat_arrays import Offsets, arrow_ids, large_strings, text_bounds
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
    reason = None
    if prefer == "gigatoken" and tokenizer.not_for_gigatoken:
        reason = (
            f"gigatoken gives other ids with {tokenizer.directory} ({tokenizer.not_for_gigatoken})"
        )
    elif prefer == "gigatoken":
        backend = tokenizer.gigatoken or load_gigatoken(for_gigatoken(tokenizer))
        if not isinstance(backend, Exception):
            encode = _gigatoken_encode(tokenizer, backend)
            return Encoder(
                name=f"gigatoken {version('gigatoken')}", encode=encode, is_reference=False
            )
        reason = f"gigatoken can't load {tokenizer.directory} ({one_line(backend)})"
    encode = partial(_reference_encode, tokenizer.here)
    return Encoder(
        name=f"tokenizers {version('tokenizers')}",
        encode=encode,
        is_reference=True,
        fallback_reason=reason,
    )


def decode_ids(tokenizer: LoadedTokenizer, ids: Ids, offsets: Offsets) -> pa.LargeStringArray:
    """The texts of documents, exact for a byte-level tokenizer: what isn't UTF-8 stays so, for
    the caller to find.
    """
    if tokenizer.token_bytes is None:
        rows = [ids[start:stop].tolist() for start, stop in itertools.pairwise(offsets.tolist())]
        texts = tokenizer.reference.decode_batch(rows, skip_special_tokens=False)
        return large_strings([text.encode() for text in texts])
    _, bounds, data = tokenizer.token_bytes.take(arrow_ids(ids)).buffers()
    text_offsets = np.frombuffer(bounds, np.int64)[offsets]
    return pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(text_offsets), data)


def reference_ids(tokenizer: LoadedTokenizer, text: str) -> Ids:
    """What the shards must hold for a text, end-of-document aside."""
    (ids,) = tokenizer.by_reference.encode([text])
    return np.array(ids, np.uint32)


def special_documents(tokenizer: LoadedTokenizer, ids: Ids, offsets: Offsets) -> dict[int, str]:
    """Documents whose text gave a special id, which no text may: their numbers, and what is
    wrong with each.
    """
    reasons: dict[int, str] = {}
    for of_no_text in tokenizer.ranges_of_no_text:
        if len(of_no_text) == 1:
            is_special = ids == of_no_text.start
        else:  # unsigned: what lies below the range is far above it then
            is_special = ids - np.uint32(of_no_text.start) < len(of_no_text)
        if not np.count_nonzero(is_special):
            continue
        places = np.flatnonzero(is_special)
        numbers = np.searchsorted(offsets, places, side="right") - 1
        for number, special in zip(numbers.tolist(), ids[places].tolist(), strict=True):
            token = tokenizer.name_of(special)
            problem = (
                f"its text gives the special token {token!r} (id {special}), which stands for no "
                "text"
            )
            reasons[number] = problem
    return reasons


def _gigatoken_encode(tokenizer: LoadedTokenizer, backend: Backend) -> Encode:
    """Arrow buffers in, flat ids out, no Python object per document.

    All threads share what is loaded. Inside, each of gigatoken's own threads keeps its own memory
    of words, and a batch is encoded by all that are free.
    """
    import awkward as ak

    def of_gigatoken(texts: pa.LargeStringArray) -> tuple[Ids, Offsets]:
        data = np.frombuffer(texts.buffers()[2], np.uint8)
        characters = ak.contents.NumpyArray(data, parameters={"__array__": "char"})
        bounds = ak.index.Index64(text_bounds(texts))
        strings = ak.contents.ListOffsetArray(
            bounds, characters, parameters={"__array__": "string"}
        )
        rows = backend.encode_batch(ak.Array(strings), parallel=True).layout
        return rows.content.data, rows.offsets.data

    def encode(texts: pa.LargeStringArray) -> Encoded:
        """Texts with characters of which the two may think differently are the reference's part."""
        numbers = tokenizer.doubtful.find(texts)
        encoded = of_gigatoken(texts)
        if not len(numbers):
            return encoded
        of_reference = _reference_encode(
            tokenizer.by_reference, texts.take(arrow_ids(numbers.astype(np.uint32)))
        )
        return _replaced(*encoded, numbers, of_reference)

    return encode


def _replaced(ids: Ids, offsets: Offsets, numbers: Offsets, others: Encoded) -> Encoded:
    """Ids and offsets of texts, some of which have other ids."""
    parts, lengths, done = [], np.diff(offsets), 0
    lengths[numbers] = np.diff(others[1])
    for number, start, stop in zip(
        numbers.tolist(), others[1][:-1].tolist(), others[1][1:].tolist(), strict=True
    ):
        parts += [ids[offsets[done] : offsets[number]], others[0][start:stop]]
        done = number + 1
    parts.append(ids[offsets[done] :])
    return np.concatenate(parts), np.append(0, np.cumsum(lengths))


def _reference_encode(reference: Reference, texts: pa.LargeStringArray) -> Encoded:
    """The same through `tokenizers`."""
    ids = [np.array(row, np.uint32) for row in reference.encode(texts.to_pylist())]
    return np.concatenate(ids), np.cumsum([0, *map(len, ids)])

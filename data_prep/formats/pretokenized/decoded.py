"""Documents of ids with the texts that they stand for, as a build takes them.

The ids are kept as they are; the texts are for the split, the counts and the proofs.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.errors import UserError
from data_prep.formats.documents import Documents, Reading, all_rows
from data_prep.formats.pretokenized.documents import ID_FORMATS, cut_ids, read_ids
from data_prep.formats.work_unit import Cutting, Range, WorkUnit
from data_prep.inputs.sources import InputFile
from data_prep.tokenizer.encode import Encoded, Ids, decode_ids, reference_ids
from data_prep.tokenizer.load import LoadedTokenizer


def cut(format: str, file: InputFile, cutting: Cutting) -> list[Range]:
    """Ranges of documents, found without reading the file's ids."""
    return cut_ids(file, format, cutting.eos_id, cutting.unit_bytes)


def read(unit: WorkUnit, given: Reading) -> Iterator[Documents]:
    """Documents in batches. Raises UserError for an id that the tokenizer can't have given."""
    tokenizer = given.tokenizer
    if tokenizer is None:
        raise UserError(f"{unit.url}: holds ids of a tokenizer, no text")
    special_ids = list(tokenizer.special_tokens.values())
    batches = read_ids(unit.files[0], unit.format, unit.start, unit.stop, tokenizer.eos_id)
    for ids, offsets in batches:
        largest = ids.max(initial=0)
        if largest >= tokenizer.vocab_size:
            raise UserError(
                f"{unit.url}: holds id {largest}, the tokenizer has {tokenizer.vocab_size:,}; "
                "name the one it is of"
            )
        encoded = ids, offsets
        is_special = np.isin(ids, special_ids)
        if is_special.any():
            if not ID_FORMATS[unit.format].spells_special_tokens:
                token = tokenizer.name_of(int(ids[is_special][0]))
                raise UserError(
                    f"{unit.url}: holds special token {token!r} within documents; tokenise it "
                    "without"
                )
            encoded = _as_ordinary_text(tokenizer, encoded, is_special)
        texts = decode_ids(tokenizer, *encoded)
        yield replace(all_rows(texts), encoded=encoded)


def _as_ordinary_text(
    tokenizer: LoadedTokenizer, encoded: Encoded, is_special: npt.NDArray[np.bool_]
) -> Encoded:
    """The documents, those with special ids inside encoded anew: what their texts spell is
    ordinary text to us.
    """
    ids, offsets = encoded
    documents = np.split(ids, offsets[1:-1])
    places = np.flatnonzero(is_special)
    numbers = np.unique(np.searchsorted(offsets, places, side="right") - 1)
    for number in numbers.tolist():
        text = _bytes_of(tokenizer, documents[number])
        # One that is not UTF-8 keeps its ids: it is a bad document, which the reader's caller
        # finds.
        with contextlib.suppress(UnicodeDecodeError):
            documents[number] = reference_ids(tokenizer, text.decode())
    lengths = [len(document) for document in documents]
    return np.concatenate(documents), np.append(0, np.cumsum(lengths))


def _bytes_of(tokenizer: LoadedTokenizer, ids: Ids) -> bytes:
    """What the ids of a document stand for."""
    text = decode_ids(tokenizer, ids, np.array([0, len(ids)]))
    content: bytes = text.cast(pa.large_binary())[0].as_py()
    return content

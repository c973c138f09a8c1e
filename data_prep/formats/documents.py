"""What the readers of all formats give: documents, batch by batch, and what is wrong with bad ones.

So memory does not grow with a unit. Texts travel as one Arrow array: flat UTF-8 bytes and offsets.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.errors import UserError
from data_prep.formats.first_bytes import FirstBytes
from data_prep.formats.flat_arrays import (
    Mask,
    Offsets,
    arrow_mask,
    bounds_of,
    byte_lengths,
    large_strings,
    null_mask,
)
from data_prep.inputs.sources import InputFile
from data_prep.tokenizer.encode import Encoded
from data_prep.tokenizer.load import LoadedTokenizer

BATCH_BYTES = 8 << 20  # of texts, more or less
MAX_DOCUMENT_BYTES = 128 << 20  # so much fits in memory
ANEW = "fetch or write it again"

Rows = npt.NDArray[np.uint64]
Reasons = list[tuple[int, str]]  # row and what is wrong with it


@dataclass(frozen=True, kw_only=True)
class Documents:
    """A batch of documents; a reader's may hold bad and empty ones, `without_bad` leaves none."""

    texts: pa.LargeStringArray
    rows: Rows  # row of each document, relative to its unit; a reader's to its batch
    rows_read: int  # rows this batch covers, blank lines and left out documents included
    empty: int = 0  # documents without text, left out
    bad: Reasons = field(default_factory=list)  # documents left out, and why
    # Of all rows, in the file or of their texts; 0 until `without_bad` counts those of the texts.
    row_bytes: int = 0
    bad_bytes: int = 0  # of those left out as bad
    encoded: Encoded | None = None  # the texts' ids, if the input holds ids
    file: int = 0  # of the unit's several files of JSON lines, the one that it is of
    rows_before: int = 0  # of the unit, in the files before


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a reader is told beside its unit."""

    tokenizer: LoadedTokenizer | None  # of whose ids the input may hold
    first_bytes: FirstBytes


def all_rows(column: Any) -> Documents:
    """A batch of all rows of an Arrow column."""
    texts = column.cast(pa.large_string())
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    return Documents(texts=texts, rows=np.arange(len(texts), dtype=np.uint64), rows_read=len(texts))


def some_rows(
    good: list[tuple[int, bytes]], bad: Reasons, bad_bytes: int, rows_read: int
) -> Documents:
    """A batch of the rows that could be read: the number and the UTF-8 of each."""
    texts = large_strings([text for _, text in good])
    rows = np.array([row for row, _ in good], np.uint64)
    return Documents(texts=texts, rows=rows, bad=bad, bad_bytes=bad_bytes, rows_read=rows_read)


def rows_of_a_batch(rows: int, size_bytes: int) -> int:
    """How many of some rows, of so many bytes together, make a batch: at least one."""
    return max(1, rows * BATCH_BYTES // max(size_bytes, BATCH_BYTES))


def without_bad(batch: Documents, text_field: str | None) -> Documents:
    """A reader's batch without its empty and bad documents; `bad` says which these are."""
    texts = batch.texts
    lengths = byte_lengths(texts)
    bad_texts = _bad_texts(texts, lengths, text_field)
    numbers = list(bad_texts)
    found = [(int(batch.rows[number]), reason) for number, reason in bad_texts.items()]
    keep = lengths > 0
    keep[numbers] = False
    return replace(
        _kept(batch, keep, batch.encoded),
        bad=sorted([*batch.bad, *found]),
        empty=int(np.count_nonzero(~keep)) - len(found),
        row_bytes=batch.row_bytes or int(lengths.sum()) + batch.bad_bytes,
        bad_bytes=batch.bad_bytes + int(lengths[numbers].sum()),
    )


def without(documents: Documents, reasons: dict[int, str], encoded: Encoded) -> Documents:
    """A batch with its ids, without documents that turned out bad.

    `reasons`: their numbers in the batch, and what is wrong with each.
    """
    keep = np.ones(len(documents.texts), np.bool_)
    keep[list(reasons)] = False
    found = [(int(documents.rows[number]), reason) for number, reason in reasons.items()]
    found_bytes = int(byte_lengths(documents.texts)[~keep].sum())
    return replace(
        _kept(documents, keep, encoded),
        bad=sorted([*documents.bad, *found]),
        bad_bytes=documents.bad_bytes + found_bytes,
    )


def _kept(documents: Documents, keep: Mask, encoded: Encoded | None) -> Documents:
    """Some documents of a batch, with their rows and ids."""
    if keep.all():
        return replace(documents, encoded=encoded)
    if encoded:
        ids, offsets = encoded
        counts = np.diff(offsets)
        encoded = ids[np.repeat(keep, counts)], bounds_of(counts[keep])
    return replace(
        documents,
        texts=documents.texts.filter(arrow_mask(keep)),
        rows=documents.rows[keep],
        encoded=encoded,
    )


def _bad_texts(
    texts: pa.LargeStringArray, lengths: Offsets, text_field: str | None
) -> dict[int, str]:
    """Number and reason of every text that is null, too long or not UTF-8."""
    reasons: dict[int, str] = {}
    for number in np.flatnonzero(null_mask(texts)).tolist():
        reasons[number] = f"{text_field!r} is null, expected text"
    for number in np.flatnonzero(lengths > MAX_DOCUMENT_BYTES).tolist():
        reasons[number] = too_long(int(lengths[number]))
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:  # it says that a text is not UTF-8, and not which
        for number, value in enumerate(texts.cast(pa.large_binary())):
            try:
                (value.as_py() or b"").decode()
            except UnicodeDecodeError as error:
                reasons[number] = f"invalid UTF-8 at byte {error.start}"
    return reasons


def too_long(size: int) -> str:
    """What is wrong with a document of too many bytes."""
    return (
        f"a document of {size / 1e6:,.0f} MB, expected at most {MAX_DOCUMENT_BYTES / 1e6:,.0f} MB"
    )


def check_column(file: InputFile, names: list[str], text_field: str | None) -> None:
    """Raises UserError if the text column is not among the columns."""
    if text_field not in names:
        columns = ", ".join(names)[:1000]
        raise UserError(
            f"{file.url}: no column {text_field!r}, it has: {columns}; set text_field to the "
            "text's column"
        )

"""Documents out of parquet, JSON lines, text, Arrow, CSV and what `datasets` saved, unit by unit.

Read by `unit_shards`, batch by batch, so that memory does not grow with a unit. Everything that can
be wrong with a document is found here, and reported with its file and row. Texts travel as one
Arrow array: flat UTF-8 bytes and offsets.
"""

import contextlib
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.building import work_units
from data_prep.building.work_units import WorkUnit, check_column, check_schema, open_parquet
from data_prep.errors import UserError, explained
from data_prep.formats import csv_records, json_lines
from data_prep.formats.first_bytes import (
    COMPRESSED_FORMATS,
    FIRST_BYTES,
    JSONL_FORMATS,
    check_first_bytes,
    refuse_nuls,
)
from data_prep.formats.flat_arrays import Offsets, arrow_mask, byte_lengths, null_mask
from data_prep.formats.json_lines import Reasons
from data_prep.formats.pretokenized import documents as pretokenized
from data_prep.formats.pretokenized.documents import MAX_DOCUMENT_BYTES
from data_prep.inputs.sources import InputFile, open_input, reading
from data_prep.tokenizer.encode import Encoded, Ids, LoadedTokenizer, decode_ids, reference_ids

BATCH_BYTES = 8 << 20
BATCH_RECORDS = 512  # of CSV, whatever their size
ANEW = "fetch or write it again"
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream of record batches


@dataclass(frozen=True, kw_only=True)
class Documents:
    """A batch of documents, none of them empty."""

    texts: pa.LargeStringArray
    rows: npt.NDArray[np.uint64]  # row of each document, relative to its unit
    rows_read: int  # rows this batch covers, blank lines and left out documents included
    empty: int = 0  # documents without text, left out
    bad: Reasons = field(default_factory=list)  # documents left out, and why
    # of all rows, in the file or of their texts; 0 until `clean` counts those of the texts
    row_bytes: int = 0
    bad_bytes: int = 0  # of those left out as bad
    encoded: Encoded | None = None  # the texts' ids, if the input holds ids
    file: int = 0  # of the unit's several files of JSON lines, the one that it is of
    rows_before: int = 0  # of the unit, in the files before


def read_documents(unit: WorkUnit, tokenizer: LoadedTokenizer | None = None) -> Iterator[Documents]:
    """The documents of a unit, batch by batch, in order; ids are decoded. Raises UserError at
    the first bad one.
    """
    check_unchanged(unit)
    rows_before = 0
    for number, part in enumerate(unit.parts()):
        row = 0
        for batch in _batches(part, tokenizer):
            documents = clean(part, batch, row)
            row += batch.rows_read
            if number:
                rows = documents.rows + np.uint64(rows_before)
                bad = [(at + rows_before, reason) for at, reason in documents.bad]
                documents = replace(
                    documents, rows=rows, bad=bad, file=number, rows_before=rows_before
                )
            yield documents
        rows_before += row


def _batches(unit: WorkUnit, tokenizer: LoadedTokenizer | None) -> Iterator[Documents]:
    """What a unit holds, bad documents and empty ones included."""
    if tokenizer and unit.format in pretokenized.FORMATS:
        return _read_ids(unit, tokenizer)
    readers = {
        "parquet": _read_parquet, "txt": _read_text, "arrow": _read_arrow, "csv": _read_csv,
        "save_to_disk": _read_saved,
    }  # fmt: skip
    return readers.get(unit.format, _read_jsonl)(unit)


def clean(unit: WorkUnit, batch: Documents, row: int) -> Documents:
    """A batch without its empty documents, and without bad ones, or an error at the first; `row`
    is its first.
    """
    texts = batch.texts
    lengths = byte_lengths(texts)
    bad_texts = dict(_bad_texts(texts, lengths, unit.text_field))
    found = {int(batch.rows[i]): reason for i, reason in bad_texts.items()}
    row_bytes = batch.row_bytes or int(lengths.sum()) + batch.bad_bytes
    bad_bytes = batch.bad_bytes + int(lengths[list(bad_texts)].sum())
    bad = sorted([*batch.bad, *found.items()])
    if bad and not unit.skip_bad:
        at, reason = bad[0]
        raise refusal(unit, row + at, reason)
    keep = (lengths > 0) & ~np.isin(batch.rows, np.fromiter(found, np.uint64))
    if not keep.all():
        texts = texts.filter(arrow_mask(keep))
    encoded = batch.encoded
    if encoded:
        id_counts = np.diff(encoded[1])
        encoded = encoded[0][np.repeat(keep, id_counts)], np.append(0, np.cumsum(id_counts[keep]))
    return replace(
        batch,
        texts=texts,
        rows=batch.rows[keep] + np.uint64(row),
        bad=[(row + at, reason) for at, reason in bad],
        empty=int(np.count_nonzero(~keep)) - len(found),
        encoded=encoded,
        row_bytes=row_bytes,
        bad_bytes=bad_bytes,
    )


def refusal(unit: WorkUnit, row: int, reason: str) -> UserError:
    """The error of a bad document, which names its file and row."""
    advice = "mend or remove it, or have build_shards skip it (on_bad_document: skip)"
    return UserError(f"{place(unit, row)}: {reason}; {advice}")


def without(documents: Documents, reasons: dict[int, str], encoded: Encoded) -> Documents:
    """A batch with its ids, without documents that turned out bad: their numbers in the batch,
    and why.
    """
    keep = np.ones(len(documents.texts), np.bool_)
    keep[list(reasons)] = False
    ids, offsets = encoded
    counts = np.diff(offsets)
    kept = ids[np.repeat(keep, counts)], np.append(0, np.cumsum(counts[keep]))
    found = [(int(documents.rows[number]), reason) for number, reason in reasons.items()]
    bad_bytes = documents.bad_bytes + int(byte_lengths(documents.texts)[~keep].sum())
    return replace(
        documents,
        texts=documents.texts.filter(arrow_mask(keep)),
        rows=documents.rows[keep],
        encoded=kept,
        bad=sorted([*documents.bad, *found]),
        bad_bytes=bad_bytes,
    )


def check_unchanged(unit: WorkUnit) -> None:
    """A file that became shorter or longer since it was cut would lose documents, or parts of
    them: a UserError.
    """
    for file in unit.files:
        is_elsewhere = "://" in file.url or unit.format == "save_to_disk"
        with reading(file):
            size = file.size if is_elsewhere else Path(file.url).stat().st_size
        if size != file.size:
            listed = f"{size:,} bytes, {file.size:,} when it was listed"
            raise UserError(
                f"{file.url}: {listed}; see that nothing writes to it, and run the command again"
            )


def _bad_texts(
    texts: pa.LargeStringArray, lengths: Any, text_field: str | None
) -> Iterator[tuple[int, str]]:
    """Position and reason of every text that is null, too long or not UTF-8."""
    for i in np.flatnonzero(null_mask(texts)).tolist():
        yield i, f"{text_field!r} is null, expected text"
    for i in np.flatnonzero(lengths > MAX_DOCUMENT_BYTES).tolist():
        yield i, _too_long(lengths[i])
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        for i, value in enumerate(texts.cast(pa.large_binary())):
            try:
                (value.as_py() or b"").decode()
            except UnicodeDecodeError as error:
                yield i, f"invalid UTF-8 at byte {error.start}"


def _too_long(size: int) -> str:
    return (
        f"a document of {size / 1e6:,.0f} MB, expected at most {MAX_DOCUMENT_BYTES / 1e6:,.0f} MB"
    )


def place(unit: WorkUnit, row: int) -> str:
    """File and row, or line, of a row of a unit, for a message."""
    if unit.format == "txt":
        return unit.files[row].url
    if unit.format == "parquet":
        metadata = open_parquet(unit.files[0], unit.text_field).metadata
        return (
            f"{unit.url}: row "
            f"{row + sum(metadata.row_group(i).num_rows for i in range(unit.start))}"
        )
    if unit.format == "jsonl":
        with open_input(unit.files[0]) as stream:
            row += json_lines.count_newlines(stream, unit.start)
    if unit.format == "uint16":
        return f"{unit.url}: document {row} behind id {unit.start:,}"
    return (
        f"{unit.url}: line {row + 1}"
        if unit.format in JSONL_FORMATS
        else f"{unit.url}: row {unit.start + row}"
    )


def _read_parquet(unit: WorkUnit) -> Iterator[Documents]:
    """A few row groups at a time; a large one in parts."""
    file = open_parquet(unit.files[0], unit.text_field)
    all_groups = range(unit.start, unit.stop)
    for start, stop, size in work_units.row_group_runs(
        file, all_groups, unit.text_field, BATCH_BYTES
    ):
        numbers = range(start, stop)
        rows = sum(file.metadata.row_group(number).num_rows for number in numbers)
        batch_rows = max(1, rows * BATCH_BYTES // max(size, BATCH_BYTES))
        with explained(
            (pa.ArrowException, OSError),
            f"{unit.url}: row groups {start} to {stop - 1}: damaged",
            ANEW,
        ):
            for batch in file.iter_batches(
                batch_rows, list(numbers), [unit.text_field], use_threads=False
            ):
                yield all_rows(batch.column(0))


def all_rows(column: Any) -> Documents:
    """A batch of all rows of a column."""
    texts = column.cast(pa.large_string())
    texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    return Documents(texts=texts, rows=np.arange(len(texts), dtype=np.uint64), rows_read=len(texts))


def _some_rows(
    good: list[tuple[int, bytes]], bad: Reasons, bad_bytes: int, rows_read: int
) -> Documents:
    """A batch of the rows that could be read."""
    texts, rows = json_lines.arrow_texts(good)
    return Documents(texts=texts, rows=rows, bad=bad, bad_bytes=bad_bytes, rows_read=rows_read)


def _read_text(unit: WorkUnit) -> Iterator[Documents]:
    """A file is a document."""
    for start, stop, _ in work_units.runs_within((file.size for file in unit.files), BATCH_BYTES):
        good, bad, bad_bytes = [], [], 0
        for row, file in enumerate(unit.files[start:stop]):
            if file.size > MAX_DOCUMENT_BYTES:
                bad.append((row, _too_long(file.size)))
                bad_bytes += file.size
                continue
            with reading(file), open_input(file) as stream:
                good.append((row, stream.read()))
            check_first_bytes(file, unit.format, good[-1][1][:FIRST_BYTES])
            refuse_nuls(file, good[-1][1])
        yield _some_rows(good, bad, bad_bytes, stop - start)


def _read_jsonl(unit: WorkUnit) -> Iterator[Documents]:
    """A block of lines at a time."""
    row = 0
    try:
        with open_input(unit.files[0]) as stream:
            chunks = json_lines.read_chunks(stream, unit.format, unit.start, unit.stop)
            if unit.format in COMPRESSED_FORMATS:
                chunks = _checked_inside(unit.files[0], unit.format, chunks)
            for block in json_lines.blocks(chunks, BATCH_BYTES):
                texts, rows, bad = json_lines.parse_block(
                    block, unit.text_field or "", row + unit.start == 0
                )
                lines = json_lines.count_lines(block)
                bad_bytes = json_lines.bytes_of_lines(block, [line for line, _ in bad])
                yield Documents(
                    texts=texts,
                    rows=rows,
                    rows_read=lines,
                    bad=bad,
                    row_bytes=len(block),
                    bad_bytes=bad_bytes,
                )
                row += lines
    except json_lines.DAMAGED as error:
        where = place(unit, row - 1).replace(": line ", ": damaged after line ")
        raise UserError(f"{where} ({error}); fetch or write it again") from None


def _checked_inside(file: InputFile, format: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The bytes that a compressed file holds; a UserError if they begin as those of another kind
    of file do.
    """
    first, is_checked = b"", False
    for chunk in chunks:
        if not is_checked:
            first += chunk
            if is_checked := len(first) >= FIRST_BYTES:
                check_first_bytes(file, format, first, inside=True)
        yield chunk
    if not is_checked:
        check_first_bytes(file, format, first, inside=True)


def _read_arrow(unit: WorkUnit) -> Iterator[Documents]:
    """A record batch at a time, a large one in parts, of a file in Arrow's stream or file
    format.
    """
    kinds = (pa.ArrowException, OSError, EOFError, MemoryError, OverflowError, ValueError)
    with explained(kinds, f"{unit.url}: damaged", ANEW), open_input(unit.files[0]) as stream:
        is_file = stream.read(6) == b"ARROW1"
        if not is_file:
            stream.seek(-len(ARROW_END), io.SEEK_END)
            if stream.read() != ARROW_END:
                raise EOFError("the stream of record batches ends early")
        stream.seek(0)
        reader = pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)
        check_schema(unit.files[0], reader.schema, unit.text_field)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            column = batch.column(reader.schema.names.index(unit.text_field))
            column.validate()
            is_plain = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
            (column.cast(pa.large_binary()) if is_plain else column).validate(full=True)
            rows = max(1, len(column) * BATCH_BYTES // max(column.nbytes, BATCH_BYTES))
            for at in range(0, len(column), rows):
                yield all_rows(column.slice(at, rows))


def _read_csv(unit: WorkUnit) -> Iterator[Documents]:
    """Records of a file with a header; the first after the header is row 0."""
    file = unit.files[0]
    with reading(file), open_input(file) as stream:
        records = csv_records.read_records(stream, file.url, MAX_DOCUMENT_BYTES)
        header = next(records, [])
        check_column(file, header, unit.text_field)
        if header.count(unit.text_field or "") > 1:
            problem = (
                f"{header.count(unit.text_field or '')} columns of its header are named "
                f"{unit.text_field!r}"
            )
            raise UserError(f"{file.url}: {problem}; rename all but the one that holds the text")
        column = header.index(unit.text_field or "")
        while batch := list(itertools.islice(records, BATCH_RECORDS)):
            good: list[tuple[int, bytes]] = []
            bad: Reasons = []
            bad_bytes = 0
            for row, record in enumerate(batch):
                if len(record) == len(header):
                    good.append((row, record[column].encode(errors="surrogateescape")))
                elif record:
                    bad.append(
                        (row, f"a record of {len(record)} fields, the header has {len(header)}")
                    )
                    bad_bytes += sum(
                        len(field.encode(errors="surrogateescape")) for field in record
                    )
            yield _some_rows(good, bad, bad_bytes, len(batch))


def _read_ids(unit: WorkUnit, tokenizer: LoadedTokenizer) -> Iterator[Documents]:
    """Documents that are ids already, and the texts that they stand for."""
    file, special_ids = unit.files[0], list(tokenizer.special_tokens.values())
    for ids, offsets in pretokenized.read_ids(
        file, unit.format, unit.start, unit.stop, tokenizer.eos_id
    ):
        if len(ids) and ids.max() >= (size := tokenizer.vocab_size):
            raise UserError(
                f"{unit.url}: holds id {ids.max()}, the tokenizer has {size:,}; name the one it "
                "is of"
            )
        is_special = np.isin(ids, special_ids)
        if is_special.any() and unit.format in pretokenized.SPELLING_FORMATS:
            ids, offsets = _as_ordinary_text(tokenizer, ids, offsets, is_special)
        elif is_special.any():
            token = tokenizer.name_of(int(ids[is_special][0]))
            raise UserError(
                f"{unit.url}: holds special token {token!r} within documents; tokenise it without"
            )
        yield replace(all_rows(decode_ids(tokenizer, ids, offsets)), encoded=(ids, offsets))


def _as_ordinary_text(
    tokenizer: LoadedTokenizer, ids: Ids, offsets: Offsets, is_special: npt.NDArray[np.bool_]
) -> Encoded:
    """The documents, those with special ids inside encoded anew: what their texts spell is
    ordinary text to us.
    """
    documents = np.split(ids, offsets[1:-1])
    numbers = np.unique(np.searchsorted(offsets, np.flatnonzero(is_special), side="right") - 1)
    for number in numbers.tolist():
        own = documents[number]
        text = (
            decode_ids(tokenizer, own, np.array([0, len(own)])).cast(pa.large_binary())[0].as_py()
        )
        with contextlib.suppress(UnicodeDecodeError):  # a bad document, as `clean` finds
            documents[number] = reference_ids(tokenizer, text.decode())
    return np.concatenate(documents), np.append(0, np.cumsum([len(own) for own in documents]))


def _read_saved(unit: WorkUnit) -> Iterator[Documents]:
    """Rows of a data set that `datasets` saved, in its order."""
    saved = work_units.load_from_disk(unit.files[0])
    check_schema(unit.files[0], saved.features.arrow_schema, unit.text_field)
    rows = unit.stop - unit.start
    # its exceptions have no base
    with explained(Exception, f"{unit.url}: datasets can't read it", "save it again"):
        part = (
            saved.select(range(unit.start, unit.stop))
            .select_columns([unit.text_field])
            .with_format("arrow")
        )
        for table in part.iter(max(1, min(1000, rows * BATCH_BYTES // max(unit.size_bytes, 1)))):
            yield all_rows(table.column(0))

"""Documents out of parquet, JSON lines (plain, gzip, zstd) and text files, cut into work units.

First stage of `build_shards`. A unit is a run of row groups, a range of bytes cut at line ends, or a
whole file; it is read on its own, so that any rank can take any unit. Everything that can be wrong with
a document is found here, and reported with its file and row. Texts never become Python strings on
the parquet route; everywhere they travel as one Arrow array (flat UTF-8 bytes and offsets).
"""

import glob
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard

from data_prep.errors import UserError

UNIT_BYTES = 64 << 20
BATCH_BYTES = 16 << 20
READ_BYTES = 1 << 20
FORMATS = ("parquet", "jsonl", "jsonl.gz", "jsonl.zst", "txt")


@dataclass(frozen=True, kw_only=True)
class WorkUnit:
    """A part of one input file that becomes at most one shard per split."""

    source: str
    name: str
    path: Path
    input: str  # the file as the mixture names it
    format: str
    text_field: str | None
    start: int  # first row group (parquet) or byte
    stop: int
    size_bytes: int  # text column as stored in the file; what progress and the balance of ranks go by


@dataclass(frozen=True, kw_only=True)
class Documents:
    """A batch of documents, none of them empty."""

    texts: pa.LargeStringArray
    rows: npt.NDArray[np.uint64]  # row of each document, relative to its unit
    rows_read: int  # rows this batch covers, blank lines and empty documents included
    empty: int  # documents without text, left out
    input_bytes: int  # part of the unit's size_bytes that this batch took


def find_files(base: Path, pattern: str, where: str) -> list[str]:
    """The files that a path or glob names, sorted, each written as the pattern is (relative to `base`)."""
    if (base / pattern).is_file():
        return [pattern]
    if (base / pattern).is_dir():
        raise UserError(f"{where}: {pattern} is a directory; name its files, for example {pattern.rstrip('/')}/*")
    found = glob.glob(pattern, root_dir=base, recursive=True)
    files = sorted({name for name in found if (base / name).is_file()})
    if not files:
        raise UserError(f"{where}: no file matches {pattern} (looked in {base.resolve()}); check the path")
    return files


def cut_units(
    base: Path, files: list[str], *, source: str, format: str, text_field: str | None, unit_bytes: int = UNIT_BYTES
) -> list[WorkUnit]:
    """Cut a source's files into work units; a function of the files alone."""
    units = []
    for order, name in enumerate(files):
        path = base / name
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", path.name.split(".")[0])[:60]
        for number, (start, stop, size) in enumerate(_ranges(path, format, text_field, unit_bytes)):
            units.append(
                WorkUnit(
                    source=source, name=f"{order:05d}-{stem}-{number:05d}", path=path, input=name, format=format,
                    text_field=text_field, start=start, stop=stop, size_bytes=size,
                )
            )  # fmt: skip
    return units


def read_documents(unit: WorkUnit) -> Iterator[Documents]:
    """The documents of a unit, batch by batch, in order. Raises UserError at the first bad one."""
    if unit.format == "parquet":
        return _read_parquet(unit)
    return _read_text(unit) if unit.format == "txt" else _read_jsonl(unit)


def _ranges(path: Path, format: str, text_field: str | None, unit_bytes: int) -> list[tuple[int, int, int]]:
    """(start, stop, bytes) of the units of a file."""
    try:
        if format == "parquet":
            file = _open_parquet(path, text_field)
            return _row_group_runs(file, range(file.metadata.num_row_groups), text_field, unit_bytes)
        size = path.stat().st_size
        cuts = _line_cuts(path, size, unit_bytes) if format == "jsonl" else [0, size]
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}); check the file") from None
    return [(start, stop, stop - start) for start, stop in itertools.pairwise(cuts)]


def _line_cuts(path: Path, size: int, unit_bytes: int) -> list[int]:
    """Byte offsets at line starts, about unit_bytes apart, from 0 to the size of the file."""
    cuts = [0]
    with path.open("rb") as file:
        while cuts[-1] + unit_bytes < size:
            file.seek(cuts[-1] + unit_bytes - 1)
            while (part := file.readline(READ_BYTES)) and not part.endswith(b"\n"):
                pass
            cuts.append(file.tell())
    return cuts if cuts[-1] == size and len(cuts) > 1 else [*cuts, size]


def _row_group_runs(
    file: pq.ParquetFile, groups: range, text_field: str | None, limit_bytes: int
) -> list[tuple[int, int, int]]:
    """Runs of row groups (start, stop, bytes) within limit_bytes; a larger row group is a run by itself."""
    runs: list[tuple[int, int, int]] = []
    for group in groups:
        size = _column_bytes(file, group, text_field)
        if runs and runs[-1][2] + size <= limit_bytes:
            runs[-1] = (runs[-1][0], group + 1, runs[-1][2] + size)
        else:
            runs.append((group, group + 1, size))
    return runs


def _column_bytes(file: pq.ParquetFile, group: int, text_field: str | None) -> int:
    """Uncompressed bytes of the text column in one row group."""
    row_group = file.metadata.row_group(group)
    columns = (row_group.column(i) for i in range(row_group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_field)


def _open_parquet(path: Path, text_field: str | None) -> pq.ParquetFile:
    """Open a parquet file and check that its text column is there and holds text."""
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error}); fetch or write it again") from None
    if text_field not in schema.names:
        columns = ", ".join(schema.names)
        raise UserError(f"{path}: no column {text_field!r}, it has: {columns}; set text_field to the text's column")
    type_ = schema.field(text_field).type
    value_type = type_.value_type if pa.types.is_dictionary(type_) else type_
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(check(value_type) for check in is_text):
        raise UserError(f"{path}: column {text_field!r} is of type {type_}, expected string; set text_field")
    return file


def _read_parquet(unit: WorkUnit) -> Iterator[Documents]:
    """A few row groups at a time."""
    file = _open_parquet(unit.path, unit.text_field)
    groups_before = (file.metadata.row_group(i).num_rows for i in range(unit.start))
    first_row, row = sum(groups_before), 0
    for start, stop, size in _row_group_runs(file, range(unit.start, unit.stop), unit.text_field, BATCH_BYTES):
        try:
            column = file.read_row_groups(range(start, stop), columns=[unit.text_field]).column(0)
        except (pa.ArrowException, OSError) as error:
            where = f"{unit.path}: row groups {start} to {stop - 1}"
            raise UserError(f"{where}: damaged ({error}); fetch or write it again") from None
        texts = pa.chunked_array(column.cast(pa.large_string()).chunks, pa.large_string()).combine_chunks()
        _check_texts(unit, texts, first_row + row)
        yield _documents(texts, row, len(texts), size)
        row += len(texts)


def _check_texts(unit: WorkUnit, texts: pa.LargeStringArray, first_row: int) -> None:
    """No nulls, valid UTF-8."""
    if texts.null_count:
        row = first_row + pc.index(texts.is_null(), True).as_py()
        raise UserError(f"{unit.path}: row {row}: {unit.text_field!r} is null, expected text; remove that row")
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        for row, value in enumerate(texts.cast(pa.large_binary())):
            _decode(value.as_py(), f"{unit.path}: row {first_row + row}")
        raise


def _documents(texts: pa.LargeStringArray, first_row: int, rows_read: int, input_bytes: int) -> Documents:
    """A batch whose documents lie in consecutive rows, without the empty ones."""
    rows = np.arange(first_row, first_row + len(texts), dtype=np.uint64)
    filled = pc.greater(pc.binary_length(texts), 0)
    empty = len(texts) - (pc.sum(filled).as_py() or 0)
    if empty:
        texts, rows = texts.filter(filled), rows[filled.to_numpy(zero_copy_only=False)]
    return Documents(texts=texts, rows=rows, rows_read=rows_read, empty=empty, input_bytes=input_bytes)


def _read_text(unit: WorkUnit) -> Iterator[Documents]:
    """One file, one document."""
    try:
        content = unit.path.read_bytes()
    except OSError as error:
        raise UserError(f"{unit.path}: can't be read ({error.strerror}); check the file") from None
    _decode(content, str(unit.path))
    yield _documents(_arrow_texts([content]), 0, 1, unit.size_bytes)


def _read_jsonl(unit: WorkUnit) -> Iterator[Documents]:
    """Line by line, blank ones skipped; a batch whenever BATCH_BYTES of text have come together."""
    texts: list[bytes] = []
    rows: list[int] = []
    size, line_number, first_row, taken = 0, -1, 0, 0
    try:
        with unit.path.open("rb") as file:
            file.seek(unit.start)
            for line_number, line in enumerate(_lines(_chunks(file, unit))):
                if line and not line.isspace():
                    texts.append(_parse_line(unit, line_number, line))
                    rows.append(line_number)
                    size += len(texts[-1])
                if size >= BATCH_BYTES:
                    position = file.tell() - unit.start
                    yield _jsonl_batch(texts, rows, line_number + 1 - first_row, position - taken)
                    texts, rows, size, first_row, taken = [], [], 0, line_number + 1, position
    except (OSError, zlib.error, zstandard.ZstdError) as error:
        where = f"{unit.path}: damaged after line {_absolute_line(unit, line_number)}"
        raise UserError(f"{where} ({error}); fetch or write it again") from None
    yield _jsonl_batch(texts, rows, line_number + 1 - first_row, unit.size_bytes - taken)


def _jsonl_batch(texts: list[bytes], rows: list[int], rows_read: int, input_bytes: int) -> Documents:
    kept = [i for i, text in enumerate(texts) if text]
    return Documents(
        texts=_arrow_texts([texts[i] for i in kept]),
        rows=np.array([rows[i] for i in kept], np.uint64),
        rows_read=rows_read,
        empty=len(texts) - len(kept),
        input_bytes=input_bytes,
    )


def _arrow_texts(texts: list[bytes]) -> pa.LargeStringArray:
    """One Arrow array out of UTF-8 byte strings."""
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)))


def _parse_line(unit: WorkUnit, line_number: int, line: bytes) -> bytes:
    """The text of one line of JSON, as UTF-8."""
    problem = ""
    try:
        is_first = line_number == 0 and unit.start == 0
        record = json.loads(line.decode("utf-8-sig" if is_first else "utf-8"))  # a file may begin with a BOM
    except UnicodeDecodeError as error:
        problem = f"invalid UTF-8 at byte {error.start} of the line; convert the file to UTF-8"
    except (ValueError, RecursionError) as error:
        problem = f"not valid JSON ({error}); fix or remove the line"
    else:
        if not isinstance(record, dict):
            problem = f"a JSON {type(record).__name__}, expected an object with the field {unit.text_field!r}"
        elif unit.text_field not in record:
            problem = f"no field {unit.text_field!r}, it has: {', '.join(record)}; set text_field or fix the line"
        elif not isinstance(text := record[unit.text_field], str):
            got = "null" if text is None else f"of type {type(text).__name__}"
            problem = f"{unit.text_field!r} is {got}, expected text; fix or remove the line"
        else:
            try:
                return text.encode()
            except UnicodeEncodeError as error:
                problem = f"half a surrogate pair at character {error.start} is not valid Unicode; fix the line"
    raise UserError(f"{unit.path}: line {_absolute_line(unit, line_number)}: {problem}")


def _absolute_line(unit: WorkUnit, line_number: int) -> int:
    """Number of a unit's line in its file, from 1."""
    if unit.format != "jsonl":
        return line_number + 1
    before, left = 0, unit.start
    with unit.path.open("rb") as file:
        while left and (chunk := file.read(min(READ_BYTES, left))):
            before += chunk.count(b"\n")
            left -= len(chunk)
    return before + line_number + 1


def _decode(content: bytes, where: str) -> None:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: invalid UTF-8 at byte {error.start}; convert it to UTF-8 or leave it out") from None


def _chunks(file: BinaryIO, unit: WorkUnit) -> Iterator[bytes]:
    """The unit's bytes, decompressed."""
    if unit.format == "jsonl.gz":
        return _decompress(file, lambda: zlib.decompressobj(wbits=31))
    if unit.format == "jsonl.zst":
        return _decompress(file, lambda: zstandard.ZstdDecompressor().decompressobj())
    sizes = (min(READ_BYTES, unit.stop - at) for at in range(unit.start, unit.stop, READ_BYTES))
    return (file.read(size) for size in sizes)


def _decompress(file: BinaryIO, new_stream: Callable[[], Any]) -> Iterator[bytes]:
    """One compressed stream after the other; a stream that ends early is an OSError."""
    stream, inside = new_stream(), False
    while chunk := file.read(READ_BYTES):
        while chunk := chunk if inside else chunk.lstrip(b"\0"):
            inside = True
            yield stream.decompress(chunk)
            chunk = stream.unused_data if stream.eof else b""
            if stream.eof:
                stream, inside = new_stream(), False
    if inside or not os.fstat(file.fileno()).st_size:
        raise OSError("the compressed stream ends early")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their ends; the last one needs none."""
    parts: list[bytes] = []
    for chunk in chunks:
        head, newline, tail = chunk.partition(b"\n")
        parts.append(head)
        if newline:
            first, *lines = (b"".join(parts) + newline + tail).split(b"\n")
            parts = [lines.pop()]
            yield first
            yield from lines
    if last := b"".join(parts):
        yield last

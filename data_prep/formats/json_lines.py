"""JSON lines, plain, gzip or zstd: a line is a document.

A plain file is cut at line ends; a compressed one is a unit.

A block of lines goes through Arrow's parser, which makes no Python object of a line. Where that one
is not content, or where it might take two lines for one object or one line for two, the block is
read line by line, and each bad line gets its reason. Both ways keep the same lines and read the
same text in them, with one exception that no real file holds: a field beside the text, nested
deeper than Python's recursion limit, is bad line by line only.
"""

import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.json
import zstandard

from data_prep.errors import UserError
from data_prep.formats import documents
from data_prep.formats.documents import ANEW, Documents, Reading, Reasons, Rows
from data_prep.formats.first_bytes import FIRST_BYTES, FirstBytes
from data_prep.formats.flat_arrays import large_strings
from data_prep.formats.work_unit import Cutting, Range, WorkUnit
from data_prep.inputs.sources import InputFile, open_input, reading

SEARCH_BYTES = 256 << 10  # in pieces of so many a line's end is looked for
READ_BYTES = 1 << 20
COMPRESSED_BYTES = 4 << 10  # read at a time: in zstd it may stand for 128 MiB
MAX_LINE_BYTES = 256 << 20
MANY_NULS = 8  # of a line: fewer may be a writer's mistake within a text
TOO_LONG = b"\0too long"  # takes the place of a longer line; no JSON holds a NUL
LONGEST_NAMES = 200  # characters of a bad line's own names in a message
DAMAGED = (OSError, EOFError, zlib.error, zstandard.ZstdError)  # what a broken stream raises
DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "jsonl.gz": lambda: zlib.decompressobj(wbits=31),
    "jsonl.zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
}
JSONL_FORMATS = ("jsonl", *DECOMPRESSORS)


class BadLineError(Exception):
    """What is wrong with a line."""


class Parsed(NamedTuple):
    """What a block of lines holds."""

    texts: pa.LargeStringArray
    rows: Rows  # the line of each text, from 0
    bad: Reasons  # lines


def cut(file: InputFile, cutting: Cutting) -> list[Range]:
    """Ranges of bytes of a plain file, cut at line ends."""
    with reading(file), open_input(file, SEARCH_BYTES) as stream:
        cutting.first_bytes.check(file, stream.read(FIRST_BYTES))
        cuts = line_cuts(stream, file.size, cutting.unit_bytes)
    return [Range(start, stop, stop - start) for start, stop in itertools.pairwise(cuts)]


def line_cuts(stream: BinaryIO, size: int, unit_bytes: int) -> list[int]:
    """Byte offsets at line starts, about unit_bytes apart, from 0 to the size of the file."""
    cuts = [0]
    while cuts[-1] + unit_bytes < size:
        # One byte earlier: that byte may be the line's end.
        stream.seek(cuts[-1] + unit_bytes - 1)
        is_at_end = False
        while not is_at_end:  # in parts: a line may be longer than memory
            part = stream.readline(READ_BYTES)
            is_at_end = not part or part.endswith(b"\n")
        cuts.append(stream.tell())
    if cuts[-1] != size or len(cuts) == 1:
        cuts.append(size)
    return cuts


def read(unit: WorkUnit, given: Reading) -> Iterator[Documents]:
    """A block of lines at a time."""
    file = unit.files[0]
    row = 0
    try:
        with open_input(file) as stream:
            chunks = read_chunks(stream, unit.format, unit.start, unit.stop)
            if unit.format in DECOMPRESSORS:
                chunks = _checked_inside(file, chunks, given.first_bytes)
            for block in blocks(chunks, documents.BATCH_BYTES):
                begins_file = row + unit.start == 0
                batch = _documents(block, unit.text_field or "", begins_file)
                yield batch
                row += batch.rows_read
    except DAMAGED as error:
        where = place(unit, row - 1).replace(": line ", ": damaged after line ")
        raise UserError(f"{where} ({error}); {ANEW}") from None


def place(unit: WorkUnit, row: int) -> str:
    """Where a row of a unit lies, for a message: its line in the file."""
    lines_before = 0
    if unit.format not in DECOMPRESSORS:
        with open_input(unit.files[0]) as stream:
            lines_before = count_newlines(stream, unit.start)
    return f"{unit.url}: line {lines_before + row + 1}"


def _documents(block: bytes, field: str, begins_file: bool) -> Documents:
    """The batch that a block of lines makes."""
    texts, rows, bad = parse_block(block, field, begins_file)
    return Documents(
        texts=texts,
        rows=rows,
        rows_read=count_lines(block),
        bad=bad,
        row_bytes=len(block),
        bad_bytes=bytes_of_lines(block, [line for line, _ in bad]),
    )


def _checked_inside(
    file: InputFile, chunks: Iterator[bytes], first_bytes: FirstBytes
) -> Iterator[bytes]:
    """The bytes that a compressed file holds.

    Raises UserError if they begin as those of another kind of file do.
    """
    first = b""
    for chunk in chunks:
        if len(first) < FIRST_BYTES:
            first += chunk
            if len(first) >= FIRST_BYTES:
                first_bytes.check_inside(file, first)
        yield chunk
    if len(first) < FIRST_BYTES:
        first_bytes.check_inside(file, first)


def read_chunks(stream: BinaryIO, format: str, start: int, stop: int) -> Iterator[bytes]:
    """The bytes of a stream: from start to stop; of a compressed one all, decompressed."""
    if format in DECOMPRESSORS:
        yield from _decompress(stream, DECOMPRESSORS[format])
        return
    stream.seek(start)
    while start < stop:
        chunk = stream.read(min(READ_BYTES, stop - start))
        if not chunk:
            raise OSError(f"the file ends at byte {start:,} of {stop:,}")
        start += len(chunk)
        yield chunk


def _decompress(stream: BinaryIO, new_decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """One compressed stream after the other; a stream that ends early is an OSError."""
    decompressor = new_decompressor()
    is_inside = False  # of a stream
    is_empty = True
    while chunk := stream.read(COMPRESSED_BYTES):
        while chunk:
            if not is_inside:
                chunk = chunk.lstrip(b"\0")  # tapes fill up with NULs between streams
                if not chunk:
                    break
            is_inside = True
            is_empty = False
            yield decompressor.decompress(chunk)
            chunk = b""
            if decompressor.eof:
                chunk = decompressor.unused_data
                decompressor = new_decompressor()
                is_inside = False
    if is_inside or is_empty:
        raise OSError("the compressed stream ends early")


def blocks(chunks: Iterator[bytes], block_bytes: int) -> Iterator[bytes]:
    """The same bytes in blocks of whole lines, about block_bytes each.

    A line that is too long becomes TOO_LONG.

    What broke the stream is raised after the whole lines before it.
    """
    block = bytearray()  # whole lines
    begun = bytearray()  # what is there of the next line
    try:
        for chunk in chunks:
            head, newline, rest = chunk.partition(b"\n")
            begun += head
            del begun[MAX_LINE_BYTES + 1 :]  # so much tells that it is too long
            if newline:
                end = rest.rfind(b"\n") + 1
                block += _not_too_long(begun) + newline + rest[:end]
                begun[:] = rest[end:]
            if len(block) >= block_bytes:
                yield bytes(block)
                block.clear()
    except DAMAGED:
        if block:
            yield bytes(block)
        raise
    if block or begun:
        yield bytes(block + _not_too_long(begun))


def _not_too_long(line: bytearray) -> bytes | bytearray:
    return TOO_LONG if len(line) > MAX_LINE_BYTES else line


def count_lines(block: bytes) -> int:
    """Number of lines of a block; the last one needs no end."""
    ends = block.count(b"\n")
    return ends if block.endswith(b"\n") else ends + 1


def parse_block(block: bytes, field: str, begins_file: bool) -> Parsed:
    """Texts of a block of lines. Blank lines give nothing."""
    quickly = _parse_quickly(block, field)
    if quickly is not None:
        return Parsed(quickly, np.arange(len(quickly), dtype=np.uint64), [])
    texts: list[bytes] = []
    rows: list[int] = []
    bad: Reasons = []
    for row, line in enumerate(block.split(b"\n")):
        if not line or line.isspace():
            continue
        may_have_mark = begins_file and row == 0  # a byte order mark
        try:
            text = _text_of_line(line, field, "utf-8-sig" if may_have_mark else "utf-8")
        except BadLineError as error:
            bad.append((row, str(error)))
            continue
        texts.append(text)
        rows.append(row)
    return Parsed(large_strings(texts), np.array(rows, np.uint64), bad)


def bytes_of_lines(block: bytes, rows: list[int]) -> int:
    """Bytes of some lines of a block, by their numbers.

    Of one that was too long, so many as tell that it is.
    """
    if not rows:
        return 0
    lines = block.split(b"\n")
    sizes = 0
    for row in rows:
        is_too_long = lines[row].startswith(TOO_LONG)
        sizes += MAX_LINE_BYTES + 1 if is_too_long else len(lines[row])
    return sizes


def _parse_quickly(block: bytes, field: str) -> pa.Array | None:
    """The text of every line, if every line holds one object and all is well.

    In JSON a `{` comes right after a `}` between two objects only: if all line ends lie so, none is
    within an object. Arrow does not mind invalid UTF-8, and crashes where the first value is null
    (pyarrow 26).
    """
    characters = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(characters[:-1] == ord("\n"))
    last = characters[ends - 1]
    last_but_cr = np.where(last == ord("\r"), characters[ends - 2], last)
    is_object_a_line = (
        block.startswith(b"{")
        and np.all(last_but_cr == ord("}"))
        and np.all(characters[ends + 1] == ord("{"))
    )
    if not is_object_a_line:
        return None
    schema = pa.schema([(field, pa.large_string())])
    options = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    # Arrow refuses a line that is longer than its block.
    read_options = pa.json.ReadOptions(use_threads=False, block_size=len(block) + 1)
    try:
        large_strings([block]).validate(full=True)
        table = pa.json.read_json(pa.BufferReader(block), read_options, options)
        texts = table.column(0).combine_chunks()
    except pa.ArrowException:
        return None
    is_text_a_line = len(texts) == len(ends) + 1 and not texts.null_count
    return texts if is_text_a_line else None


def _text_of_line(line: bytes, field: str, encoding: str) -> bytes:
    """The text of one line as UTF-8. Raises BadLineError if it has none."""
    if line.startswith(TOO_LONG):
        raise BadLineError(f"a line of more than {MAX_LINE_BYTES / 1e6:,.0f} MB")
    try:
        # Any int will do; `int` would refuse one of over 4,300 digits.
        record = json.loads(line.decode(encoding), parse_int=len)
    except UnicodeDecodeError as error:
        problem = f"invalid UTF-8 at byte {error.start} of the line"
        raise BadLineError(_nuls(line) or problem) from None
    except (ValueError, RecursionError) as error:
        raise BadLineError(_nuls(line) or f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise BadLineError(f"a JSON {kind}, expected an object with the field {field!r}")
    if field not in record:
        names = ", ".join(record)[:LONGEST_NAMES].encode(errors="replace").decode()
        raise BadLineError(f"no field {field!r}, it has: {names} (text_field names it)")
    text = record[field]
    if not isinstance(text, str):
        kind = "null" if text is None else f"of type {type(text).__name__}"
        raise BadLineError(f"{field!r} is {kind}, expected text")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        problem = f"half a surrogate pair at character {error.start} is not valid Unicode"
        raise BadLineError(problem) from None


def _nuls(line: bytes) -> str:
    """What is wrong with a line that holds many NULs, of which JSON has none."""
    nuls = line.count(0)
    if nuls < MANY_NULS:
        return ""
    return (
        f"{nuls:,} NULs, the first at byte {line.find(0)} of the line (a crash or a full disk may "
        "leave them)"
    )


def count_newlines(stream: BinaryIO, stop: int) -> int:
    """Line ends before a byte offset."""
    stream.seek(0)
    lines = 0
    for start in range(0, stop, READ_BYTES):
        lines += stream.read(min(READ_BYTES, stop - start)).count(b"\n")
    return lines

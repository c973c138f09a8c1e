"""Texts out of JSON lines, plain, gzip or zstd; how `corpus` reads them.

A block of lines goes through Arrow's parser, which makes no Python object of a line. Where that one
is not content, or where it might take two lines for one object or one line for two, the block is
read line by line, and each bad line gets its reason. Both ways keep the same lines and read the
same text in them, with one exception that no real file holds: a field beside the text, nested
deeper than Python's recursion limit, is bad line by line only.
"""

import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json
import zstandard

READ_BYTES = 1 << 20
COMPRESSED_BYTES = 4 << 10  # read at a time: in zstd it may stand for 128 MiB
MAX_LINE_BYTES = 256 << 20
MANY_NULS = 8  # of a line: fewer may be a writer's mistake within a text
TOO_LONG = b"\0too long"  # takes the place of a longer line; no JSON holds a NUL
DAMAGED = (OSError, EOFError, zlib.error, zstandard.ZstdError)  # what a broken stream raises
DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "jsonl.gz": lambda: zlib.decompressobj(wbits=31),
    "jsonl.zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
}

Reasons = list[tuple[int, str]]  # row and what is wrong with it


def line_cuts(stream: BinaryIO, size: int, unit_bytes: int) -> list[int]:
    """Byte offsets at line starts, about unit_bytes apart, from 0 to the size of the file."""
    cuts = [0]
    while cuts[-1] + unit_bytes < size:
        stream.seek(cuts[-1] + unit_bytes - 1)
        while (part := stream.readline(READ_BYTES)) and not part.endswith(b"\n"):
            pass  # in parts: a line may be longer than memory
        cuts.append(stream.tell())
    return cuts if cuts[-1] == size and len(cuts) > 1 else [*cuts, size]


def read_chunks(stream: BinaryIO, format: str, start: int, stop: int) -> Iterator[bytes]:
    """The bytes from start to stop of a plain stream; those of a compressed one whole, and
    decompressed.
    """
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
    decompressor, inside, is_empty = new_decompressor(), False, True
    while chunk := stream.read(COMPRESSED_BYTES):
        while chunk := chunk if inside else chunk.lstrip(b"\0"):
            inside, is_empty = True, False
            yield decompressor.decompress(chunk)
            chunk = decompressor.unused_data if decompressor.eof else b""
            if decompressor.eof:
                decompressor, inside = new_decompressor(), False
    if inside or is_empty:
        raise OSError("the compressed stream ends early")


def blocks(chunks: Iterator[bytes], block_bytes: int) -> Iterator[bytes]:
    """The same bytes in blocks of whole lines, about block_bytes each; a line too long becomes
    TOO_LONG.

    What broke the stream is raised after the whole lines before it.
    """
    block, begun = bytearray(), bytearray()  # whole lines; what is there of the next
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
    return block.count(b"\n") + (not block.endswith(b"\n"))


def parse_block(
    block: bytes, field: str, is_first: bool
) -> tuple[pa.Array, npt.NDArray[np.uint64], Reasons]:
    """Texts of a block, the line of each, from 0, and the lines that are bad. Blank lines give
    nothing.
    """
    if (quickly := _parse_quickly(block, field)) is not None:
        return quickly, np.arange(len(quickly), dtype=np.uint64), []
    lines = [
        (row, line) for row, line in enumerate(block.split(b"\n")) if line and not line.isspace()
    ]
    found = [
        (row, *_parse_line(line, field, "utf-8" if row or not is_first else "utf-8-sig"))
        for row, line in lines
    ]
    good = [(row, text) for row, text, reason in found if not reason]
    return *arrow_texts(good), [(row, reason) for row, _, reason in found if reason]


def bytes_of_lines(block: bytes, rows: list[int]) -> int:
    """Bytes of some lines of a block, by their numbers; of one that was too long, what tells
    that it is.
    """
    if not rows:
        return 0
    lines = block.split(b"\n")
    return sum(
        MAX_LINE_BYTES + 1 if lines[row].startswith(TOO_LONG) else len(lines[row]) for row in rows
    )


def _parse_quickly(block: bytes, field: str) -> pa.Array | None:
    """The text of every line, if every line holds one object and all is well.

    In JSON a `{` comes right after a `}` between two objects only: if all line ends lie so, none is
    within an object. Arrow does not mind invalid UTF-8, and crashes where the first value is null
    (pyarrow 26).
    """
    characters = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(characters[:-1] == ord("\n"))
    before = np.where(characters[ends - 1] == ord("\r"), characters[ends - 2], characters[ends - 1])
    if not (
        block.startswith(b"{")
        and np.all(before == ord("}"))
        and np.all(characters[ends + 1] == ord("{"))
    ):
        return None
    schema = pa.schema([(field, pa.large_string())])
    options = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        arrow_texts([(0, block)])[0].validate(full=True)
        read_options = pa.json.ReadOptions(use_threads=False, block_size=len(block) + 1)
        texts = (
            pa.json.read_json(pa.BufferReader(block), read_options, options)
            .column(0)
            .combine_chunks()
        )
    except pa.ArrowException:
        return None
    return texts if len(texts) == len(ends) + 1 and not texts.null_count else None


def _parse_line(line: bytes, field: str, encoding: str) -> tuple[bytes, str]:
    """The text of one line as UTF-8, or what is wrong with it. A file may begin with a byte
    order mark.
    """
    if line.startswith(TOO_LONG):
        return b"", f"a line of more than {MAX_LINE_BYTES / 1e6:,.0f} MB"
    try:
        # an int, and of any number of digits
        record = json.loads(line.decode(encoding), parse_int=len)
    except UnicodeDecodeError as error:
        return b"", _nuls(line) or f"invalid UTF-8 at byte {error.start} of the line"
    except (ValueError, RecursionError) as error:
        if nuls := _nuls(line):
            return b"", nuls
        return b"", f"not valid JSON ({error})"
    if not isinstance(record, dict):
        return b"", f"a JSON {type(record).__name__}, expected an object with the field {field!r}"
    if field not in record:
        names = ", ".join(record)[:200].encode(errors="replace").decode()
        return b"", f"no field {field!r}, it has: {names} (text_field names it)"
    text = record[field]
    if not isinstance(text, str):
        return (
            b"",
            f"{field!r} is {'null' if text is None else f'of type {type(text).__name__}'}, "
            "expected text",
        )
    try:
        return text.encode(), ""
    except UnicodeEncodeError as error:
        return b"", f"half a surrogate pair at character {error.start} is not valid Unicode"


def _nuls(line: bytes) -> str:
    """What is wrong with a line that holds many NULs, of which JSON has none."""
    nuls = line.count(0)
    if nuls < MANY_NULS:
        return ""
    return (
        f"{nuls:,} NULs, the first at byte {line.find(0)} of the line (a crash or a full disk may "
        "leave them)"
    )


def arrow_texts(
    numbered: list[tuple[int, bytes]],
) -> tuple[pa.LargeStringArray, npt.NDArray[np.uint64]]:
    """One Arrow array out of UTF-8 byte strings, and the row of each."""
    texts = [text for _, text in numbered]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    array = pa.LargeStringArray.from_buffers(
        len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(texts))
    )
    return array, np.array([row for row, _ in numbered], np.uint64)


def count_newlines(stream: BinaryIO, stop: int) -> int:
    """Line ends before a byte offset."""
    stream.seek(0)
    sizes = (min(READ_BYTES, stop - at) for at in range(0, stop, READ_BYTES))
    return sum(stream.read(size).count(b"\n") for size in sizes)

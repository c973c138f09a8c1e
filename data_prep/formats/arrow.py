"""Arrow's own files, of its stream or its file format: a row is a document, a file is a unit."""

import io
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa

from data_prep.errors import UserError, explained
from data_prep.formats.documents import (
    ANEW,
    Documents,
    Reading,
    all_rows,
    check_column,
    rows_of_a_batch,
)
from data_prep.formats.work_unit import WorkUnit
from data_prep.inputs.sources import InputFile, open_input

MAGIC_OF_A_FILE = b"ARROW1"
LONGEST_NAMES = 1000  # characters of columns' names in a message
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
# What damaged files make Arrow's library raise.
DAMAGED = (pa.ArrowException, OSError, EOFError, MemoryError, OverflowError, ValueError)


def read(unit: WorkUnit, given: Reading) -> Iterator[Documents]:
    """A record batch at a time, a large one in parts."""
    file = unit.files[0]
    with explained(DAMAGED, f"{unit.url}: damaged", ANEW), open_input(file) as stream:
        for column in _columns(stream, file, unit.text_field):
            rows = rows_of_a_batch(len(column), column.nbytes)
            for start in range(0, len(column), rows):
                yield all_rows(column.slice(start, rows))


def _columns(stream: BinaryIO, file: InputFile, text_field: str | None) -> Iterator[pa.Array]:
    """The texts of each record batch, checked as far as `cast` relies on."""
    is_file = stream.read(len(MAGIC_OF_A_FILE)) == MAGIC_OF_A_FILE
    if not is_file:
        stream.seek(-len(STREAM_END), io.SEEK_END)
        if stream.read() != STREAM_END:
            raise EOFError("the stream of record batches ends early")
    stream.seek(0)
    if is_file:
        reader = pa.ipc.open_file(stream)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        reader = batches = pa.ipc.open_stream(stream)
    check_schema(file, reader.schema, text_field)
    names = reader.schema.names
    place = names.index(text_field)
    for batch in batches:
        column = batch.column(place)
        column.validate()
        is_plain = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        # Text that is not UTF-8 is a bad document, and not a damaged file.
        checked = column.cast(pa.large_binary()) if is_plain else column
        checked.validate(full=True)
        yield column


def check_schema(file: InputFile, schema: pa.Schema, text_field: str | None) -> None:
    """Raises UserError if the text column is not there, or holds no text."""
    problem = f"{file.url}: damaged, a column's name is not UTF-8"
    with explained(UnicodeDecodeError, problem, ANEW):
        names = schema.names
    check_column(file, names, text_field)
    type_ = schema.field(names.index(text_field)).type
    if is_text(type_):
        return
    advice = "write the text as a column of strings"
    of_text = [column.name for column in schema if is_text(column.type)]
    others = ", ".join(of_text)[:LONGEST_NAMES]
    if others:
        advice = f"{advice}, or set text_field to one that is: {others}"
    else:
        advice = f"no column is; {advice}"
    raise UserError(
        f"{file.url}: column {text_field!r} is of type {type_}, expected string; {advice}"
    )


def is_text(type_: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    value_type = type_.value_type if pa.types.is_dictionary(type_) else type_
    return value_type in (pa.string(), pa.large_string(), pa.string_view())

"""CSV as RFC 4180 has it, and as pandas and `datasets` write it.

A record is a document, a file is a unit.

Python's `csv` ends a record at a lone carriage return outside quotes, wherever it stands. Its
writers (pandas' too, and with it that of `datasets`) quote a field only for the characters that end
their own records: in a file whose records end in LF or CRLF, a lone CR is a part of the text; where
the header ends in a CR, so do all records. CRLF always ends one: a text that ends in an unquoted CR
before the LF of its record, as pandas writes it, can't be told from that.
"""

import csv
import io
import itertools
import re
from collections.abc import Iterator
from typing import BinaryIO

from data_prep.errors import UserError
from data_prep.formats import documents
from data_prep.formats.documents import Documents, Reading, Reasons, check_column, some_rows
from data_prep.formats.work_unit import WorkUnit
from data_prep.inputs.sources import InputFile, open_input, reading

BATCH_RECORDS = 512  # whatever their size
LONE_CR = re.compile("\r(?!\n)")
# For a lone CR; half a surrogate pair that no decoder gives, not even for invalid UTF-8.
STAND_IN = "\ud800"
BYTES_FOR_HEADER = 1 << 20

Record = list[str]


def read(unit: WorkUnit, given: Reading) -> Iterator[Documents]:
    """Records of a file with a header; the first after the header is row 0."""
    file = unit.files[0]
    with reading(file), open_input(file) as stream:
        records = read_records(stream, file.url, documents.MAX_DOCUMENT_BYTES)
        header = next(records, [])
        column = _column_of_text(file, header, unit.text_field or "")
        while batch := list(itertools.islice(records, BATCH_RECORDS)):
            yield _documents(batch, column, len(header))


def _column_of_text(file: InputFile, header: Record, text_field: str) -> int:
    """The place of the text in a record. Raises UserError if it is not there, or not once."""
    check_column(file, header, text_field)
    times = header.count(text_field)
    if times > 1:
        problem = f"{times} columns of its header are named {text_field!r}"
        raise UserError(f"{file.url}: {problem}; rename all but the one that holds the text")
    return header.index(text_field)


def _documents(records: list[Record], column: int, fields: int) -> Documents:
    """A batch out of records, each of which has so many fields if it is good."""
    good: list[tuple[int, bytes]] = []
    bad: Reasons = []
    bad_bytes = 0
    for row, record in enumerate(records):
        if len(record) == fields:
            good.append((row, _bytes_of(record[column])))
        elif record:  # a blank line is no record
            bad.append((row, f"a record of {len(record)} fields, the header has {fields}"))
            bad_bytes += sum(len(_bytes_of(field)) for field in record)
    return some_rows(good, bad, bad_bytes, len(records))


def _bytes_of(field: str) -> bytes:
    """A field as it is in the file, invalid UTF-8 included."""
    return field.encode(errors="surrogateescape")


def read_records(stream: BinaryIO, where: str, max_field_bytes: int) -> Iterator[Record]:
    """The records, header included; invalid UTF-8 is in them as `surrogateescape` has it.

    Raises UserError naming the line where the file is no CSV.
    """
    csv.field_size_limit(max_field_bytes)
    ending = header_ending(stream.read(BYTES_FOR_HEADER))
    stream.seek(0)
    if ending == b"\r":
        lines: Iterator[str] = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    else:
        text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="\n")
        lines = (_without_lone_cr(line, ending) for line in text)
    records = csv.reader(lines, strict=True)
    try:
        for record in records:
            yield [field.replace(STAND_IN, "\r") for field in record]
    except csv.Error as error:
        at = f"{where}: line {records.line_num}"
        raise UserError(
            f"{at}: not CSV ({error}); quote its fields as RFC 4180 says, or write it again"
        ) from None


def header_ending(beginning: bytes) -> bytes:
    """What ends the first record: LF, CRLF, or CR; LF if nothing does.

    Line ends within quotes end nothing.
    """
    parts = re.split(rb"(\r\n|\n|\r)", beginning)
    lines = parts[::2]
    endings = parts[1::2]
    quotes = 0
    for line, ending in zip(lines, endings, strict=False):
        quotes += line.count(b'"')
        if quotes % 2 == 0:
            return ending
    return b"\n"


def _without_lone_cr(line: str, ending: bytes) -> str:
    if "\r" not in line:
        return line
    # The last line of a file that was cut within its CRLF.
    if ending == b"\r\n" and line.endswith("\r"):
        line += "\n"
    return LONE_CR.sub(STAND_IN, line)

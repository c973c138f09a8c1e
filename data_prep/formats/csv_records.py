"""Records out of CSV files as RFC 4180 has them, and as pandas and `datasets` write them; how
`corpus` reads them.

Python's `csv` ends a record at a lone carriage return outside quotes, wherever it stands. Its
writers (pandas' too, and with it that of `datasets`) quote a field only for the characters that end
their own records: in a file whose records end in LF or CRLF, a lone CR is a part of the text; where
the header ends in a CR, so do all records. CRLF always ends one: a text that ends in an unquoted CR
before the LF of its record, as pandas writes it, can't be told from that.
"""

import csv
import io
import re
from collections.abc import Iterator
from typing import BinaryIO

from data_prep.errors import UserError

LONE_CR = re.compile("\r(?!\n)")
# for a lone CR; half a surrogate pair that no decoder gives, not even for invalid UTF-8
STAND_IN = "\ud800"
BYTES_FOR_HEADER = 1 << 20


def read_records(stream: BinaryIO, where: str, max_field_bytes: int) -> Iterator[list[str]]:
    """The records, header included; invalid UTF-8 is in them as `surrogateescape` has it.

    Raises UserError naming the line where the file is no CSV.
    """
    csv.field_size_limit(max_field_bytes)
    ending = header_ending(stream.read(BYTES_FOR_HEADER))
    stream.seek(0)
    text = io.TextIOWrapper(
        stream, "utf-8-sig", "surrogateescape", newline="" if ending == b"\r" else "\n"
    )
    lines = text if ending == b"\r" else (_without_lone_cr(line, ending) for line in text)
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
    """What ends the first record: LF, CRLF, or CR; LF if nothing does. Line ends within quotes
    end nothing.
    """
    parts = re.split(rb"(\r\n|\n|\r)", beginning)
    quotes = 0
    for line, ending in zip(parts[::2], parts[1::2], strict=False):
        quotes += line.count(b'"')
        if quotes % 2 == 0:
            return ending
    return b"\n"


def _without_lone_cr(line: str, ending: bytes) -> str:
    if "\r" not in line:
        return line
    # the last line of a file that was cut within its CRLF
    if ending == b"\r\n" and line.endswith("\r"):
        line += "\n"
    return LONE_CR.sub(STAND_IN, line)

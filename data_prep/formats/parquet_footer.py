"""Whether a parquet file has encrypted columns, found in its footer without a look at any column.

Arrow's library ends the process by an abort where the metadata of such a column is asked for
without its key (pyarrow 26; no exception, so nothing to catch), though it opens the file. What it
can't be asked is read here: the fields of the footer that come behind the columns. They are
Thrift's compact protocol, see parquet-format's parquet.thrift.
"""

import io
from typing import BinaryIO

from data_prep.errors import UserError, explained
from data_prep.inputs.sources import InputFile

# Of a file; what the footer says behind its columns takes 3 bytes a column, and less.
TAIL_BYTES = 64 << 10
# Behind the footer: its length, and the magic "PAR1".
LENGTH_BYTES = 4
END_BYTES = 8
# Fields of FileMetaData.
CREATED_BY = 6
ENCRYPTION_ALGORITHM = 8
DECRYPT = "decrypt it, and write it again without encryption"
# types of fields
STOP = 0
TRUE = 1
FALSE = 2
BYTE = 3
I16 = 4
I32 = 5
I64 = 6
DOUBLE = 7
BINARY = 8
LIST = 9
SET = 10
MAP = 11
STRUCT = 12
MANY = 15  # of the elements of a list: so many or more, told behind the head
MAX_DEPTH = 32


def refuse_encrypted(file: InputFile, stream: BinaryIO, created_by: str | None) -> None:
    """Raises UserError if columns of a parquet file, or its footer, are encrypted.

    `created_by` is the footer's own; it lies behind the columns, so that what is before it need not
    be read.
    """
    written_by = (created_by or "").encode()
    damaged = f"{file.url}: damaged, its footer can't be read"
    with explained((IndexError, RecursionError), damaged, "write it again"):
        footer = _footer(stream, file.size, written_by)
        if is_encrypted(footer, written_by):
            raise UserError(f"{file.url}: has encrypted columns; {DECRYPT}")


def is_encrypted(footer: bytes, created_by: bytes) -> bool:
    """Whether a footer, or an end of it that holds `created_by`, names an algorithm of encryption.

    Raises IndexError where it ends amid a field.
    """
    before = 0  # the field behind which to look
    at = footer.rfind(created_by) if created_by else -1
    if at >= 0:
        before = CREATED_BY
        footer = footer[at + len(created_by) :]
    return ENCRYPTION_ALGORITHM in _Reader(footer).field_numbers(before)


def _footer(stream: BinaryIO, size: int, created_by: bytes) -> bytes:
    """The footer, or its end if that holds what made the file."""
    start = max(0, size - TAIL_BYTES)
    stream.seek(start)
    tail = stream.read(size - start)
    length = int.from_bytes(tail[-END_BYTES : LENGTH_BYTES - END_BYTES], "little")
    in_tail = max(0, len(tail) - END_BYTES - length)
    end_of_footer = tail[in_tail:-END_BYTES]
    if created_by and created_by in end_of_footer:
        return end_of_footer
    stream.seek(max(0, size - END_BYTES - length))
    return stream.read(length)


class _Reader:
    """Walks over fields of Thrift's compact protocol; keeps their numbers only."""

    def __init__(self, content: bytes) -> None:
        self.stream = io.BytesIO(content)

    def field_numbers(self, before: int, depth: int = 0) -> set[int]:
        """Of a struct, from the field behind number `before` to its end."""
        if depth > MAX_DEPTH:
            raise IndexError("fields within fields, without end")
        found: set[int] = set()
        number = before
        while True:
            step, type_ = self._halves()
            if type_ == STOP:
                return found
            if step:
                number += step
            else:  # too far for half a byte: the number itself
                number = self._zigzag()
            found.add(number)
            self._skip(type_, depth + 1)

    def _skip(self, type_: int, depth: int) -> None:
        """Over a value of a type."""
        if type_ in (I16, I32, I64):
            self._varint()
        elif type_ == BYTE:
            self._bytes(1)
        elif type_ == DOUBLE:
            self._bytes(8)
        elif type_ == BINARY:
            self._bytes(self._varint())
        elif type_ in (LIST, SET):
            self._skip_list(depth)
        elif type_ == MAP:
            self._skip_map(depth)
        elif type_ == STRUCT:
            self.field_numbers(0, depth)
        elif type_ not in (TRUE, FALSE):
            raise IndexError(f"a field of type {type_}")

    def _skip_list(self, depth: int) -> None:
        count, type_ = self._halves()
        if count == MANY:
            count = self._varint()
        for _ in range(count):
            self._skip_element(type_, depth)

    def _skip_map(self, depth: int) -> None:
        count = self._varint()
        if count == 0:  # then no byte tells its types
            return
        key_type, value_type = self._halves()
        for _ in range(count):
            self._skip_element(key_type, depth)
            self._skip_element(value_type, depth)

    def _skip_element(self, type_: int, depth: int) -> None:
        """A truth value is a byte here; as a field, it is in the field's head."""
        if type_ in (TRUE, FALSE):
            type_ = BYTE
        self._skip(type_, depth)

    def _halves(self) -> tuple[int, int]:
        """The upper and the lower half of a byte."""
        byte = self._byte()
        return byte >> 4, byte & 0x0F

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _varint(self) -> int:
        value = 0
        shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte & 0x80 == 0:  # no more bytes
                return value
            shift += 7

    def _byte(self) -> int:
        return self._bytes(1)[0]

    def _bytes(self, count: int) -> bytes:
        content = self.stream.read(count)
        if len(content) != count:
            raise IndexError("it ends amid a field")
        return content

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

# of a file; what the footer says behind its columns takes 3 bytes a column, and less
TAIL_BYTES = 64 << 10
CREATED_BY, ENCRYPTION_ALGORITHM = 6, 8  # fields of FileMetaData
DECRYPT = "decrypt it, and write it again without encryption"
STOP, TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(
    13
)  # types of fields
MAX_DEPTH = 32


def refuse_encrypted(file: InputFile, stream: BinaryIO, created_by: str | None) -> None:
    """Raises UserError if columns of a parquet file, or its footer, are encrypted.

    `created_by` is the footer's own; it lies behind the columns, so that what is before it need not
    be read.
    """
    with explained(
        (IndexError, RecursionError),
        f"{file.url}: damaged, its footer can't be read",
        "write it again",
    ):
        if is_encrypted(
            _footer(stream, file.size, (created_by or "").encode()), (created_by or "").encode()
        ):
            raise UserError(f"{file.url}: has encrypted columns; {DECRYPT}")


def is_encrypted(footer: bytes, created_by: bytes) -> bool:
    """Whether a footer, or an end of it that holds `created_by`, names an algorithm of encryption.

    Raises IndexError where it ends amid a field.
    """
    at = footer.rfind(created_by) if created_by else -1
    reader = _Reader(footer[at + len(created_by) :] if at >= 0 else footer)
    return ENCRYPTION_ALGORITHM in reader.field_numbers(CREATED_BY if at >= 0 else 0)


def _footer(stream: BinaryIO, size: int, created_by: bytes) -> bytes:
    """The footer, or its end if that holds what made the file."""
    start = max(0, size - TAIL_BYTES)
    stream.seek(start)
    tail = stream.read(size - start)
    length = int.from_bytes(tail[-8:-4], "little")
    if created_by not in tail[max(0, len(tail) - 8 - length) : -8] or not created_by:
        stream.seek(max(0, size - 8 - length))
        return stream.read(length)
    return tail[max(0, len(tail) - 8 - length) : -8]


class _Reader:
    """Walks over fields of Thrift's compact protocol; keeps their numbers only."""

    def __init__(self, content: bytes) -> None:
        self.stream = io.BytesIO(content)

    def field_numbers(self, before: int, depth: int = 0) -> set[int]:
        """Of a struct, from the field behind number `before` to its end."""
        if depth > MAX_DEPTH:
            raise IndexError("fields within fields, without end")
        found, number = set(), before
        while (head := self._byte()) & 0x0F != STOP:
            step = head >> 4
            number = number + step if step else self._zigzag()
            found.add(number)
            self._skip(head & 0x0F, depth + 1)
        return found

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
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            for _ in range(count):
                self._skip_element(head & 0x0F, depth)
        elif type_ == MAP:
            count = self._varint()
            types = self._byte() if count else 0
            for _ in range(count):
                self._skip_element(types >> 4, depth)
                self._skip_element(types & 0x0F, depth)
        elif type_ == STRUCT:
            self.field_numbers(0, depth)
        elif type_ not in (TRUE, FALSE):
            raise IndexError(f"a field of type {type_}")

    def _skip_element(self, type_: int, depth: int) -> None:
        """A truth value is a byte here; as a field, it is in the field's head."""
        self._skip(BYTE if type_ in (TRUE, FALSE) else type_, depth)

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _varint(self) -> int:
        value, shift = 0, 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
        return value | byte << shift

    def _byte(self) -> int:
        return self._bytes(1)[0]

    def _bytes(self, count: int) -> bytes:
        content = self.stream.read(count)
        if len(content) != count:
            raise IndexError("it ends amid a field")
        return content

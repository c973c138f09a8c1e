"""Megatron's `.bin` of ids, and the `.idx` beside it that says where documents lie."""

import bisect
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.errors import UserError
from data_prep.formats.flat_arrays import Offsets, bounds_of
from data_prep.inputs.sources import InputFile

AnyIds = npt.NDArray[Any]

# Magic, version, type of the ids, sequences, documents + 1; from Megatron-LM's indexed_dataset.py.
HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\0\0"
VERSION = 1
DTYPES = {1: "<u1", 4: "<i4", 5: "<i8", 8: "<u2"}


class Index(NamedTuple):
    """What an `.idx` says. Its arrays stay on the disk."""

    dtype: np.dtype[Any]
    sizes: npt.NDArray[np.int32]  # ids of each sequence
    pointers: npt.NDArray[np.int64]  # first byte of each sequence
    # The first sequence of each document, and behind the last one the number of sequences.
    documents: npt.NDArray[np.int64]


class MegatronIds:
    """A `.bin` of ids. Positions count documents.

    Its `.idx` says where sequences lie, and which of them make a document.
    """

    start = 0

    def __init__(self, file: InputFile) -> None:
        """Raises UserError if the two files are not of each other."""
        self.path = file.url
        index_path = Path(file.url).with_suffix(".idx")
        if not file.url.endswith(".bin") or not index_path.is_file():
            raise UserError(
                f"{file.url}: expected a .bin with its .idx beside it; name the .bin, and copy both"
            )
        self.damaged = (
            f"{index_path}: truncated, damaged, not of this .bin or not of text alone; write both "
            "again"
        )
        index = read_index(index_path, self.damaged)
        self.dtype, self.sizes, self.pointers, self.documents = index
        self.itemsize = self.dtype.itemsize
        self.stop = len(self.documents) - 1
        sequences = len(self.sizes)
        self.size = 0
        if sequences:
            last_size = self.itemsize * int(self.sizes[-1])
            self.size = int(self.pointers[-1]) + last_size
        if file.size != self.size:
            raise UserError(
                f"{file.url}: {file.size:,} bytes, its .idx says {self.size:,}; copy or write "
                "both again"
            )
        begins_right = self.documents[0] == 0 and self.byte(0) == 0
        if not begins_right or self.documents[-1] != sequences:
            raise UserError(self.damaged)

    def byte(self, document: int) -> int:
        """Where a document begins."""
        sequence = int(self.documents[document])
        if 0 <= sequence < len(self.pointers):
            return int(self.pointers[sequence])
        return self.size

    def next_cut(self, start: int, stop: int, byte: int) -> int:
        """The first document after start that begins at this byte or later; or stop."""
        return bisect.bisect_left(range(stop), byte, start + 1, stop, key=self.byte)

    def read(self, start: int, stop: int) -> tuple[AnyIds, Offsets]:
        """The ids of some documents, and where each begins.

        Raises UserError if the index contradicts itself.
        """
        documents = self.documents[start : stop + 1]
        first = documents[0]
        last = documents[-1]
        sizes = self.sizes[first:last]
        bounds = bounds_of(sizes)  # of sequences, in ids
        first_byte = self.byte(start)
        bytes_told = np.append(self.pointers[first:last], self.byte(stop))
        bytes_counted = first_byte + self.itemsize * bounds
        is_sound = (
            (np.diff(documents) >= 0).all()
            and (sizes >= 0).all()
            and len(sizes) == last - first
            and np.array_equal(bytes_counted, bytes_told)
        )
        if not is_sound:
            raise UserError(self.damaged)
        ids = np.fromfile(self.path, self.dtype, bounds[-1], offset=first_byte)
        return ids, bounds[documents - first]


def read_index(path: Path, damaged: str) -> Index:
    """Read an index's header, and find the arrays behind it.

    Raises UserError if it is none, or, with the message `damaged`, if it is not whole.
    """
    header = np.fromfile(path, np.uint8, HEADER.size).tobytes()
    header = header.ljust(HEADER.size, b"\0")
    magic, version, dtype_code, sequences, bounds = HEADER.unpack(header)
    if (magic, version) != (MAGIC, VERSION):
        raise UserError(
            f"{path}: not an index of Megatron, version 1; set format to what the file is"
        )
    if dtype_code not in DTYPES:
        raise UserError(
            f"{path}: ids of type {dtype_code}, expected 8, 4, 5 or 1; write them as uint16 (8)"
        )
    sizes_end = HEADER.size + 4 * sequences
    pointers_end = sizes_end + 8 * sequences
    documents_end = pointers_end + 8 * bounds
    size = path.stat().st_size
    if bounds < 1 or size != documents_end:
        raise UserError(damaged)
    content = np.memmap(path, np.uint8, "r")
    return Index(
        dtype=np.dtype(DTYPES[dtype_code]),
        sizes=content[HEADER.size : sizes_end].view("<i4"),
        pointers=content[sizes_end:pointers_end].view("<i8"),
        documents=content[pointers_end:].view("<i8"),
    )

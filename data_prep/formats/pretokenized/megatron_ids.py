"""Megatron's `.bin` of ids, and the `.idx` beside it that says where documents lie; read by
`pretokenized`.
"""

import bisect
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.errors import UserError
from data_prep.formats.flat_arrays import Offsets
from data_prep.inputs.sources import InputFile

AnyIds = npt.NDArray[Any]

# magic, version, type of the ids, sequences, documents + 1
MEGATRON_HEADER = struct.Struct("<9sQBQQ")
MEGATRON_MAGIC = (b"MMIDIDX\0\0", 1)
MEGATRON_DTYPES = {1: "<u1", 4: "<i4", 5: "<i8", 8: "<u2"}


class MegatronIds:
    """A `.bin` of ids, and an `.idx` that says where its sequences lie and which of them make a
    document.
    """

    start = 0

    def __init__(self, file: InputFile) -> None:
        self.path, index_path = file.url, Path(file.url).with_suffix(".idx")
        if not file.url.endswith(".bin") or not index_path.is_file():
            raise UserError(
                f"{file.url}: expected a .bin with its .idx beside it; name the .bin, and copy both"
            )
        header = (
            np.fromfile(index_path, np.uint8, MEGATRON_HEADER.size)
            .tobytes()
            .ljust(MEGATRON_HEADER.size, b"\0")
        )
        magic, version, dtype_code, sequences, bounds = MEGATRON_HEADER.unpack(header)
        if (magic, version) != MEGATRON_MAGIC:
            raise UserError(
                f"{index_path}: not an index of Megatron, version 1; set format to what the file is"
            )
        if dtype_code not in MEGATRON_DTYPES:
            raise UserError(
                f"{index_path}: ids of type {dtype_code}, expected 8, 4, 5 or 1; write them as "
                "uint16 (8)"
            )
        self.dtype, self.stop = np.dtype(MEGATRON_DTYPES[dtype_code]), bounds - 1
        self.itemsize = self.dtype.itemsize
        self.damaged = (
            f"{index_path}: truncated, damaged, not of this .bin or not of text alone; write both "
            "again"
        )
        parts = np.cumsum([MEGATRON_HEADER.size, 4 * sequences, 8 * sequences, 8 * bounds])
        if bounds < 1 or index_path.stat().st_size != parts[-1]:
            raise UserError(self.damaged)
        _, sizes, pointers, documents = np.split(np.memmap(index_path, np.uint8, "r"), parts[:-1])
        self.sizes, self.pointers, self.documents = (
            sizes.view("<i4"),
            pointers.view("<i8"),
            documents.view("<i8"),
        )
        self.size = int(self.pointers[-1]) + self.itemsize * int(self.sizes[-1]) if sequences else 0
        if file.size != self.size:
            raise UserError(
                f"{file.url}: {file.size:,} bytes, its .idx says {self.size:,}; copy or write "
                "both again"
            )
        if (self.documents[0], self.documents[-1], self.byte(0)) != (0, sequences, 0):
            raise UserError(self.damaged)

    def byte(self, document: int) -> int:
        """Where a document begins."""
        sequence = int(self.documents[document])
        return int(self.pointers[sequence]) if 0 <= sequence < len(self.pointers) else self.size

    def next_cut(self, start: int, stop: int, byte: int) -> int:
        """The first document after start that begins at this byte or later; or stop."""
        return bisect.bisect_left(range(stop), byte, start + 1, stop, key=self.byte)

    def read(self, start: int, stop: int) -> tuple[AnyIds, Offsets]:
        """The ids of some documents, and where each begins. Raises UserError if the index
        contradicts itself.
        """
        documents = self.documents[start : stop + 1]
        sequences = slice(documents[0], documents[-1])
        bounds = np.append(0, np.cumsum(self.sizes[sequences], dtype=np.int64))
        told = np.append(self.pointers[sequences], self.byte(stop))
        is_sorted = (np.diff(documents) >= 0).all() and (np.diff(bounds) >= 0).all()
        is_whole = len(bounds) - 1 == documents[-1] - documents[0]
        if (
            not is_sorted
            or not is_whole
            or not np.array_equal(self.byte(start) + self.itemsize * bounds, told)
        ):
            raise UserError(self.damaged)
        return np.fromfile(self.path, self.dtype, bounds[-1], offset=told[0]), bounds[
            documents - documents[0]
        ]

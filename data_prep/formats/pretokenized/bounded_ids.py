"""Files of ids whose borders another file holds: datatrove's `.ds`, and the `.npy` of dolma and
OLMo.

Read by `pretokenized`. Documents are what the writer's own index says. So a text that spells the
end-of-document token, which both writers turn into its id, is found out, and texts without such an
id at their end are kept apart.
"""

import csv
import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.errors import UserError, explained
from data_prep.formats.flat_arrays import Offsets
from data_prep.inputs.sources import InputFile

AnyIds = npt.NDArray[Any]

ID_DTYPES = {2: "<u2", 4: "<u4"}  # by their bytes


class BoundedIds:
    """Such a file. Positions count documents."""

    start = 0

    def __init__(self, file: InputFile, index_path: Path, bounds: npt.NDArray[np.int64]) -> None:
        """`bounds`: where each document begins, in ids, and where the last one ends (documents +
        1).
        """
        self.path, self.bounds, self.stop = file.url, bounds, len(bounds) - 1
        advice = "copy both again, or write them again"
        if bounds[0] != 0 or (np.diff(bounds) < 0).any():
            raise UserError(f"{index_path}: damaged, its borders don't increase; {advice}")
        ids = int(bounds[-1])
        self.itemsize = file.size // ids if ids else 2
        if self.itemsize not in ID_DTYPES or file.size != ids * self.itemsize:
            told = f"{index_path.name} says {ids:,} ids of 2 or 4 bytes"
            raise UserError(f"{file.url}: {file.size:,} bytes, {told}; {advice}")

    def byte(self, position: int) -> int:
        """Where a document begins."""
        return self.itemsize * int(self.bounds[position])

    def next_cut(self, start: int, stop: int, byte: int) -> int:
        """The first document after start that begins at this byte or later; or stop."""
        found = int(np.searchsorted(self.bounds, -(-byte // self.itemsize)))
        return min(max(found, start + 1), stop)

    def read(self, start: int, stop: int) -> tuple[AnyIds, Offsets]:
        """The ids of some documents, and where each begins."""
        bounds = self.bounds[start : stop + 1]
        count = int(bounds[-1] - bounds[0])
        return np.fromfile(
            self.path, ID_DTYPES[self.itemsize], count, offset=self.byte(start)
        ), bounds - bounds[0]


def open_datatrove(file: InputFile) -> BoundedIds:
    """A `.ds` with its `.ds.index` (ends of documents in ids, <u8). `.ds.metadata`, if there,
    tells the ids' bytes.
    """
    index_path = Path(f"{file.url}.index")
    if not index_path.is_file():
        raise UserError(
            f"{file.url}: no {index_path.name} beside it; copy both, or write it with save_index"
        )
    if index_path.stat().st_size % 8:
        raise UserError(
            f"{index_path}: {index_path.stat().st_size:,} bytes, expected ends of 8; copy it again"
        )
    ends = np.fromfile(index_path, "<u8").astype(np.int64)
    return BoundedIds(file, index_path, np.append(0, ends))


def open_olmo(file: InputFile) -> BoundedIds:
    """A `.npy` of dolma, bare ids in spite of its name, with its `.csv.gz`: first id and end of
    each document.
    """
    index_path = Path(file.url).with_suffix(".csv.gz")
    if not file.url.endswith(".npy") or not index_path.is_file():
        raise UserError(
            f"{file.url}: expected a .npy with its .csv.gz beside it; name the .npy, and copy both"
        )
    kinds = (OSError, EOFError, zlib.error, ValueError, csv.Error, IndexError)
    with (
        explained(kinds, f"{index_path}: damaged", "copy or write it again"),
        gzip.open(index_path, "rt", newline="") as rows,
    ):
        borders = np.array(
            [(int(row[0]), int(row[1])) for row in csv.reader(rows)], np.int64
        ).reshape(-1, 2)
    if len(borders) and not np.array_equal(borders[1:, 0], borders[:-1, 1]):
        raise UserError(
            f"{index_path}: its documents don't lie one behind the other; write both again"
        )
    return BoundedIds(
        file, index_path, np.append(borders[:1, 0] if len(borders) else 0, borders[:, 1])
    )

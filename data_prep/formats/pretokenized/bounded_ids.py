"""Files of ids whose borders another file holds: datatrove's, and those of dolma and OLMo.

Documents are what the writer's own index says. So a text that spells the end-of-document token,
which both writers turn into its id, is found out, and texts without such an id at their end are
kept apart.
"""

import csv
import gzip
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.errors import UserError, explained
from data_prep.formats.flat_arrays import Offsets
from data_prep.inputs.sources import InputFile

AnyIds = npt.NDArray[Any]

ID_DTYPES = {2: "<u2", 4: "<u4"}  # by their bytes
END_BYTES = 8  # of an end of a document in datatrove's index
# What a damaged index of dolma's makes its readers raise.
DAMAGED = (OSError, EOFError, zlib.error, ValueError, csv.Error, IndexError)


class BoundedIds:
    """Such a file. Positions count documents."""

    start = 0

    def __init__(self, file: InputFile, index_path: Path, bounds: Offsets) -> None:
        """`bounds`: where documents begin, in ids, and the last ends, shape (documents + 1,).

        Raises UserError if the file is not of this size.
        """
        self.path = file.url
        self.bounds = bounds
        self.stop = len(bounds) - 1
        advice = "copy both again, or write them again"
        lengths = np.diff(bounds)
        if bounds[0] != 0 or lengths.min(initial=0) < 0:
            raise UserError(f"{index_path}: damaged, its borders don't increase; {advice}")
        ids = int(bounds[-1])
        self.itemsize = 2
        if ids:
            self.itemsize = file.size // ids
        is_whole = file.size == ids * self.itemsize
        if self.itemsize not in ID_DTYPES or not is_whole:
            told = f"{index_path.name} says {ids:,} ids of 2 or 4 bytes"
            raise UserError(f"{file.url}: {file.size:,} bytes, {told}; {advice}")

    def byte(self, position: int) -> int:
        """Where a document begins."""
        return self.itemsize * int(self.bounds[position])

    def next_cut(self, start: int, stop: int, byte: int) -> int:
        """The first document after start that begins at this byte or later; or stop."""
        first_id = -(-byte // self.itemsize)  # rounded up
        found = int(np.searchsorted(self.bounds, first_id))
        return min(max(found, start + 1), stop)

    def read(self, start: int, stop: int) -> tuple[AnyIds, Offsets]:
        """The ids of some documents, and where each begins."""
        bounds = self.bounds[start : stop + 1] - self.bounds[start]
        dtype = ID_DTYPES[self.itemsize]
        count = int(bounds[-1])
        ids = np.fromfile(self.path, dtype, count, offset=self.byte(start))
        return ids, bounds


def open_datatrove(file: InputFile) -> BoundedIds:
    """A `.ds` with its `.ds.index`: the ends of documents in ids, <u8.

    Source: datatrove's pipeline/tokens/tokenizer.py.
    """
    index_path = Path(f"{file.url}.index")
    if not index_path.is_file():
        raise UserError(
            f"{file.url}: no {index_path.name} beside it; copy both, or write it with save_index"
        )
    size = index_path.stat().st_size
    if size % END_BYTES:
        raise UserError(f"{index_path}: {size:,} bytes, expected ends of 8; copy it again")
    ends = np.fromfile(index_path, "<u8").astype(np.int64)
    return BoundedIds(file, index_path, np.append(0, ends))


def open_olmo(file: InputFile) -> BoundedIds:
    """A `.npy` of dolma, bare ids in spite of its name, with its `.csv.gz`.

    That one has a row for each document: its first id, its end, and more.
    """
    index_path = Path(file.url).with_suffix(".csv.gz")
    if not file.url.endswith(".npy") or not index_path.is_file():
        raise UserError(
            f"{file.url}: expected a .npy with its .csv.gz beside it; name the .npy, and copy both"
        )
    with (
        explained(DAMAGED, f"{index_path}: damaged", "copy or write it again"),
        gzip.open(index_path, "rt", newline="") as lines,
    ):
        bounds = _bounds_of_rows(csv.reader(lines))
    if bounds is None:
        raise UserError(
            f"{index_path}: its documents don't lie one behind the other; write both again"
        )
    return BoundedIds(file, index_path, bounds)


def _bounds_of_rows(rows: Iterable[list[str]]) -> Offsets | None:
    """Where each document begins, and where the last one ends; None if there are gaps between."""
    bounds: list[int] = []
    for row in rows:
        start = int(row[0])
        end = int(row[1])
        if not bounds:
            bounds.append(start)
        elif bounds[-1] != start:
            return None
        bounds.append(end)
    return np.array(bounds or [0], np.int64)

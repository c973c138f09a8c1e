"""Documents that are token ids already, in the formats of other projects; one module and one row
here for each.

Read by `corpus` and `unit_shards`, which decode them with the mixture's tokenizer.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from data_prep.errors import UserError
from data_prep.formats.flat_arrays import Offsets
from data_prep.formats.pretokenized.bounded_ids import open_datatrove, open_olmo
from data_prep.formats.pretokenized.flat_ids import OTHER_TOKENIZER, FlatIds
from data_prep.formats.pretokenized.megatron_ids import MegatronIds
from data_prep.inputs.sources import InputFile, reading
from data_prep.manifest import MAX_VOCAB_SIZE
from data_prep.tokenizer.encode import Ids

BATCH_TOKENS = 4 << 20
MAX_DOCUMENT_BYTES = 128 << 20  # in the file, and more or less: so much fits in memory

AnyIds = npt.NDArray[Any]


class IdFile(Protocol):
    """A file of ids, cut at positions: numbers of documents, or of ids where documents are not
    numbered.
    """

    path: str
    start: int  # first position
    stop: int

    @property
    def itemsize(self) -> int:
        """Bytes of an id."""

    def byte(self, position: int) -> int:
        """Where a position lies in the file."""

    def next_cut(self, start: int, stop: int, byte: int) -> int:
        """The first position after start at which a document begins, at this byte or later; or
        stop.
        """

    def read(self, start: int, stop: int) -> tuple[AnyIds, Offsets]:
        """The ids between two positions, and where documents begin in them (documents + 1)."""


READERS: dict[str, Callable[[InputFile, int], IdFile]] = {  # of a file, and the end-of-document id
    "megatron": lambda file, _: MegatronIds(file),
    "uint16": FlatIds,
    "datatrove": lambda file, _: open_datatrove(file),
    "olmo": lambda file, _: open_olmo(file),
}
FORMATS = tuple(READERS)
# of the file that says where a file's documents lie
INDEX_NAMES: dict[str, Callable[[str], str]] = {
    "megatron": lambda name: str(Path(name).with_suffix(".idx")),
    "datatrove": lambda name: f"{name}.index",
    "olmo": lambda name: str(Path(name).with_suffix(".csv.gz")),
}
# their writers turn a special token that a text spells into its id
SPELLING_FORMATS = ("datatrove", "olmo")


def cut_ids(
    file: InputFile, format: str, eos_id: int, unit_bytes: int
) -> list[tuple[int, int, int]]:
    """(start, stop, bytes) of the units of a file: numbers of documents (megatron), or offsets
    of ids (uint16).
    """
    source = open_ids(file, format, eos_id)
    return list(_cut(source, source.start, source.stop, unit_bytes))


def read_ids(
    file: InputFile, format: str, start: int, stop: int, eos_id: int
) -> Iterator[tuple[Ids, Offsets]]:
    """A unit's documents in batches: ids without the end-of-document id after each, and offsets
    (documents + 1).
    """
    source = open_ids(file, format, eos_id)
    for first, last, _ in _cut(source, start, stop, BATCH_TOKENS * source.itemsize):
        ids, offsets = source.read(first, last)
        refuse_no_ids(ids, file.url)
        is_eos = np.append(ids == eos_id, False)
        inside = np.setdiff1d(np.flatnonzero(is_eos), offsets[1:] - 1)
        if len(inside) and format not in SPELLING_FORMATS:
            document = first + int(np.searchsorted(offsets, inside[0], "right")) - 1
            raise UserError(
                f"{file.url}: document {document} (from 0) has eos_id {eos_id} inside; "
                f"{OTHER_TOKENIZER}"
            )
        ended = is_eos[offsets[1:] - 1] & (np.diff(offsets) > 0)
        is_end = np.zeros(len(ids), bool)
        is_end[offsets[1:][ended] - 1] = True
        yield ids[~is_end].astype(np.uint32), offsets - np.append(0, np.cumsum(ended))


def refuse_no_ids(numbers: AnyIds, path: str) -> None:
    """Raises UserError for a number below 0, or above all that uint32 holds, by its own value."""
    if numbers.dtype.kind == "u" and numbers.dtype.itemsize < 8:
        return
    for number in (int(numbers.min(initial=0)), int(numbers.max(initial=0))):
        if not 0 <= number < 2**32:
            problem = f"holds {number}, and ids are 0 to {MAX_VOCAB_SIZE - 1:,}"
            raise UserError(f"{path}: {problem}; see that it holds ids alone, and write it again")


def open_ids(file: InputFile, format: str, eos_id: int) -> IdFile:
    """A file of ids, opened as its format asks. Raises UserError if it isn't of that format."""
    if "://" in file.url:
        raise UserError(
            f"{file.url}: tokenised data can't be read from there; copy it to a local disk"
        )
    with reading(file):
        return READERS[format](file, eos_id)


def _cut(source: IdFile, start: int, stop: int, apart_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of whole documents, each up to the document in which apart_bytes come together, and
    their bytes.
    """
    while start < stop:
        end = source.next_cut(start, stop, source.byte(start) + apart_bytes)
        size = source.byte(end) - source.byte(start)
        if size > apart_bytes + MAX_DOCUMENT_BYTES:
            problem = (
                f"a document after byte {source.byte(start):,} takes over "
                f"{MAX_DOCUMENT_BYTES / 1e6:,.0f} MB"
            )
            raise UserError(f"{source.path}: {problem}; cut it into documents")
        yield start, end, size
        start = end

"""Documents that are token ids already, in the formats of other projects.

Each has a module beside this one, and a row of ID_FORMATS.

Documents are cut and read here; `decoded` gives them their texts, by the mixture's tokenizer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from data_prep.errors import UserError
from data_prep.formats.first_bytes import Kind, own_kind
from data_prep.formats.flat_arrays import Offsets, bounds_of, numbers_at
from data_prep.formats.pretokenized import flat_ids
from data_prep.formats.pretokenized.bounded_ids import open_datatrove, open_olmo
from data_prep.formats.pretokenized.flat_ids import OTHER_TOKENIZER, FlatIds
from data_prep.formats.pretokenized.megatron_ids import MegatronIds
from data_prep.formats.work_unit import Range, WorkUnit, row_of_file
from data_prep.inputs.sources import InputFile, find_inputs, reading
from data_prep.manifest import MAX_VOCAB_SIZE
from data_prep.tokenizer.encode import Ids

BATCH_TOKENS = 4 << 20
MAX_DOCUMENT_BYTES = 128 << 20  # in the file, and more or less: so much fits in memory

AnyIds = npt.NDArray[Any]


class IdFile(Protocol):
    """A file of ids, cut at positions.

    These are numbers of documents, or of ids where documents are not numbered.
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
        """The first position after start, at this byte or later, at which a document begins.

        Or stop, if there is none before.
        """

    def read(self, start: int, stop: int) -> tuple[AnyIds, Offsets]:
        """The ids between two positions, and where documents begin in them (documents + 1)."""


@dataclass(frozen=True, kw_only=True)
class IdFormat:
    """A format of ids."""

    name: str
    open: Callable[[InputFile, int], IdFile]  # a file, and the end-of-document id
    # Of the file that says where a file's documents lie, if one does.
    index_name: Callable[[str], str] | None = None
    # Its writer turns a special token that a text spells into its id.
    spells_special_tokens: bool = False
    own_kind: Kind | None = None  # how its files begin, and no others
    # Of a source: whether its files can be what they are to be.
    check_files: Callable[[Sequence[InputFile], int, str], None] | None = None
    place: Callable[[WorkUnit, int], str] = row_of_file


def _of_flat_ids(unit: WorkUnit, row: int) -> str:
    """Where a row of a unit lies, in files in which documents are not numbered."""
    return f"{unit.url}: document {row} behind id {unit.start:,}"


ID_FORMATS = {
    row.name: row
    for row in (
        IdFormat(
            name="megatron",
            open=lambda file, _: MegatronIds(file),
            index_name=lambda name: str(Path(name).with_suffix(".idx")),
        ),
        IdFormat(
            name="uint16",
            open=FlatIds,
            own_kind=own_kind(
                "NumPy",
                rb"\x93NUMPY",
                "uint16",
                "text is no array; ids of a tokenizer are format: uint16",
            ),
            check_files=flat_ids.check_lengths,
            place=_of_flat_ids,
        ),
        IdFormat(
            name="datatrove",
            open=lambda file, _: open_datatrove(file),
            index_name=lambda name: f"{name}.index",
            spells_special_tokens=True,
        ),
        IdFormat(
            name="olmo",
            open=lambda file, _: open_olmo(file),
            index_name=lambda name: str(Path(name).with_suffix(".csv.gz")),
            spells_special_tokens=True,
        ),
    )
}


def with_indexes(
    format: IdFormat, base: Path, files: Sequence[InputFile], where: str
) -> list[InputFile]:
    """The files of a source, each with the version of its index in its own.

    Raises UserError for one that is not on a local disk, or lacks its index.
    """
    for file in files:
        if "://" in file.url:
            raise UserError(
                f"{where}: {file.url}: {format.name} is read from local disks; copy it to one, "
                "name its path"
            )
    if format.index_name is None:
        return list(files)
    both = []
    for file in files:
        index = find_inputs(base, format.index_name(file.name), where)[0]
        both.append(replace(file, version=f"{file.version}, {index.version}"))
    return both


def cut_ids(file: InputFile, format: str, eos_id: int, unit_bytes: int) -> list[Range]:
    """The units of a file: ranges of documents, or of ids (uint16)."""
    source = open_ids(file, format, eos_id)
    return list(_cut(source, source.start, source.stop, unit_bytes))


def read_ids(
    file: InputFile, format: str, start: int, stop: int, eos_id: int
) -> Iterator[tuple[Ids, Offsets]]:
    """A unit's documents in batches.

    Yields ids, without the end-of-document id after each document, and offsets (documents + 1).
    """
    source = open_ids(file, format, eos_id)
    for first, last, _ in _cut(source, start, stop, BATCH_TOKENS * source.itemsize):
        ids, offsets = source.read(first, last)
        refuse_no_ids(ids, file.url)
        ends = offsets[1:]
        is_eos = np.append(ids == eos_id, False)
        inside = np.setdiff1d(np.flatnonzero(is_eos), ends - 1)
        if len(inside) and not ID_FORMATS[format].spells_special_tokens:
            document = first + int(numbers_at(offsets, inside[:1])[0])
            raise UserError(
                f"{file.url}: document {document} (from 0) has eos_id {eos_id} inside; "
                f"{OTHER_TOKENIZER}"
            )
        is_ended = is_eos[ends - 1] & (np.diff(offsets) > 0)
        is_end = np.zeros(len(ids), bool)
        is_end[ends[is_ended] - 1] = True
        left_out_before = bounds_of(is_ended)
        yield ids[~is_end].astype(np.uint32), offsets - left_out_before


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
        return ID_FORMATS[format].open(file, eos_id)


def _cut(source: IdFile, start: int, stop: int, apart_bytes: int) -> Iterator[Range]:
    """Ranges of whole documents, each up to the document in which apart_bytes come together."""
    while start < stop:
        begin_byte = source.byte(start)
        end = source.next_cut(start, stop, begin_byte + apart_bytes)
        size_bytes = source.byte(end) - begin_byte
        if size_bytes > apart_bytes + MAX_DOCUMENT_BYTES:
            limit = f"{MAX_DOCUMENT_BYTES / 1e6:,.0f} MB"
            raise UserError(
                f"{source.path}: a document after byte {begin_byte:,} takes over {limit}; cut it "
                "into documents"
            )
        yield Range(start, end, size_bytes)
        start = end

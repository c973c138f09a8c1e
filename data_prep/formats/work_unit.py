"""A work unit: the part of a source that any rank can take and read on its own.

The readers of `formats` read one. `building/work_units.py` cuts a source's files into them, as the
`cut` of their format says.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from data_prep.errors import UserError
from data_prep.formats.first_bytes import FirstBytes
from data_prep.inputs.sources import InputFile, reading


class Range(NamedTuple):
    """A part of a file, or of a list of files."""

    start: int  # first row group, byte, document, row or file
    stop: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class WorkUnit:
    """A part of one input file, or several small files: at most one shard per split."""

    source: str
    name: str
    files: tuple[InputFile, ...]  # one; of small files, all that belong to it
    format: str
    text_field: str | None
    skip_bad: bool  # leave bad documents out instead of stopping
    start: int  # first row group, byte, document, row or file
    stop: int
    size_bytes: int  # what progress and the balance of ranks go by
    files_are_rows: bool = False  # each of its files is a document

    @property
    def url(self) -> str:
        """Where its (first) file lies."""
        return self.files[0].url

    def parts(self) -> tuple["WorkUnit", ...]:
        """A unit for each of several files with rows of their own; any other unit itself."""
        if len(self.files) == 1 or self.files_are_rows:
            return (self,)
        return tuple(
            replace(self, files=(file,), start=0, stop=file.size, size_bytes=file.size)
            for file in self.files
        )


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """What a format is told when it cuts a file into units."""

    text_field: str | None
    eos_id: int  # ends a document among ids
    unit_bytes: int  # about so many make a unit
    first_bytes: FirstBytes


def whole_file(file: InputFile, cutting: Cutting) -> list[Range]:
    """The `cut` of formats whose files are read from the beginning on only."""
    cutting.first_bytes.look_at(file)
    return [Range(0, file.size, file.size)]


def runs_within(sizes: Iterable[int], limit: int, first: int = 0) -> list[Range]:
    """Runs of neighbours within a limit of bytes, numbered from `first`; a larger one is a run
    by itself.
    """
    runs: list[Range] = []
    for number, size in enumerate(sizes, first):
        if runs and runs[-1].size_bytes + size <= limit:
            start, _, size_before = runs[-1]
            runs[-1] = Range(start, number + 1, size_before + size)
        else:
            runs.append(Range(number, number + 1, size))
    return runs


def row_of_file(unit: WorkUnit, row: int) -> str:
    """Where a row of a unit lies, for a message: in formats whose units begin at a row."""
    return f"{unit.url}: row {unit.start + row}"


def check_unchanged(unit: WorkUnit, *, is_folder: bool) -> None:
    """A file that became shorter or longer since it was cut would lose documents, or parts of
    them: a UserError.
    """
    if is_folder:  # its size is of all that lie in it
        return
    for file in unit.files:
        if "://" in file.url:  # which is looked at whenever such a file is opened
            continue
        with reading(file):
            size = Path(file.url).stat().st_size
        if size != file.size:
            listed = f"{size:,} bytes, {file.size:,} when it was listed"
            raise UserError(
                f"{file.url}: {listed}; see that nothing writes to it, and run the command again"
            )

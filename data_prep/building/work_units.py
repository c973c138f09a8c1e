"""A source's files, cut into work units.

Between `inputs`, which finds the files, and `formats`, which reads documents out of a unit. A unit
is a run of row groups, a range of bytes cut at line ends, a few text files, or a whole file.
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from data_prep.formats.known import FORMATS, first_bytes_of
from data_prep.formats.work_unit import Cutting, Range, WorkUnit, runs_within
from data_prep.inputs.sources import InputFile

MIN_UNIT_BYTES = 16 << 20
MAX_UNIT_BYTES = 512 << 20
UNITS_OF_A_SOURCE = 256  # about so many, within the limits above
# So many files have a unit each, side by side; where there are more, small ones share units.
FEW_FILES = 32
LISTING_THREADS = 16  # files on servers are looked at side by side
STEM_CHARACTERS = 60  # of a file's name in a unit's


@dataclass(frozen=True, kw_only=True)
class SourceInputs:
    """The files of a source, and how documents are read out of them."""

    source: str  # its name
    files: Sequence[InputFile]
    format: str
    text_field: str | None
    skip_bad: bool = False  # leave bad documents out instead of stopping
    eos_id: int = -1  # of the tokenizer; where the files hold ids, it ends their documents

    def unit(self, name: str, files: Sequence[InputFile], part: Range) -> WorkUnit:
        """A part of a file; or of small files, all of them."""
        return WorkUnit(
            source=self.source,
            name=name,
            files=tuple(files),
            format=self.format,
            text_field=self.text_field,
            skip_bad=self.skip_bad,
            start=part.start,
            stop=part.stop,
            size_bytes=part.size_bytes,
            files_are_rows=FORMATS[self.format].files_are_rows,
        )


def cut_units(inputs: SourceInputs, unit_bytes: int | None = None) -> list[WorkUnit]:
    """Cut a source's files into work units; a function of the files alone.

    Raises UserError for a file that is seen not to be of its format.
    """
    size = unit_bytes or bytes_of_a_unit(inputs.files)
    if FORMATS[inputs.format].files_are_rows:
        return _units_of_rows(inputs, size)
    ranges = _ranges_of_files(inputs, size)
    units = []
    for first, stop, run_bytes in _runs_of_files(inputs, size):
        files = inputs.files[first:stop]
        parts = ranges[first]
        if len(files) > 1:
            parts = [Range(0, len(files), run_bytes)]
        for number, part in enumerate(parts):
            name = _unit_name(first, files[0], number)
            units.append(inputs.unit(name, files, part))
    return units


def bytes_of_a_unit(files: Sequence[InputFile]) -> int:
    """How much of a source makes a unit."""
    share = sum(file.size for file in files) // UNITS_OF_A_SOURCE
    return min(max(share, MIN_UNIT_BYTES), MAX_UNIT_BYTES)


def _units_of_rows(inputs: SourceInputs, unit_bytes: int) -> list[WorkUnit]:
    """Units of files each of which is a document: runs of them, numbered by themselves."""
    units = []
    runs = runs_within((file.size for file in inputs.files), unit_bytes)
    for number, (first, stop, run_bytes) in enumerate(runs):
        files = inputs.files[first:stop]
        name = _unit_name(number, files[0], 0)
        units.append(inputs.unit(name, files, Range(0, len(files), run_bytes)))
    return units


def _ranges_of_files(inputs: SourceInputs, unit_bytes: int) -> list[list[Range]]:
    """How each file would be cut by itself; its beginning is read for that."""
    row = FORMATS[inputs.format]
    cutting = Cutting(
        text_field=inputs.text_field,
        eos_id=inputs.eos_id,
        unit_bytes=unit_bytes,
        first_bytes=first_bytes_of(row),
    )
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        found = pool.map(lambda file: row.cut(file, cutting), inputs.files)
        progress = tqdm(
            found,
            total=len(inputs.files),
            desc=f"listing {inputs.source}",
            leave=False,
            disable=None,
            delay=2,
        )
        ranges = list(progress)
    if row.check_files:
        row.check_files(inputs.files, inputs.eos_id, f"source {inputs.source!r}")
    return ranges


def _runs_of_files(inputs: SourceInputs, unit_bytes: int) -> list[Range]:
    """Which files are cut together: small ones of many, where the format allows it.

    Every other file is by itself, and its units are what they always were.
    """
    files = inputs.files
    if not FORMATS[inputs.format].small_files_share_units or len(files) <= FEW_FILES:
        return [Range(number, number + 1, file.size) for number, file in enumerate(files)]
    largest = min(MIN_UNIT_BYTES, unit_bytes)
    sizes = []
    for file in files:
        # Of a size that no run has room for, a file is a run by itself.
        sizes.append(file.size if file.size <= largest else unit_bytes + 1)
    return runs_within(sizes, unit_bytes)


def apart(units: Sequence[WorkUnit]) -> list[WorkUnit]:
    """The units as they were cut before small files shared them: each file has its own."""
    separate: list[WorkUnit] = []
    for unit in units:
        parts = unit.parts()
        if len(parts) == 1:
            separate += parts
            continue
        first = int(unit.name.partition("-")[0])
        for number, part in enumerate(parts, first):
            name = _unit_name(number, part.files[0], 0)
            separate.append(replace(part, name=name))
    return separate


def _unit_name(number: int, file: InputFile, part: int) -> str:
    """The name of a unit.

    It holds the number and name of its (first) file in the source, and its number among the file's
    units.
    """
    name = Path(file.name).name.split(".")[0]
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:STEM_CHARACTERS]
    return f"{number:05d}-{stem}-{part:05d}"

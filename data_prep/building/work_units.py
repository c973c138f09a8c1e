"""A source's files, cut into work units.

Between `inputs`, which finds the files, and `formats`, which reads documents out of a unit. A unit
is a run of row groups, a range of bytes cut at line ends, a few text files, or a whole file.
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from data_prep.formats.known import FORMATS, first_bytes_of
from data_prep.formats.work_unit import Cutting, Range, WorkUnit, runs_within
from data_prep.inputs.sources import InputFile

MIN_UNIT_BYTES, MAX_UNIT_BYTES = 16 << 20, 512 << 20
UNITS_OF_A_SOURCE = 256  # about so many, within the limits above
# of JSON lines: a unit each, side by side; where there are more, small ones share units
FEW_FILES = 32
LISTING_THREADS = 16


def cut_units(
    files: Sequence[InputFile],
    *,
    source: str,
    format: str,
    text_field: str | None,
    skip_bad: bool = False,
    eos_id: int = -1,
    unit_bytes: int | None = None,
) -> list[WorkUnit]:
    """Cut a source's files into work units; a function of the files alone."""
    size = unit_bytes or min(
        max(sum(file.size for file in files) // UNITS_OF_A_SOURCE, MIN_UNIT_BYTES), MAX_UNIT_BYTES
    )
    row = FORMATS[format]
    if row.files_are_rows:
        runs = runs_within((file.size for file in files), size)
        ranges = []
    else:
        cutting = Cutting(
            text_field=text_field, eos_id=eos_id, unit_bytes=size, first_bytes=first_bytes_of(row)
        )
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            found = pool.map(lambda file: row.cut(file, cutting), files)
            ranges = list(
                tqdm(
                    found,
                    total=len(files),
                    desc=f"listing {source}",
                    leave=False,
                    disable=None,
                    delay=2,
                )
            )
        if row.check_files:
            row.check_files(files, eos_id, f"source {source!r}")
        runs = [Range(number, number + 1, file.size) for number, file in enumerate(files)]
        if row.small_files_share_units and len(files) > FEW_FILES:
            runs = _runs_of_small_files(files, size)
    units = []
    for order, (first, stop, run_bytes) in enumerate(runs):
        group = tuple(files[first:stop])
        is_shared = row.files_are_rows or len(group) > 1
        cuts = [Range(0, len(group), run_bytes)] if is_shared else ranges[first]
        number = order if row.files_are_rows else first
        units += [
            WorkUnit(
                source=source,
                name=_unit_name(number, group[0], part),
                files=group,
                format=format,
                text_field=text_field,
                skip_bad=skip_bad,
                start=start,
                stop=stop,
                size_bytes=size_bytes,
                files_are_rows=row.files_are_rows,
            )
            for part, (start, stop, size_bytes) in enumerate(cuts)
        ]
    return units


def apart(units: Sequence[WorkUnit]) -> list[WorkUnit]:
    """The same files of JSON lines, a unit each: how they were cut before small ones shared
    units.
    """
    separate: list[WorkUnit] = []
    for unit in units:
        parts = unit.parts()
        first = int(unit.name.partition("-")[0])
        named = [
            replace(part, name=_unit_name(first + i, part.files[0], 0))
            for i, part in enumerate(parts)
        ]
        separate += named if len(parts) > 1 else parts
    return separate


def _runs_of_small_files(files: Sequence[InputFile], unit_bytes: int) -> list[Range]:
    """Neighbours that are small, together; every other file by itself, whose units then are what
    they always were.
    """
    largest = min(MIN_UNIT_BYTES, unit_bytes)
    sizes = [file.size if file.size <= largest else unit_bytes + 1 for file in files]
    return runs_within(sizes, unit_bytes)


def _unit_name(number: int, file: InputFile, part: int) -> str:
    """Of a unit: the number and name of its (first) file in the source, and its number among the
    file's units.
    """
    return f"{number:05d}-{_stem(file)}-{part:05d}"


def _stem(file: InputFile) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", Path(file.name).name.split(".")[0])[:60]

"""Work units: the parts of a source's files that any rank can take and read on its own.

Between `inputs`, which finds the files, and `corpus`, which reads documents out of a unit. A unit
is a run of row groups, a range of bytes cut at line ends, a few text files, or a whole file.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_prep.errors import UserError, explained
from data_prep.formats import json_lines, parquet_footer
from data_prep.formats.first_bytes import FIRST_BYTES, JSONL_FORMATS, check_first_bytes
from data_prep.formats.pretokenized import documents as pretokenized
from data_prep.formats.pretokenized import flat_ids
from data_prep.inputs.sources import InputFile, open_input, reading

MIN_UNIT_BYTES, MAX_UNIT_BYTES = 16 << 20, 512 << 20
UNITS_OF_A_SOURCE = 256  # about so many, within the limits above
# of JSON lines: a unit each, side by side; where there are more, small ones share units
FEW_FILES = 32
LISTING_THREADS = 16
SEARCH_BYTES = 256 << 10  # in pieces of so many a line's end is looked for
ENDINGS = ("parquet", *JSONL_FORMATS, "txt", "arrow", "csv")  # of files' names, each a format
FORMATS = (*ENDINGS, "save_to_disk", *pretokenized.FORMATS)
FORMATS_WITHOUT_FIELD = ("txt", *pretokenized.FORMATS)
Range = tuple[int, int, int]  # start, stop, bytes


@dataclass(frozen=True, kw_only=True)
class WorkUnit:
    """A part of one input file, or several small files of text or JSON lines: at most one shard
    per split.
    """

    source: str
    name: str
    files: tuple[InputFile, ...]  # one; of small files, all that belong to it
    format: str
    text_field: str | None
    skip_bad: bool  # leave bad documents out instead of stopping
    start: int  # first row group, byte, document, row or file
    stop: int
    size_bytes: int  # what progress and the balance of ranks go by

    @property
    def url(self) -> str:
        """Where its (first) file lies."""
        return self.files[0].url

    def parts(self) -> tuple["WorkUnit", ...]:
        """A unit for each of several files of JSON lines; any other unit itself."""
        if len(self.files) == 1 or self.format not in JSONL_FORMATS:
            return (self,)
        return tuple(
            replace(self, files=(f,), start=0, stop=f.size, size_bytes=f.size) for f in self.files
        )


def format_of(name: str, where: str) -> str:
    """The format that a file's name tells. Raises UserError if it tells none."""
    known = re.sub(r"\.(nd)?json\b", ".jsonl", name.lower())
    if found := [ending for ending in ENDINGS if known.endswith("." + ending)]:
        return found[0]
    raise UserError(
        f"{where}: the format of {name} is not known from its name; give one of "
        f"{', '.join(FORMATS)}"
    )


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
    if format == "txt":
        runs = runs_within((file.size for file in files), size)
        ranges = []
    else:
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            found = pool.map(lambda file: _ranges(file, format, text_field, eos_id, size), files)
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
        if format == "uint16":
            flat_ids.check_lengths(files, eos_id, f"source {source!r}")
        runs = [(number, number + 1, file.size) for number, file in enumerate(files)]
        if format in JSONL_FORMATS and len(files) > FEW_FILES:
            runs = _runs_of_small_files(files, size)
    units = []
    for order, (first, stop, run_bytes) in enumerate(runs):
        group = tuple(files[first:stop])
        is_shared = format == "txt" or len(group) > 1
        cuts = [(0, len(group), run_bytes)] if is_shared else ranges[first]
        number = order if format == "txt" else first
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


def runs_within(sizes: Iterable[int], limit: int, first: int = 0) -> list[Range]:
    """Runs of neighbours within a limit of bytes, numbered from `first`; a larger one is a run
    by itself.
    """
    runs: list[Range] = []
    for number, size in enumerate(sizes, first):
        if runs and runs[-1][2] + size <= limit:
            runs[-1] = (runs[-1][0], number + 1, runs[-1][2] + size)
        else:
            runs.append((number, number + 1, size))
    return runs


def _ranges(
    file: InputFile, format: str, text_field: str | None, eos_id: int, unit_bytes: int
) -> list[Range]:
    """The units of one file."""
    if format in pretokenized.FORMATS:
        return pretokenized.cut_ids(file, format, eos_id, unit_bytes)
    if format == "save_to_disk":
        rows = len(load_from_disk(file))
        step = max(1, rows * unit_bytes // max(file.size, 1))
        return [
            (at, min(at + step, rows), min(step, rows - at) * file.size // rows)
            for at in range(0, rows, step)
        ]
    with reading(file), open_input(file, SEARCH_BYTES * (format == "jsonl")) as stream:
        check_first_bytes(file, format, stream.read(FIRST_BYTES))
        cuts = (
            json_lines.line_cuts(stream, file.size, unit_bytes)
            if format == "jsonl"
            else [0, file.size]
        )
    if format == "parquet":
        parquet = open_parquet(file, text_field)
        return row_group_runs(
            parquet, range(parquet.metadata.num_row_groups), text_field, unit_bytes
        )
    return [(start, stop, stop - start) for start, stop in itertools.pairwise(cuts)]


def row_group_runs(
    file: pq.ParquetFile, numbers: range, text_field: str | None, limit_bytes: int
) -> list[Range]:
    """Runs of row groups within limit_bytes of text."""
    sizes = []
    for group in map(file.metadata.row_group, numbers):
        columns = [group.column(i) for i in range(group.num_columns)]
        sizes.append(
            sum(c.total_uncompressed_size for c in columns if c.path_in_schema == text_field)
        )
    return runs_within(sizes, limit_bytes, numbers.start)


def open_parquet(file: InputFile, text_field: str | None) -> pq.ParquetFile:
    """Open a parquet file and check that its text column is there and holds text."""
    is_remote = "://" in file.url
    with explained(
        # the last where what the footer says of its writer is not UTF-8
        (pa.ArrowException, OSError, UnicodeDecodeError),
        f"{file.url}: not a readable parquet file",
        "fetch or write it again",
    ):
        with open_input(file, 0) as stream:
            parquet = pq.ParquetFile(
                open_input(file, 0) if is_remote else file.url, pre_buffer=is_remote
            )
            parquet_footer.refuse_encrypted(file, stream, parquet.metadata.created_by)
        check_schema(file, parquet.schema_arrow, text_field)
    return parquet


def check_schema(file: InputFile, schema: pa.Schema, text_field: str | None) -> None:
    """The text column is there and holds text."""
    with explained(
        UnicodeDecodeError,
        f"{file.url}: damaged, a column's name is not UTF-8",
        "fetch or write it again",
    ):
        check_column(file, schema.names, text_field)
    type_ = schema.field(schema.names.index(text_field)).type
    if not _is_text(type_):
        others = ", ".join(column.name for column in schema if _is_text(column.type))[:1000]
        write = "write the text as a column of strings"
        advice = (
            f"{write}, or set text_field to one that is: {others}"
            if others
            else f"no column is; {write}"
        )
        raise UserError(
            f"{file.url}: column {text_field!r} is of type {type_}, expected string; {advice}"
        )


def _is_text(type_: pa.DataType) -> bool:
    value_type = type_.value_type if pa.types.is_dictionary(type_) else type_
    return value_type in (pa.string(), pa.large_string(), pa.string_view())


def check_column(file: InputFile, names: list[str], text_field: str | None) -> None:
    """The text column is among the columns."""
    if text_field not in names:
        columns = ", ".join(names)[:1000]
        raise UserError(
            f"{file.url}: no column {text_field!r}, it has: {columns}; set text_field to the "
            "text's column"
        )


def load_from_disk(file: InputFile) -> Any:
    """A data set that `datasets` saved."""
    import datasets

    with explained(Exception, f"{file.url}: datasets can't load it", "save it again"):
        return datasets.load_from_disk(str(Path(file.url).parent))

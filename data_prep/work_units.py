"""Work units: the parts of a source's files that any rank can take and read on its own.

Between `inputs`, which finds the files, and `corpus`, which reads documents out of a unit. A unit is a run
of row groups, a range of bytes cut at line ends, a few text files, or a whole file.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_prep import json_lines, pretokenized
from data_prep.errors import UserError, explained
from data_prep.inputs import InputFile, open_input, reading

MIN_UNIT_BYTES, MAX_UNIT_BYTES = 16 << 20, 512 << 20
UNITS_OF_A_SOURCE = 256  # about so many, within the limits above
LISTING_THREADS = 16
SEARCH_BYTES = 256 << 10  # in pieces of so many a line's end is looked for
JSONL_FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst")
ENDINGS = ("parquet", *JSONL_FORMATS, "txt", "arrow", "csv")  # of files' names, each a format
FORMATS = (*ENDINGS, "save_to_disk", *pretokenized.FORMATS)
FORMATS_WITHOUT_FIELD = ("txt", *pretokenized.FORMATS)
FIRST_BYTES = {  # 8 at most; none of them begins text
    b"PAR1\x15": ("parquet", "parquet"), b"ARROW1\0\0": ("arrow", "arrow"), b"\xff\xff\xff\xff": ("arrow", "arrow"),
    b"\x1f\x8b": ("gzip", "jsonl.gz"), b"\x28\xb5\x2f\xfd": ("zstd", "jsonl.zst"),
}  # fmt: skip

Range = tuple[int, int, int]  # start, stop, bytes


@dataclass(frozen=True, kw_only=True)
class WorkUnit:
    """A part of one input file, or several text files, that becomes at most one shard per split."""

    source: str
    name: str
    files: tuple[InputFile, ...]  # one; of text files, all that belong to it
    format: str
    text_field: str | None
    skip_bad: bool  # leave bad documents out instead of stopping
    start: int  # first row group, byte, document or row
    stop: int
    size_bytes: int  # what progress and the balance of ranks go by

    @property
    def url(self) -> str:
        """Where its (first) file lies."""
        return self.files[0].url


def format_of(name: str, where: str) -> str:
    """The format that a file's name tells. Raises UserError if it tells none."""
    known = re.sub(r"\.(nd)?json\b", ".jsonl", name.lower())
    if found := [ending for ending in ENDINGS if known.endswith("." + ending)]:
        return found[0]
    raise UserError(f"{where}: the format of {name} is not known from its name; give one of {', '.join(FORMATS)}")


def cut_units(
    files: Sequence[InputFile], *, source: str, format: str, text_field: str | None, skip_bad: bool = False,
    eos_id: int = -1, unit_bytes: int | None = None,
) -> list[WorkUnit]:  # fmt: skip
    """Cut a source's files into work units; a function of the files alone."""
    size = unit_bytes or min(max(sum(file.size for file in files) // UNITS_OF_A_SOURCE, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    if format == "txt":
        runs = runs_within((file.size for file in files), size)
        grouped = [files[start:stop] for start, stop, _ in runs]
        ranges = [[(0, stop - start, run_bytes)] for start, stop, run_bytes in runs]
    else:
        grouped = [[file] for file in files]
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            found = pool.map(lambda file: _ranges(file, format, text_field, eos_id, size), files)
            ranges = list(tqdm(found, total=len(files), desc=f"listing {source}", leave=False, disable=None, delay=2))
    return [
        WorkUnit(
            source=source, name=f"{order:05d}-{_stem(group[0])}-{number:05d}", files=tuple(group), format=format,
            text_field=text_field, skip_bad=skip_bad, start=start, stop=stop, size_bytes=size_bytes,
        )
        for order, (group, cuts) in enumerate(zip(grouped, ranges, strict=True))
        for number, (start, stop, size_bytes) in enumerate(cuts)
    ]  # fmt: skip


def _stem(file: InputFile) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", Path(file.name).name.split(".")[0])[:60]


def runs_within(sizes: Iterable[int], limit: int, first: int = 0) -> list[Range]:
    """Runs of neighbours within a limit of bytes, numbered from `first`; a larger one is a run by itself."""
    runs: list[Range] = []
    for number, size in enumerate(sizes, first):
        if runs and runs[-1][2] + size <= limit:
            runs[-1] = (runs[-1][0], number + 1, runs[-1][2] + size)
        else:
            runs.append((number, number + 1, size))
    return runs


def _ranges(file: InputFile, format: str, text_field: str | None, eos_id: int, unit_bytes: int) -> list[Range]:
    """The units of one file."""
    if format in pretokenized.FORMATS:
        return pretokenized.cut_ids(file, format, eos_id, unit_bytes)
    if format == "save_to_disk":
        rows = len(load_from_disk(file))
        step = max(1, rows * unit_bytes // max(file.size, 1))
        return [(at, min(at + step, rows), min(step, rows - at) * file.size // rows) for at in range(0, rows, step)]
    with reading(file), open_input(file, SEARCH_BYTES * (format == "jsonl")) as stream:
        check_first_bytes(file, format, stream.read(8))
        cuts = json_lines.line_cuts(stream, file.size, unit_bytes) if format == "jsonl" else [0, file.size]
    if format == "parquet":
        parquet = open_parquet(file, text_field)
        return row_group_runs(parquet, range(parquet.metadata.num_row_groups), text_field, unit_bytes)
    return [(start, stop, stop - start) for start, stop in itertools.pairwise(cuts)]


def row_group_runs(file: pq.ParquetFile, numbers: range, text_field: str | None, limit_bytes: int) -> list[Range]:
    """Runs of row groups within limit_bytes of text."""
    sizes = []
    for group in map(file.metadata.row_group, numbers):
        columns = [group.column(i) for i in range(group.num_columns)]
        sizes.append(sum(c.total_uncompressed_size for c in columns if c.path_in_schema == text_field))
    return runs_within(sizes, limit_bytes, numbers.start)


def open_parquet(file: InputFile, text_field: str | None) -> pq.ParquetFile:
    """Open a parquet file and check that its text column is there and holds text."""
    is_remote = "://" in file.url
    with explained((pa.ArrowException, OSError), f"{file.url}: not a readable parquet file", "fetch or write it again"):
        parquet = pq.ParquetFile(open_input(file, 0) if is_remote else file.url, pre_buffer=is_remote)
        check_schema(file, parquet.schema_arrow, text_field)
    return parquet


def check_first_bytes(file: InputFile, format: str, first: bytes) -> None:
    """Raises UserError if a file's first bytes are not of the format that it is to be read in."""
    is_text = format in ("jsonl", "txt", "csv")
    known = FIRST_BYTES if is_text else FIRST_BYTES | {b"{": ("JSON", "jsonl")}
    for magic, (kind, right) in known.items():
        if first.startswith(magic) and right != format:
            raise UserError(f"{file.url}: {kind} by its first bytes, not {format}; set format: {right}")


def check_schema(file: InputFile, schema: pa.Schema, text_field: str | None) -> None:
    """The text column is there and holds text."""
    with explained(UnicodeDecodeError, f"{file.url}: damaged, a column's name is not UTF-8", "fetch or write it again"):
        check_column(file, schema.names, text_field)
    type_ = schema.field(schema.names.index(text_field)).type
    value_type = type_.value_type if pa.types.is_dictionary(type_) else type_
    if value_type not in (pa.string(), pa.large_string(), pa.string_view()):
        raise UserError(f"{file.url}: column {text_field!r} is of type {type_}, expected string; set text_field")


def check_column(file: InputFile, names: list[str], text_field: str | None) -> None:
    """The text column is among the columns."""
    if text_field not in names:
        columns = ", ".join(names)[:1000]
        raise UserError(f"{file.url}: no column {text_field!r}, it has: {columns}; set text_field to the text's column")


def load_from_disk(file: InputFile) -> Any:
    """A data set that `datasets` saved."""
    import datasets

    with explained(Exception, f"{file.url}: datasets can't load it", "save it again"):
        return datasets.load_from_disk(str(Path(file.url).parent))

"""Parquet: a row is a document, and a few row groups are a unit."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.errors import explained
from data_prep.formats import documents, parquet_footer
from data_prep.formats.arrow import check_schema
from data_prep.formats.documents import ANEW, Documents, Reading, all_rows, rows_of_a_batch
from data_prep.formats.work_unit import Cutting, Range, WorkUnit, runs_within
from data_prep.inputs.sources import InputFile, open_input


def cut(file: InputFile, cutting: Cutting) -> list[Range]:
    """Runs of row groups."""
    cutting.first_bytes.look_at(file)
    parquet = open_parquet(file, cutting.text_field)
    row_groups = range(parquet.metadata.num_row_groups)
    return row_group_runs(parquet, row_groups, cutting.text_field, cutting.unit_bytes)


def read(unit: WorkUnit, given: Reading) -> Iterator[Documents]:
    """A few row groups at a time; a large one in parts."""
    file = open_parquet(unit.files[0], unit.text_field)
    row_groups = range(unit.start, unit.stop)
    runs = row_group_runs(file, row_groups, unit.text_field, documents.BATCH_BYTES)
    for start, stop, size_bytes in runs:
        numbers = list(range(start, stop))
        rows = sum(file.metadata.row_group(number).num_rows for number in numbers)
        batch_rows = rows_of_a_batch(rows, size_bytes)
        where = f"{unit.url}: row groups {start} to {stop - 1}"
        with explained((pa.ArrowException, OSError), f"{where}: damaged", ANEW):
            columns = [unit.text_field]
            for batch in file.iter_batches(batch_rows, numbers, columns, use_threads=False):
                yield all_rows(batch.column(0))


def place(unit: WorkUnit, row: int) -> str:
    """Where a row of a unit lies, for a message."""
    metadata = open_parquet(unit.files[0], unit.text_field).metadata
    rows_before = sum(metadata.row_group(number).num_rows for number in range(unit.start))
    return f"{unit.url}: row {rows_before + row}"


def row_group_runs(
    file: pq.ParquetFile, numbers: range, text_field: str | None, limit_bytes: int
) -> list[Range]:
    """Runs of row groups within limit_bytes of text."""
    sizes = []
    for number in numbers:
        group = file.metadata.row_group(number)
        columns = [group.column(i) for i in range(group.num_columns)]
        texts = [column for column in columns if column.path_in_schema == text_field]
        sizes.append(sum(column.total_uncompressed_size for column in texts))
    return runs_within(sizes, limit_bytes, numbers.start)


def open_parquet(file: InputFile, text_field: str | None) -> pq.ParquetFile:
    """Open a parquet file and check that its text column is there and holds text."""
    is_remote = "://" in file.url
    problem = f"{file.url}: not a readable parquet file"
    # The last is for a footer that names its writer in bytes that are not UTF-8.
    with explained((pa.ArrowException, OSError, UnicodeDecodeError), problem, ANEW):
        with open_input(file, 0) as stream:
            content = open_input(file, 0) if is_remote else file.url
            parquet = pq.ParquetFile(content, pre_buffer=is_remote)
            parquet_footer.refuse_encrypted(file, stream, parquet.metadata.created_by)
        check_schema(file, parquet.schema_arrow, text_field)
    return parquet

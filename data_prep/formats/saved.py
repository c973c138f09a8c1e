"""A data set that `datasets` saved: a row is a document, and a run of rows is a unit.

It is a directory. `state.json` in it stands for all of it, with the size and the versions of the
files that hold the rows.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, explained
from data_prep.formats.arrow import check_schema
from data_prep.formats.documents import Documents, Reading, all_rows, rows_of_a_batch
from data_prep.formats.work_unit import Cutting, Range, WorkUnit
from data_prep.inputs.sources import InputFile, find_inputs
from data_prep.inputs.urls import without_credentials

MAX_BATCH_ROWS = 1000
SAVE_AGAIN = "save it again"


def find(base: Path, pattern: str, where: str) -> list[InputFile]:
    """The directory, as its `state.json`."""
    if "://" in pattern:
        problem = f"{without_credentials(pattern)}: save_to_disk is read from local disks"
        raise UserError(f"{where}: {problem}; copy it to one, name its path")
    parts = find_inputs(base, f"{pattern}/*.arrow", where)
    state = find_inputs(base, f"{pattern}/state.json", where)[0]
    size = sum(file.size for file in parts)
    versions = ",".join(file.version for file in parts)
    return [replace(state, size=size, version=versions)]


def cut(file: InputFile, cutting: Cutting) -> list[Range]:
    """Runs of rows, as many to each as if all had the same size."""
    rows = len(load_from_disk(file))
    unit_rows = max(1, rows * cutting.unit_bytes // max(file.size, 1))
    ranges = []
    for start in range(0, rows, unit_rows):
        stop = min(start + unit_rows, rows)
        size_bytes = (stop - start) * file.size // rows
        ranges.append(Range(start, stop, size_bytes))
    return ranges


def read(unit: WorkUnit, given: Reading) -> Iterator[Documents]:
    """Rows in the order of `datasets`, which may not be that of its files."""
    file = unit.files[0]
    saved = load_from_disk(file)
    check_schema(file, saved.features.arrow_schema, unit.text_field)
    rows = range(unit.start, unit.stop)
    batch_rows = min(MAX_BATCH_ROWS, rows_of_a_batch(len(rows), unit.size_bytes))
    # Its exceptions have no base.
    with explained(Exception, f"{unit.url}: datasets can't read it", SAVE_AGAIN):
        part = saved.select(rows).select_columns([unit.text_field])
        for table in part.with_format("arrow").iter(batch_rows):
            yield all_rows(table.column(0))


def load_from_disk(file: InputFile) -> Any:
    """The data set, as `datasets` loads it. Imported here: it takes seconds."""
    import datasets

    with explained(Exception, f"{file.url}: datasets can't load it", SAVE_AGAIN):
        return datasets.load_from_disk(str(Path(file.url).parent))

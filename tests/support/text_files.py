"""Files of text in every format, the units that they are cut into, and what is read from those."""

import csv
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data_prep.building.work_units import SourceInputs, cut_units
from data_prep.errors import UserError
from data_prep.formats.known import read_documents
from data_prep.formats.work_unit import WorkUnit
from data_prep.inputs.sources import InputFile

Bad = list[tuple[int, str]]


def input_files(*paths: Path) -> list[InputFile]:
    return [
        InputFile(name=path.name, url=str(path), size=path.stat().st_size, version="")
        for path in paths
    ]


def units_of(
    *paths: Path, format: str, unit_bytes: int = 1 << 20, skip_bad: bool = False
) -> list[WorkUnit]:
    field = None if format == "txt" else "text"
    files = input_files(*paths)
    inputs = SourceInputs(
        source="s", files=files, format=format, text_field=field, skip_bad=skip_bad
    )
    return cut_units(inputs, unit_bytes)


def read(units: list[WorkUnit]) -> tuple[list[str], list[int], Bad]:
    """All texts, their rows, and the documents left out.

    Rows are counted through the file, as the manifest does it.
    """
    texts, rows, bad, rows_before = [], [], [], 0
    for unit in units:
        rows_read = 0
        for batch in read_documents(unit):
            texts += batch.texts.to_pylist()
            rows += (batch.rows + rows_before).tolist()
            bad += [(row + rows_before, reason) for row, reason in batch.bad]
            rows_read += batch.rows_read
            assert len(batch.texts) + len(batch.bad) + batch.empty <= batch.rows_read
        rows_before += rows_read
    return texts, rows, bad


def read_error(path: Path, format: str, unit_bytes: int = 1 << 20, skip_bad: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        read(units_of(path, format=format, unit_bytes=unit_bytes, skip_bad=skip_bad))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_arrow(
    path: Path, texts: list[Any], type_: pa.DataType | None = None, *, as_file: bool = False
) -> Path:
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, type_ or pa.string())})
    with (pa.ipc.new_file if as_file else pa.ipc.new_stream)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


def write_csv(path: Path, texts: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "text"), *enumerate(texts)])
    return path

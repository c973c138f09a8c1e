"""Damaged files of every format give documents or a UserError: no other exception, no crash of
the process, no hang.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.damage import damaged
from support.files_of_ids import EOS, llm_c_header, write_megatron, write_uint16
from support.prep_helpers import NASTY_TEXTS, write_jsonl, write_parquet
from support.text_files import input_files, write_arrow, write_csv

from data_prep.building.work_units import cut_units
from data_prep.errors import UserError
from data_prep.formats.known import read_documents
from data_prep.formats.pretokenized import documents as pretokenized
from data_prep.inputs.sources import InputFile

CASES = int(os.environ.get("FUZZ_CASES", "40"))
TEXTS = [*NASTY_TEXTS, "", "x" * 300, *(f"document {i} of many" for i in range(30))]
IDS = [[[1, 2, 3], [4]], [[]], [[7] * 50], *([[i, i + 1]] for i in range(6, 40))]
fuzz = settings(
    max_examples=CASES, deadline=None, derandomize="FUZZ_CASES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def write_text(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def write_arrow_file(path: Path, texts: list[str]) -> Path:
    return write_arrow(path, texts, as_file=True)


TEXT_FORMATS: dict[str, tuple[str, Callable[..., Path]]] = {
    "jsonl": ("jsonl", write_jsonl),
    "jsonl.gz": ("jsonl.gz", write_jsonl),
    "jsonl.zst": ("jsonl.zst", write_jsonl),
    "parquet": ("parquet", write_parquet),
    "arrow": ("arrow", write_arrow),
    "arrow file": ("arrow", write_arrow_file),
    "csv": ("csv", write_csv),
    "txt": ("txt", write_text),
}


@fuzz
@given(st.data())
@pytest.mark.parametrize("kind", TEXT_FORMATS)
def test_damaged_files_of_text(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """For the long form, set the environment's FUZZ_CASES to 2000: so many cases for each
    format.
    """
    format, write = TEXT_FORMATS[kind]
    path = write(tmp_path / f"a.{format}", TEXTS)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    field, skip_bad = None if format == "txt" else "text", data.draw(st.booleans())
    rows, message = 0, ""
    try:
        for unit in cut_units(
            input_files(path),
            source="s",
            format=format,
            text_field=field,
            skip_bad=skip_bad,
            unit_bytes=1000,
        ):
            for batch in read_documents(unit):
                assert all(batch.texts.to_pylist())
                assert len(batch.texts) + batch.empty + len(batch.bad) <= batch.rows_read
                rows += batch.rows_read
    except UserError as error:
        message = str(error)
    assert not message or str(path) in message
    assert message or format != "parquet" or rows == pq.read_metadata(path).num_rows


@fuzz
@given(st.data())
@pytest.mark.parametrize("kind", ["uint16", "uint16 of llm.c", "megatron", "megatron's idx"])
def test_damaged_files_of_ids(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """The long form as above."""
    format = "megatron" if kind.startswith("megatron") else "uint16"
    path = tmp_path / "a.bin"
    if format == "megatron":
        write_megatron(path, IDS, append_eod=True)
    else:
        ids = [token for document in IDS for sequence in document for token in [*sequence, EOS]]
        write_uint16(path, ids, llm_c_header(len(ids)) if kind == "uint16 of llm.c" else b"")
    target = path.with_suffix(".idx") if kind == "megatron's idx" else path
    target.write_bytes(data.draw(damaged(target.read_bytes())))
    file = InputFile(name=path.name, url=str(path), size=path.stat().st_size, version="")
    message = ""
    try:
        for start, stop, _ in pretokenized.cut_ids(file, format, EOS, 40):
            for ids, offsets in pretokenized.read_ids(file, format, start, stop, EOS):
                assert offsets[0] == 0
                assert offsets[-1] == len(ids)
                assert (offsets[1:] >= offsets[:-1]).all()
    except UserError as error:
        message = str(error)
    assert not message or str(path.with_suffix("")) in message

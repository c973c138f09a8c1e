"""Documents come out of every format whole, in order, with their rows; bad ones are named."""

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_helpers import write_jsonl, write_parquet

from data_prep.corpus import WorkUnit, _lines, cut_units, find_files, read_documents
from data_prep.errors import UserError

pytest_plugins = ("prep_fixtures",)


def units_of(path: Path, format: str, unit_bytes: int = 1 << 20) -> list[WorkUnit]:
    field = None if format == "txt" else "text"
    return cut_units(path.parent, [path.name], source="s", format=format, text_field=field, unit_bytes=unit_bytes)


def read(units: list[WorkUnit]) -> tuple[list[str], list[int]]:
    """All texts, and their rows counted through the file as the manifest does it."""
    texts, rows, rows_before = [], [], 0
    for unit in units:
        rows_read = 0
        for documents in read_documents(unit):
            texts += documents.texts.to_pylist()
            rows += (documents.rows + rows_before).tolist()
            rows_read += documents.rows_read
        rows_before += rows_read
    return texts, rows


def read_error(path: Path, format: str, unit_bytes: int = 1 << 20) -> str:
    with pytest.raises(UserError) as caught:
        read(units_of(path, format, unit_bytes))
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("unit_bytes", [100, 20_000, 1 << 30])
@pytest.mark.parametrize("format", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst"])
def test_round_trip_however_the_file_is_cut(tmp_path: Path, texts: list[str], format: str, unit_bytes: int) -> None:
    write = write_parquet if format == "parquet" else write_jsonl
    path = write(tmp_path / f"speeches.{format}", ["", *texts])
    units = units_of(path, format, unit_bytes)
    assert read(units) == (texts, list(range(1, len(texts) + 1)))
    assert len({unit.name for unit in units}) == len(units)
    if format in ("parquet", "jsonl"):
        assert (len(units) > 1) == (unit_bytes < 1 << 30)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("two\r\nlines 🙂\n".encode())
    assert read(units_of(path, "txt")) == (["two\r\nlines 🙂\n"], [0])


@settings(deadline=None)
@given(documents=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)), unit_bytes=st.integers(1, 99))
def test_any_text_survives_jsonl(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], unit_bytes: int
) -> None:
    path = write_jsonl(tmp_path_factory.mktemp("any") / "any.jsonl", documents)
    assert read(units_of(path, "jsonl", unit_bytes))[0] == documents


@given(st.lists(st.sampled_from([b"", b"a", b"\n", b"bc\n", b"\n\n", b"d\ne"])))
def test_lines_do_not_depend_on_the_chunks(chunks: list[bytes]) -> None:
    whole = b"".join(chunks)
    assert list(_lines(iter(chunks))) == whole.removesuffix(b"\n").split(b"\n") * bool(whole)


def test_blank_lines_are_rows_without_a_document(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "x"}\n  \r\n{"text": ""}\n{"text": "y"}')
    for unit_bytes in (1, 5, 1 << 20):
        assert read(units_of(path, "jsonl", unit_bytes)) == (["x", "y"], [1, 4])


def test_compressed_streams_may_be_joined(tmp_path: Path) -> None:
    one, two = b'{"text": "x"}\n', b'{"text": "y"}\n'
    for name, compress in (("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)):
        path = tmp_path / name
        path.write_bytes(compress(one) + compress(two))
        assert read(units_of(path, name.removeprefix("a."))) == (["x", "y"], [0, 1])


@pytest.mark.parametrize("type_", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_type_of_text_column(tmp_path: Path, type_: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    array = (
        pa.array(["x", "yy", "x"]).cast(type_) if pa.types.is_dictionary(type_) else pa.array(["x", "yy", "x"], type_)
    )
    pq.write_table(pa.table({"text": array}), path)
    assert read(units_of(path, "parquet")) == (["x", "yy", "x"], [0, 1, 2])


def test_globs_are_sorted_and_named_as_written(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("x")
    assert find_files(tmp_path, "in/*.txt", "here") == ["in/a.txt", "in/b.txt"]
    assert find_files(tmp_path, "in/**/*.txt", "here") == ["in/a.txt", "in/b.txt", "in/deep/c.txt"]
    assert find_files(tmp_path, str(tmp_path / "in/a*"), "here") == [str(tmp_path / "in/a.txt")]
    with pytest.raises(UserError, match=r"here: no file matches in/\*\.parquet"):
        find_files(tmp_path, "in/*.parquet", "here")
    with pytest.raises(UserError, match=r"in is a directory; name its files, for example in/\*"):
        find_files(tmp_path, "in", "here")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "x"', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["x"]', "a JSON list, expected an object with the field 'text'"),
        (b'{"body": "x", "id": 1}', "no field 'text', it has: body, id"),
        (b'{"text": null}', "'text' is null, expected text"),
        (b'{"text": 5}', "'text' is of type int, expected text"),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
        (b'{"text": "\\ud800"}', "half a surrogate pair at character 0"),
    ],
)
@pytest.mark.parametrize("unit_bytes", [10, 1 << 20])
def test_bad_lines_are_named(tmp_path: Path, line: bytes, expected: str, unit_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n\n' * 3 + line + b'\n{"text": "y"}\n')
    message = read_error(path, "jsonl", unit_bytes)
    assert f"{path}: line 7: " in message
    assert expected in message


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("a.jsonl.gz", lambda whole: whole[:-9], "the compressed stream ends early"),
        ("a.jsonl.gz", lambda whole: b"", "the compressed stream ends early"),
        ("a.jsonl.gz", lambda whole: whole[:50] + b"\xff\xff\xff\xff" + whole[54:], "damaged"),
        ("a.jsonl.gz", lambda whole: whole + b"rubbish", "damaged after line 40"),
        ("a.jsonl.zst", lambda whole: whole[:-9], "the compressed stream ends early"),
        ("a.jsonl.zst", lambda whole: b"rubbish" + whole, "damaged"),
        ("a.parquet", lambda whole: b"", "not a readable parquet file"),
        ("a.parquet", lambda whole: whole[:-9], "not a readable parquet file"),
        ("a.parquet", lambda whole: whole[:40] + bytes(4000) + whole[4040:], "row groups 0 to 5: damaged"),
    ],
)
def test_damaged_files_are_named(
    tmp_path: Path, texts: list[str], name: str, damage: Callable[[bytes], bytes], expected: str
) -> None:
    write = write_parquet if name.endswith("parquet") else write_jsonl
    path = write(tmp_path / name, texts[:40])
    path.write_bytes(damage(path.read_bytes()))
    assert expected in read_error(path, name.removeprefix("a."))


def test_bad_parquet_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "url": ["y"]}), path)
    assert "no column 'text', it has: body, url" in read_error(path, "parquet")
    write_parquet(path, [1, 2], pa.int64())
    assert "column 'text' is of type int64, expected string" in read_error(path, "parquet")
    write_parquet(path, [*"abcdefgh", None])
    assert "row 8: 'text' is null, expected text" in read_error(path, "parquet")


def test_invalid_utf8_in_parquet_and_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    offsets, data = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"x\xff")
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])})
    pq.write_table(table, path)
    assert "row 1: invalid UTF-8 at byte 0" in read_error(path, "parquet")
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\x80")
    assert "invalid UTF-8 at byte 3" in read_error(path, "txt")


def test_unit_names_are_safe_and_unique(tmp_path: Path) -> None:
    for name in ("a b.txt", "a_b.txt", "../odd/a b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files = ["a b.txt", "a_b.txt", "../odd/a b.txt"]
    units = cut_units(tmp_path, files, source="s", format="txt", text_field=None)
    assert [unit.name for unit in units] == ["00000-a_b-00000", "00001-a_b-00000", "00002-a_b-00000"]


def test_a_unit_is_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.corpus.BATCH_BYTES", 10)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 6}) + "\n\n" for _ in range(5)))
    (unit,) = units_of(path, "jsonl")
    batches = list(read_documents(unit))
    assert [len(batch.texts) for batch in batches] == [2, 2, 1]
    assert list(itertools.chain(*(batch.rows.tolist() for batch in batches))) == [0, 2, 4, 6, 8]
    assert sum(batch.rows_read for batch in batches) == 10
    assert sum(batch.input_bytes for batch in batches) == unit.size_bytes

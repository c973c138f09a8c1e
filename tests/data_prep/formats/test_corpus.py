"""Documents come out of every format whole, in order, with their rows; bad ones are named, or
left out and listed.
"""

import functools
import gzip
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from support.prep_helpers import (
    NASTY_TEXTS,
    build,
    build_error,
    decoded,
    source,
    write_jsonl,
    write_mixture,
    write_parquet,
)
from support.text_files import Bad, read, read_error, units_of, write_arrow, write_csv

from data_prep.building.work_units import SourceInputs, cut_units
from data_prep.errors import UserError
from data_prep.formats import documents as corpus
from data_prep.formats.known import format_of, read_documents
from data_prep.inputs import sources as inputs
from data_prep.inputs.sources import InputFile

pytest_plugins = ("support.prep_fixtures",)


def save_to_disk(path: Path, dataset: datasets.Dataset) -> InputFile:
    """Written by `datasets` itself; as `build_shards` names it."""
    dataset.save_to_disk(str(path))
    size = sum(file.stat().st_size for file in path.glob("*.arrow"))
    return InputFile(name="saved/state.json", url=str(path / "state.json"), size=size, version="")


def read_saved(file: InputFile, unit_bytes: int = 1 << 20) -> tuple[list[str], list[int], Bad]:
    inputs = SourceInputs(source="s", files=[file], format="save_to_disk", text_field="text")
    units = cut_units(inputs, unit_bytes)
    assert [unit.start for unit in units[1:]] == [unit.stop for unit in units[:-1]]
    return read(units)


WRITERS: dict[str, Callable[..., Path]] = {
    "parquet": write_parquet,
    "jsonl": write_jsonl,
    "jsonl.gz": write_jsonl,
    "jsonl.zst": write_jsonl,
    "arrow": write_arrow,
    "csv": write_csv,
}


@pytest.mark.parametrize("batch_bytes", [1, 5000, 8 << 20])
@pytest.mark.parametrize("unit_bytes", [100, 70_000, 1 << 30])
@pytest.mark.parametrize("format", WRITERS)
def test_round_trip_however_the_file_is_cut(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    texts: list[str],
    format: str,
    unit_bytes: int,
    batch_bytes: int,
) -> None:
    monkeypatch.setattr(corpus, "BATCH_BYTES", batch_bytes)
    path = WRITERS[format](tmp_path / f"[speeches] *.{format}", ["", *texts])
    units = units_of(path, format=format, unit_bytes=unit_bytes)
    assert read(units) == (texts, list(range(1, len(texts) + 1)), [])
    assert len({unit.name for unit in units}) == len(units)
    assert [unit.start for unit in units[1:]] == [unit.stop for unit in units[:-1]]
    if format in ("parquet", "jsonl"):
        assert (len(units) > 1) == (unit_bytes < 1 << 30)
    if format == "parquet" and unit_bytes == 70_000:
        assert any(unit.stop - unit.start > 1 for unit in units)


def test_a_large_row_group_is_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "BATCH_BYTES", 1000)
    texts = [f"{i:0100d}" for i in range(100)]
    path = write_parquet(tmp_path / "a.parquet", texts, group_rows=1000)
    (unit,) = units_of(path, format="parquet")
    batches = list(read_documents(unit))
    assert max(len(batch.texts) for batch in batches) < 20
    assert read([unit]) == (texts, list(range(100)), [])


@pytest.mark.parametrize("unit_bytes", [1, 10, 1 << 20])
def test_text_files_are_documents_grouped_into_units(tmp_path: Path, unit_bytes: int) -> None:
    contents = {"a.txt": "two\r\nlines 🙂\n", "b.txt": "", "c.txt": "\ufeffc", "d.txt": "d"}
    for name, text in contents.items():
        (tmp_path / name).write_bytes(text.encode())
    units = units_of(*(tmp_path / name for name in contents), format="txt", unit_bytes=unit_bytes)
    assert [file.name for unit in units for file in unit.files] == list(contents)
    assert len(units) == {1: 4, 10: 2, 1 << 20: 1}[unit_bytes]
    assert sum(unit.size_bytes for unit in units) == sum(
        len(text.encode()) for text in contents.values()
    )
    assert read(units) == (["two\r\nlines 🙂\n", "\ufeffc", "d"], [0, 2, 3], [])


@settings(deadline=None)
@given(
    documents=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)),
    unit_bytes=st.integers(1, 99),
)
@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_any_text_survives(
    tmp_path_factory: pytest.TempPathFactory, format: str, documents: list[str], unit_bytes: int
) -> None:
    path = WRITERS[format](tmp_path_factory.mktemp("any") / f"any.{format}", documents)
    assert read(units_of(path, format=format, unit_bytes=unit_bytes))[0] == documents


@pytest.mark.parametrize("unit_bytes", [1, 5, 1 << 20])
def test_blank_lines_are_rows_without_a_document(tmp_path: Path, unit_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "x"}\r\n  \r\n\r\n{"text": ""}\n{"text": "y"}')
    assert read(units_of(path, format="jsonl", unit_bytes=unit_bytes)) == (["x", "y"], [1, 5], [])


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    for name, content in (
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"}'),
        ("a.csv", b"text\nx\n\ny\n"),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        units = units_of(tmp_path / name, format=name.removeprefix("a."), unit_bytes=3)
        assert read(units)[0] == ["x", "y"]


def test_compressed_streams_may_be_joined(tmp_path: Path) -> None:
    one, two = b'{"text": "x"}\n{"text"', b': "y"}\n'
    for name, compress in (("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)):
        path = tmp_path / name
        path.write_bytes(compress(one) + compress(b"") + compress(two))
        assert read(units_of(path, format=name.removeprefix("a."))) == (["x", "y"], [0, 1], [])


@pytest.mark.parametrize("format", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "type_", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_type_of_text_column(tmp_path: Path, type_: pa.DataType, format: str) -> None:
    texts = ["x", "y" * 100, "x"]
    array = pa.array(texts).cast(type_) if pa.types.is_dictionary(type_) else pa.array(texts, type_)
    path = WRITERS[format](tmp_path / f"a.{format}", array, type_)
    assert read(units_of(path, format=format)) == (texts, [0, 1, 2], [])


def test_both_formats_of_arrow_files(tmp_path: Path, texts: list[str]) -> None:
    for as_file in (False, True):
        path = write_arrow(tmp_path / "a.arrow", texts, as_file=as_file)
        assert read(units_of(path, format="arrow")) == (texts, list(range(len(texts))), [])


def test_csv_is_text_whatever_it_looks_like(tmp_path: Path) -> None:
    texts = ["001", "1e5", "NA", "null", "True", "a\r\nb", "a\rb", 'say "x"', " x ", "1,5", "\0"]
    assert read(units_of(write_csv(tmp_path / "a.csv", texts), format="csv"))[0] == texts


@pytest.mark.parametrize("unit_bytes", [100, 70_000, 1 << 30])
def test_data_sets_that_datasets_saved(tmp_path: Path, texts: list[str], unit_bytes: int) -> None:
    saved = datasets.Dataset.from_dict({"id": range(len(texts)), "text": texts})
    picked, shuffled = saved.select([5, 3, 9, 3]), saved.shuffle(seed=1)
    assert read_saved(save_to_disk(tmp_path / "a", saved), unit_bytes) == (
        texts,
        list(range(len(texts))),
        [],
    )
    assert read_saved(save_to_disk(tmp_path / "b", picked), unit_bytes)[0] == [
        texts[i] for i in (5, 3, 9, 3)
    ]
    assert (
        read_saved(save_to_disk(tmp_path / "c", shuffled), unit_bytes)[0]
        == [*shuffled["text"]]
        != texts
    )


def test_a_saved_data_set_builds(tmp_path: Path, tokenizer_dir: Path, texts: list[str]) -> None:
    rows = datasets.Dataset.from_dict({"text": [*texts, None]}).shuffle(seed=1)
    rows.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    sources = [source("s", "saved", format="save_to_disk")]
    manifest = build(
        write_mixture(tmp_path, tokenizer_dir, sources, on_bad_document="skip", max_bad_fraction=1),
        tmp_path / "out",
    )
    expected = {row: text for row, text in enumerate(rows["text"]) if text is not None}
    assert {row: text for (_, row), text in decoded(tmp_path / "out").items()} == expected
    assert [(bad.row, bad.reason) for bad in manifest.bad_documents] == [
        (list(rows["text"]).index(None), "'text' is null, expected text")
    ]


def test_a_damaged_saved_data_set_is_named(tmp_path: Path) -> None:
    file = save_to_disk(
        tmp_path / "a", datasets.Dataset.from_dict({"text": ["x"] * 100, "n": [1] * 100})
    )
    assert read_saved(file)[0] == ["x"] * 100
    units = cut_units(SourceInputs(source="s", files=[file], format="save_to_disk", text_field="n"))
    with pytest.raises(UserError, match="column 'n' is of type int64, expected string"):
        read(units)
    next((tmp_path / "a").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(UserError, match=r"state.json: datasets can't load it .*; save it again"):
        read(units)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "x"', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"null", "a JSON NoneType, expected an object"),
        (b'["x"]', "a JSON list, expected an object with the field 'text'"),
        (b'{"body": "x", "id": 1}', "no field 'text', it has: body, id (text_field names it)"),
        (b'{"text": null}', "'text' is null, expected text"),
        (b'{"text": 5}', "'text' is of type int, expected text"),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
        (b'{"text": "x", "url": "\xff"}', "invalid UTF-8 at byte 22"),
        (b'{"text": "\\ud800"}', "half a surrogate pair at character 0"),
        (b'{"text": "x"} {"text": "y"}', "not valid JSON (Extra data"),
        (b'{"text": "a\0b"}', "not valid JSON (Invalid control character"),
        (b'{"text": "' + b"x" * 400 + b'"}', "a document of 0 MB, expected at most 0 MB"),
        (b'{"text": "' + b"x" * 600 + b'"}', "a line of more than 0 MB"),
    ],
)
@pytest.mark.parametrize("unit_bytes", [10, 1 << 20])
@pytest.mark.parametrize("format", ["jsonl", "jsonl.gz"])
def test_bad_lines_are_named_or_left_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    line: bytes,
    expected: str,
    unit_bytes: int,
) -> None:
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 300)
    monkeypatch.setattr("data_prep.formats.json_lines.MAX_LINE_BYTES", 500)
    monkeypatch.setattr("data_prep.formats.json_lines.READ_BYTES", 64)
    monkeypatch.setattr("data_prep.formats.json_lines.COMPRESSED_BYTES", 1)
    if line.startswith(b"[["):
        monkeypatch.setattr("data_prep.formats.json_lines.MAX_LINE_BYTES", 200_000)
    path = tmp_path / f"a.{format}"
    content = b'{"text": "x"}\n\n' * 3 + line + b'\n{"text": "y"}\n'
    path.write_bytes(gzip.compress(content) if format == "jsonl.gz" else content)
    message = read_error(path, format, unit_bytes)
    assert message.startswith(f"{path}: line 7: ")
    assert expected in message
    assert "on_bad_document: skip" in message
    texts, rows, bad = read(units_of(path, format=format, unit_bytes=unit_bytes, skip_bad=True))
    assert (texts, rows, [row for row, _ in bad]) == (["x", "x", "x", "y"], [0, 2, 4, 7], [6])
    assert expected in bad[0][1]


def test_bad_parquet_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "url": ["y"]}), path)
    assert "no column 'text', it has: body, url" in read_error(path, "parquet", skip_bad=True)
    for format in ("parquet", "arrow"):
        path = WRITERS[format](tmp_path / f"a.{format}", [1, 2], pa.int64())
        assert "column 'text' is of type int64, expected string" in read_error(
            path, format, skip_bad=True
        )


def invalid_utf8(*texts: bytes) -> pa.Array:
    return pa.array(texts, pa.binary()).view(pa.string())


@pytest.mark.parametrize("unit_bytes", [1, 1 << 20])
@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_bad_rows_of_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, unit_bytes: int
) -> None:
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 300)
    bad = {
        8: (None, "'text' is null"),
        9: (b"x\xff", "invalid UTF-8 at byte 1"),
        10: (b"x" * 301, "a document of"),
    }
    # too long as well: one document all the same
    bad[11] = (b"\xff" * 301, "invalid UTF-8 at byte 0")
    values = [bad[i][0] if i in bad else b"%d" % i * (i != 3) for i in range(14)]
    path = WRITERS[format](tmp_path / f"a.{format}", invalid_utf8(*values))
    message = read_error(path, format, unit_bytes)
    assert (
        "row 8: 'text' is null, expected text; mend or remove it, or leave it out: "
        "on_bad_document: skip, in a mixture file" in message
    )
    units = units_of(path, format=format, unit_bytes=unit_bytes, skip_bad=True)
    texts, rows, found = read(units)
    kept = [i for i in range(14) if i not in (3, *bad)]
    assert (texts, rows) == ([str(i) for i in kept], kept)
    assert [row for row, _ in found] == list(bad)
    assert all(reason.startswith(bad[row][1]) for row, reason in found)
    assert sum(batch.empty for unit in units for batch in read_documents(unit)) == 1


def test_bad_rows_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,text\n1,x\n2\n3,y,z\n\n5,\xff\n6,\n7,z")
    assert "row 1: a record of 1 fields, the header has 2; mend" in read_error(path, "csv")
    texts, rows, bad = read(units_of(path, format="csv", skip_bad=True))
    assert (texts, rows, [row for row, _ in bad]) == (["x", "z"], [0, 6], [1, 2, 4])
    assert bad[2][1] == "invalid UTF-8 at byte 0"
    path.write_bytes(b"id,body\n1,x\n")
    assert "no column 'text', it has: id, body" in read_error(path, "csv", skip_bad=True)
    path.write_bytes(b'text\nx\n"y\nz\n')
    assert "line 4: not CSV (unexpected end of data)" in read_error(path, "csv", skip_bad=True)


def test_bad_text_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 300)
    contents = {"a.txt": b"a", "b.txt": b"abc\x80", "c.txt": b"x" * 301, "d.txt": b"d"}
    paths = [tmp_path / name for name in contents]
    for path in paths:
        path.write_bytes(contents[path.name])
    assert "b.txt: invalid UTF-8 at byte 3; mend or remove it" in read_error(paths[1], "txt")
    assert "c.txt: a document of 0 MB, expected at most 0 MB" in read_error(paths[2], "txt")
    opened: list[str] = []
    monkeypatch.setattr(
        "data_prep.formats.text.open_input",
        lambda file: opened.append(file.name) or inputs.open_input(file),
    )
    texts, rows, bad = read(units_of(*paths, format="txt", skip_bad=True))
    assert (texts, rows) == (["a", "d"], [0, 3])
    assert [row for row, _ in bad] == [1, 2]
    assert "c.txt" not in opened  # it may be larger than memory


def test_left_out_documents_are_counted_and_listed(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    monkeypatch.setattr("data_prep.building.work_units.MIN_UNIT_BYTES", 4000)
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 5000)
    bad = [{"text": None}, {"\ud800\n": 1}, {"text": "x" * 5001}]
    records = [*({"text": text} for text in texts), {"text": ""}, *bad] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    write_parquet(tmp_path / "b.parquet", [*texts[:20], None, *NASTY_TEXTS, "", None])
    for name, content in (
        ("0", b"\xff"),
        ("1", b"text"),
        ("2", b"x" * 5001),
        ("3", b"a train text"),
    ):
        (tmp_path / f"{name}.txt").write_bytes(content)
    sources = [source(format, path, format=format) for format, path in
               (("jsonl", "a.jsonl"), ("parquet", "b.parquet"), ("txt", "*.txt"))]  # fmt: skip
    message = build_error(write_mixture(tmp_path, tokenizer_dir, sources), tmp_path / "error")
    assert "; mend or remove it, or leave it out: on_bad_document: skip, in a " in message
    mixture = write_mixture(
        tmp_path, tokenizer_dir, sources, on_bad_document="skip", max_bad_fraction=1
    )
    manifest = build(mixture, tmp_path / "skip")
    assert [(s.empty_documents, s.bad_documents) for s in manifest.sources] == [
        (3, 9),
        (1, 2),
        (0, 2),
    ]
    listed = [
        (document.source, document.input, document.row) for document in manifest.bad_documents
    ]
    lines = [line for line, record in enumerate(records) if record in bad]
    assert listed == [
        *(("jsonl", "a.jsonl", line) for line in lines),
        *(("parquet", "b.parquet", row) for row in (20, 21 + len(NASTY_TEXTS) + 1)),
        ("txt", "0.txt", 0), ("txt", "2.txt", 0),
    ]  # fmt: skip
    assert manifest.bad_documents[1].reason == "no field 'text', it has: ?\n (text_field names it)"
    found = decoded(tmp_path / "skip")
    kept = {
        ("a.jsonl", line): r["text"] for line, r in enumerate(records) if r not in bad and r["text"]
    }
    assert {place: text for place, text in found.items() if place[0] == "a.jsonl"} == kept
    assert len(found) == len(kept) + 20 + len(NASTY_TEXTS) + 2


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("a.jsonl", lambda whole: whole[: len(whole) // 2], "not valid JSON (Unterminated string"),
        (
            "a.jsonl.gz",
            lambda whole: whole[:-9],
            "damaged after line 40 (the compressed stream ends early)",
        ),
        ("a.jsonl.gz", lambda whole: b"", "the compressed stream ends early"),
        ("a.jsonl.gz", lambda whole: bytes(10_000), "the compressed stream ends early"),
        ("a.jsonl.gz", lambda whole: whole[:50] + b"\xff\xff\xff\xff" + whole[54:], "damaged"),
        ("a.jsonl.gz", lambda whole: whole + b"rubbish", "damaged after line 40"),
        ("a.jsonl.zst", lambda whole: whole[:-9], "the compressed stream ends early"),
        ("a.jsonl.zst", lambda whole: b"rubbish" + whole, "damaged after line 0"),
        ("a.parquet", lambda whole: b"", "not a readable parquet file"),
        ("a.parquet", lambda whole: whole[:-9], "not a readable parquet file"),
        (
            "a.parquet",
            lambda whole: whole[:40] + bytes(4000) + whole[4040:],
            "row groups 0 to 5: damaged",
        ),
        ("a.arrow", lambda whole: b"", "damaged"),
        ("a.arrow", lambda whole: whole[:-8], "damaged (the stream of record batches ends early)"),
        ("a.arrow", lambda whole: whole[:5000] + whole[-8:], "damaged"),
        (
            "a.arrow",
            lambda whole: whole.replace(b"text", b"te\xffx"),
            "damaged, a column's name is not UTF-8 (",
        ),
    ],
)
def test_damaged_files_are_named_and_never_left_out(
    tmp_path: Path, texts: list[str], name: str, damage: Callable[[bytes], bytes], expected: str
) -> None:
    format = name.removeprefix("a.")
    path = WRITERS[format](tmp_path / name, texts[:40])
    path.write_bytes(damage(path.read_bytes()))
    assert expected in read_error(path, format, skip_bad=format != "jsonl")


@pytest.mark.parametrize(
    ("right", "as_file", "format"),
    [
        (right, as_file, format)
        for right in ("parquet", "arrow", "jsonl", "jsonl.gz", "jsonl.zst")
        for as_file in ((False, True) if right == "arrow" else (False,))
        for format in ("parquet", "arrow", "csv", "txt", "jsonl", "jsonl.gz", "jsonl.zst")
        if format != right and (right, format) not in (("jsonl", "txt"), ("jsonl", "csv"))
    ],
)
def test_a_file_of_another_format_says_which(
    tmp_path: Path, right: str, as_file: bool, format: str
) -> None:
    """Also where bad documents are left out: this is no matter of documents."""
    write = functools.partial(write_arrow, as_file=True) if as_file else WRITERS[right]
    whole = write(tmp_path / f"a.{right}", [f"document {i}" for i in range(20)]).rename(
        tmp_path / "whole"
    )
    kind = {"jsonl.gz": "gzip", "jsonl.zst": "zstd", "jsonl": "JSON"}.get(right, right)
    for skip_bad in (False, True):
        message = read_error(whole, format, skip_bad=skip_bad)
        assert message == f"{whole}: {kind} by its first bytes, not {format}; set format: {right}"


def test_text_may_begin_like_another_format(tmp_path: Path) -> None:
    texts = ["PAR1 is how parquet begins", "ARROW1 is how Arrow does", "{"]
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(texts))
    assert read(units_of(tmp_path / "a.csv", format="csv"))[0] == texts
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    assert read(units_of(*sorted(tmp_path.glob("*.txt")), format="txt"))[0] == texts


def test_an_arrow_file_that_asks_for_more_than_memory_is_damaged(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", ["x" * 1000])
    _, batch = itertools.islice(pa.ipc.MessageReader.open_stream(str(path)), 2)
    size, huge = (struct.pack("<q", size) for size in (batch.body.size, 1 << 60))
    path.write_bytes(path.read_bytes().replace(size, huge))
    assert "damaged (MemoryError); fetch or write it again" in read_error(path, "arrow")


@pytest.mark.parametrize("format", [*WRITERS, "txt"])
@pytest.mark.parametrize(
    "change", [lambda whole: whole[: len(whole) // 2], lambda whole: whole * 2]
)
def test_a_file_that_changed_since_it_was_cut_is_an_error(
    tmp_path: Path, format: str, change: Callable[[bytes], bytes]
) -> None:
    path = WRITERS.get(format, write_csv)(tmp_path / f"a.{format}", list("abcdefgh"))
    units = units_of(path, format=format, unit_bytes=20, skip_bad=True)
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    for unit in units:
        with pytest.raises(
            UserError,
            match=rf"bytes, {len(whole):,} when it was listed; see that nothing writes to",
        ):
            read([unit])
    path.unlink()
    with pytest.raises(UserError, match=r"can't be read \(No such file or directory\)"):
        read(units)


def test_a_file_cut_short_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.formats.known.check_unchanged", lambda unit, is_folder: None)
    path = write_jsonl(tmp_path / "a.jsonl", ["x", "y"])
    units = units_of(path, format="jsonl")
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(UserError, match=r"damaged after line 1 \(the file ends at byte 23 of 46\)"):
        read(units)


def test_parquet_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        for texts in ([], ["x"], [], []):
            writer.write_table(pa.table({"text": pa.array(texts, pa.string())}))
    for unit_bytes in (1, 1 << 20):
        assert read(units_of(path, format="parquet", unit_bytes=unit_bytes)) == (["x"], [0], [])
    assert read(units_of(write_parquet(path, []), format="parquet")) == ([], [], [])


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], ["text", "text"]), path)
    assert read(units_of(path, format="parquet"))[0] == ["x"]


def test_unit_names_are_safe_and_unique(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a b.txt", "a_b.txt", "odd/a b.txt")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    units = units_of(*paths, format="txt", unit_bytes=1)
    assert [unit.name for unit in units] == [
        "00000-a_b-00000",
        "00001-a_b-00000",
        "00002-a_b-00000",
    ]


def test_a_files_name_tells_its_format() -> None:
    for format in ("parquet", "jsonl", "jsonl.gz", "jsonl.zst", "txt", "arrow", "csv"):
        assert format_of(f"a.{format}", "here") == format
    assert [format_of(f"a.{ending}", "here") for ending in ("json", "ndjson.gz", "Parquet")] == [
        "jsonl", "jsonl.gz", "parquet",
    ]  # fmt: skip
    with pytest.raises(
        UserError,
        match=r"here: the format of a\.doc is not known from its name; give one of parquet",
    ):
        format_of("a.doc", "here")


def test_a_unit_is_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BATCH_BYTES", 40)
    monkeypatch.setattr("data_prep.formats.json_lines.READ_BYTES", 20)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 6}) + "\n\n" for _ in range(5)))
    (unit,) = units_of(path, format="jsonl")
    batches = list(read_documents(unit))
    assert [len(batch.texts) for batch in batches] == [2, 2, 1]
    assert list(itertools.chain(*(batch.rows.tolist() for batch in batches))) == [0, 2, 4, 6, 8]
    assert sum(batch.rows_read for batch in batches) == 10

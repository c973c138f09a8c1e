"""A file that is not what it is to be read as says so, and is never left out as if it were a
document.
"""

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from support.prep_helpers import (
    build,
    build_error,
    decoded,
    source,
    write_jsonl,
    write_mixture,
    write_parquet,
)
from support.text_files import read, read_error, units_of

from data_prep.errors import UserError

pytest_plugins = ("support.prep_fixtures",)

RECORDS = [{"id": i, "text": f"document {i}"} for i in range(300)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


def packed_in_zip() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a.jsonl", LINES)
    return content.getvalue()


def packed_in_tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        member = tarfile.TarInfo("a.jsonl")
        member.size = len(LINES)
        archive.addfile(member, io.BytesIO(LINES.encode()))
    return content.getvalue()


def saved_by_numpy() -> bytes:
    content = io.BytesIO()
    np.save(content, np.arange(9))
    return content.getvalue()


def saved_by_sqlite() -> bytes:
    with sqlite3.connect(":memory:") as database:
        database.execute("create table documents (text)")
        return database.serialize()


BINARY = {
    "bzip2": (bz2.compress(LINES.encode()), "bunzip2"),
    "xz": (lzma.compress(LINES.encode()), "unxz"),
    "zip": (packed_in_zip(), "unpack it first (unzip)"),
    "tar": (packed_in_tar(), "unpack it first (tar -xf)"),
    "UTF-16": (LINES.encode("utf-16"), "write it as UTF-8"),
    "UTF-16 ": (LINES.encode("utf-16-le"), "write it as UTF-8"),
    "UTF-16  ": (LINES.encode("utf-16-be"), "write it as UTF-8"),
    "UTF-32": (LINES.encode("utf-32"), "write it as UTF-8"),
    "NULs": (bytes(4096), "fetch or write it again"),
    "NumPy": (saved_by_numpy(), "format: uint16"),
    "pickle": (pickle.dumps(RECORDS), "write its texts as JSON lines"),
    "SQLite": (saved_by_sqlite(), "write its texts as JSON lines"),
    "a git-lfs pointer": (LFS_POINTER.encode(), "git lfs pull"),
}
RECORDS_ELSEWISE = {
    "HTML": (b"<!DOCTYPE html>\n<html><title>503</title></html>\n", "fetch it again"),
    "HTML ": (b"\n <html lang='en'>...", "fetch it again"),
    "XML": (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "fetch it again"),
}
JSON = {
    "a JSON array": (json.dumps(RECORDS).encode(), "one object on each line"),
    "a JSON array ": (json.dumps(RECORDS, indent=1).encode(), "one object on each line"),
    "a JSON array  ": (
        b"\xef\xbb\xbf[\r\n" + json.dumps(RECORDS[0]).encode() + b"]",
        "one object on each line",
    ),
    "JSON over several lines": (
        json.dumps(RECORDS[0], indent=1).encode(),
        "one object on each line",
    ),
}
CASES = [
    *((format, kind) for kind in BINARY for format in ("jsonl", "txt", "csv", "parquet", "arrow")),
    *((format, kind) for kind in RECORDS_ELSEWISE for format in ("jsonl", "csv", "parquet")),
    *(("jsonl", kind) for kind in JSON),
]


@pytest.mark.parametrize(("format", "kind"), CASES)
def test_a_file_of_another_kind_is_named_with_what_to_do(
    tmp_path: Path, format: str, kind: str
) -> None:
    content, advice = (BINARY | RECORDS_ELSEWISE | JSON)[kind]
    path = tmp_path / "a"
    path.write_bytes(content)
    for skip_bad in (False, True):
        message = read_error(path, format, skip_bad=skip_bad)
        assert f"{path}: {kind.strip()} by its first bytes, not {format}; " in message
        assert advice in message


@pytest.mark.parametrize("kind", [*(BINARY | RECORDS_ELSEWISE | JSON), "gzip", "zstd"])
@pytest.mark.parametrize("format", ["jsonl.gz", "jsonl.zst"])
def test_so_is_what_a_compressed_file_holds(tmp_path: Path, format: str, kind: str) -> None:
    compress = {"jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[format]
    twice = {
        "gzip": (gzip.compress(b"{}"), "packed twice"),
        "zstd": (zstandard.compress(b"{}"), "packed twice"),
    }
    content, advice = (BINARY | RECORDS_ELSEWISE | JSON | twice)[kind]
    path = tmp_path / f"a.{format}"
    path.write_bytes(compress(content))
    message = read_error(path, format, skip_bad=True)
    assert f"{path}: holds {kind.strip()} by its first bytes, not JSON lines; " in message
    assert advice in message or kind == "NumPy"


def test_texts_may_begin_like_records_of_another_kind(tmp_path: Path) -> None:
    texts = [
        "<!doctype html> is how a page begins",
        "[",
        "{\n",
        "PK",
        "BZh",
        "%PDF",
        "version https://example.org",
    ]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    assert read(units_of(*sorted(tmp_path.glob("*.txt")), format="txt"))[0] == texts
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    assert read(units_of(path, format="jsonl"))[0] == texts


def test_an_array_on_a_line_is_a_bad_document_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('["x"]\n{"text": "y"}\n')
    texts, rows, bad = read(units_of(tmp_path / "a.jsonl", format="jsonl", skip_bad=True))
    assert (texts, rows, [row for row, _ in bad]) == (["y"], [1], [0])


BAD_WHOLES = {
    "rot13.jsonl": b"\n".join(line[1:].encode() for line in LINES.splitlines()),
    "numbers.jsonl": b"1\n2\n3\n",
    "strings.jsonl": b'["a", "b",\n"c"]\n',
    "other_field.jsonl": b'{"body": "x"}\n{"body": "y"}\n',
    "torn.jsonl": LINES.encode()[:12],
}


@pytest.mark.parametrize("name", BAD_WHOLES)
def test_a_file_without_one_good_row_is_an_error_also_with_skip(
    tmp_path: Path,
    tokenizer_dir: Path,
    texts: list[str],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A unit by itself, cut into several, or one of many files in a unit."""
    write_jsonl(tmp_path / "good.jsonl", texts[:5])
    (tmp_path / name).write_bytes(BAD_WHOLES[name])
    sources = [source("s", "*.jsonl", format="jsonl")]
    mixture = write_mixture(
        tmp_path, tokenizer_dir, sources, on_bad_document="skip", max_bad_fraction=1
    )
    expected = f"source 's': {tmp_path / name}: not one good row in it, bad: "
    assert expected in build_error(mixture, tmp_path / "few")
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.building.work_units.MIN_UNIT_BYTES", 10)
        assert expected in build_error(mixture, tmp_path / "cut")
    for number in range(40):
        write_jsonl(tmp_path / f"more-{number}.jsonl", [f"document {number}"])
    assert expected in build_error(mixture, tmp_path / "many")
    (tmp_path / name).unlink()
    build(mixture, tmp_path / "many")
    assert len(decoded(tmp_path / "many")) == 45


def test_more_bad_rows_than_a_share_are_an_error_naming_the_first(
    tmp_path: Path, tokenizer_dir: Path, texts: list[str]
) -> None:
    write_parquet(tmp_path / "a.parquet", [*(texts * 3)[:95], None, "", None, *texts[:2]])
    parquet = [source("a", "a.parquet")]

    def error(
        sources: list[dict[str, Any]], output_dir: Path = tmp_path / "out", **more: float
    ) -> str:
        mixture = write_mixture(tmp_path, tokenizer_dir, sources, on_bad_document="skip", **more)
        return build_error(mixture, output_dir)

    reason = "'text' is null, expected text"
    assert error(parquet).startswith(
        "source 'a': 2 of 100 rows are bad (2.00%, max_bad_fraction: 0.01), the first: "
        f"a.parquet, row 95: {reason}; a.parquet, row 97: {reason}; mend them, or raise "
        "max_bad_fraction"
    )
    assert "2 of 100 rows" in error(parquet, max_bad_fraction=0.0199)
    mixture = write_mixture(
        tmp_path, tokenizer_dir, parquet, on_bad_document="skip", max_bad_fraction=0.02
    )
    manifest = build(mixture, tmp_path / "out")
    assert [(bad.row, bad.reason) for bad in manifest.bad_documents] == [(95, reason), (97, reason)]
    for number, text in enumerate(texts[:20]):
        (tmp_path / f"{number:02}.txt").write_bytes(b"\xe9" if number == 7 else text.encode())
    message = error([source("t", "*.txt", format="txt")], tmp_path / "txt")
    assert (
        "source 't': 1 of 20 rows are bad (5.00%, max_bad_fraction: 0.01), the first: 07.txt, row "
        "0: inv" in message
    )


BAD_ROWS = {
    "NULs": (
        bytes(20_000),
        "20,000 NULs, the first at byte 0 of the line (a crash or a full disk may leave them)",
    ),
    "NULs and a line": (bytes(20_000) + LINES.encode()[:30], "20,000 NULs, the first at byte 0"),
    "lines without their ends": (LINES.encode().replace(b"\n", b" "), "not valid JSON (Extra data"),
    "invalid UTF-8": (b'{"text": "' + b"\xff" * 20_000 + b'"}', "invalid UTF-8 at byte"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("format", ["jsonl", "jsonl.gz"])
def test_one_bad_row_that_is_most_of_a_file_is_an_error_also_with_skip(
    tmp_path: Path, tokenizer_dir: Path, kind: str, format: str
) -> None:
    row, reason = BAD_ROWS[kind]
    content = LINES.encode() + row + b"\n"
    (tmp_path / f"a.{format}").write_bytes(
        gzip.compress(content) if format == "jsonl.gz" else content
    )
    sources = [source("s", f"a.{format}", format=format)]
    mixture = write_mixture(tmp_path, tokenizer_dir, sources, on_bad_document="skip")
    message = build_error(mixture, tmp_path / "out")
    expected = (
        f"source 's': 1 of 301 rows are bad, and hold {len(row):,} of {len(content):,} bytes ("
    )
    assert message.startswith(expected)
    assert f"max_bad_fraction: 0.01), the first: a.{format}, row 300: {reason}" in message
    mixture = write_mixture(
        tmp_path, tokenizer_dir, sources, on_bad_document="skip", max_bad_fraction=0.9
    )
    (bad,) = build(mixture, tmp_path / "out").bad_documents
    assert bad.row == 300


def test_so_is_one_that_is_most_of_a_work_unit(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its share of the source is."""
    monkeypatch.setattr("data_prep.building.left_out.LARGE_BYTES", 1000)
    monkeypatch.setattr("data_prep.building.work_units.MIN_UNIT_BYTES", 5000)
    (tmp_path / "a.jsonl").write_bytes(LINES.encode() + bytes(4000) + b"\n" + LINES.encode())
    sources = [source("s", "a.jsonl", format="jsonl")]
    mixture = write_mixture(
        tmp_path, tokenizer_dir, sources, on_bad_document="skip", max_bad_fraction=0.3
    )
    assert " are of bad rows (4,000 NULs, the first" in build_error(mixture, tmp_path / "out")


def test_a_text_file_of_nuls_or_a_program_is_no_text(tmp_path: Path) -> None:
    for content in (b"some text" + bytes(8), b"a\0" * 600, b"text " * 200 + bytes(4096)):
        (tmp_path / "a.txt").write_bytes(content)
        message = read_error(tmp_path / "a.txt", "txt", skip_bad=True)
        assert (
            f"no text: {content.count(0):,} of its {len(content):,} bytes are NULs" in message
            or "UTF-16" in message
        )
    (tmp_path / "a.txt").write_bytes(b"\x7fELF\x02\x01\x01")
    assert "ELF by its first bytes, not txt; a program" in read_error(
        tmp_path / "a.txt", "txt", skip_bad=True
    )
    (tmp_path / "a.txt").write_bytes(b"\0\0 NUL")
    assert read(units_of(tmp_path / "a.txt", format="txt"))[0] == ["\0\0 NUL"]


@pytest.mark.parametrize("share", [-0.1, 1.1, "much"])
def test_what_is_no_share_is_refused(tmp_path: Path, tokenizer_dir: Path, share: object) -> None:
    mixture = write_mixture(
        tmp_path, tokenizer_dir, [source("a", "a.parquet")], max_bad_fraction=share
    )
    with pytest.raises(UserError, match="max_bad_fraction"):
        build(mixture, tmp_path / "out")

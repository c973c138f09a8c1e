"""A format of input is one module and one row of one table: a toy one, built into a data set."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.prep_helpers import build, build_error, decoded, write_mixture

from data_prep.building.unit_records import unit_signature
from data_prep.errors import UserError
from data_prep.formats import known
from data_prep.formats.documents import Documents, Reading, some_rows
from data_prep.formats.first_bytes import own_kind
from data_prep.formats.known import FORMATS, Format, format_of, text_field_of
from data_prep.formats.pretokenized.documents import ID_FORMATS
from data_prep.formats.work_unit import WorkUnit
from data_prep.inputs.sources import InputFile, open_input
from data_prep.tokenizer.training_texts import texts_of_files

pytest_plugins = ("support.prep_fixtures",)

MAGIC = b"PAGES1\n"
PAGE_END = b"\f"


def read_pages(unit: WorkUnit, given: Reading) -> Iterator[Documents]:
    """A toy format: after its first line, documents with a form feed between them."""
    with open_input(unit.files[0]) as stream:
        pages = stream.read().removeprefix(MAGIC).split(PAGE_END)
    for first in range(0, len(pages), 7):
        numbered = list(enumerate(pages[first : first + 7]))
        yield some_rows(numbered, [], 0, len(numbered))


@pytest.fixture
def _pages(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Format(
        name="pages",
        endings=("pages",),
        read=read_pages,
        has_text_field=False,
        own_kind=own_kind("pages", MAGIC, "pages"),
    )
    monkeypatch.setitem(FORMATS, row.name, row)


def write_pages(path: Path, texts: list[bytes]) -> Path:
    path.write_bytes(MAGIC + PAGE_END.join(texts))
    return path


@pytest.mark.usefixtures("_pages")
def test_one_row_is_all_that_a_new_format_takes(tmp_path: Path, tokenizer_dir: Path) -> None:
    texts = [f"page {number}\r\n of many".encode() for number in range(200)]
    write_pages(tmp_path / "a.pages", [*texts, b""])
    write_pages(tmp_path / "b.pages", [b"one more"])
    mixture = write_mixture(
        tmp_path,
        tokenizer_dir,
        [{"name": "book", "path": "*.pages", "weight": 1}],
        validation_fraction=0.1,
    )
    manifest = build(mixture, tmp_path / "out")
    (book,) = manifest.sources
    assert (book.format, book.text_field, book.empty_documents) == ("pages", None, 1)
    found = decoded(tmp_path / "out")
    assert found == {
        **{("a.pages", row): text.decode() for row, text in enumerate(texts)},
        ("b.pages", 0): "one more",
    }


@pytest.mark.usefixtures("_pages")
def test_its_row_says_what_is_wrong_with_its_files(tmp_path: Path, tokenizer_dir: Path) -> None:
    def error(name: str, content: bytes, **keys: object) -> str:
        (tmp_path / name).write_bytes(content)
        about = {"name": "book", "path": name, "weight": 1, **keys}
        mixture = write_mixture(tmp_path, tokenizer_dir, [about])
        return build_error(mixture, tmp_path / "out")

    page = MAGIC + b"a page"
    assert "a.jsonl: pages by its first bytes, not jsonl; set format: pages" in error(
        "a.jsonl", page
    )
    assert "a.pages: parquet by its first bytes, not pages; set format: parquet" in error(
        "a.pages", b"PAR1\x15"
    )
    assert "a.pages: row 1: invalid UTF-8 at byte 0; mend" in error("a.pages", page + b"\f\xff")
    assert "text_field has no meaning for pages; remove it" in error(
        "a.pages", page, format="pages", text_field="text"
    )
    assert "olmo, pages" in error("a.doc", page)


def test_every_row_is_whole() -> None:
    endings = [ending for row in FORMATS.values() for ending in row.endings]
    assert len(endings) == len(set(endings))
    for name, row in FORMATS.items():
        assert row.name == name
        assert row.own_kind is None or row.own_kind.own_format == name
        for ending in row.endings:
            assert format_of(f"A.{ending.upper()}", "here") == name
    assert format_of("data.json.parquet", "here") == "parquet"
    with pytest.raises(UserError, match="give one of parquet, jsonl, jsonl"):
        format_of("parquet", "here")


def test_a_file_of_every_kind_is_refused_by_every_other_format() -> None:
    beginnings = {
        "parquet": b"PAR1\x15\x04",
        "arrow": b"\xff\xff\xff\xff\x10\0\0\0",
        "jsonl.gz": b"\x1f\x8b\x08",
        "jsonl.zst": b"\x28\xb5\x2f\xfd",
        "uint16": b"\x93NUMPY",
    }
    for name, row in FORMATS.items():
        for owner, first in beginnings.items():
            file = InputFile(name="a", url="/a", size=9, version="")
            if owner == name:
                known.first_bytes_of(row).check(file, first)
                continue
            with pytest.raises(UserError, match=f"/a: .* by its first bytes, not {name}; "):
                known.first_bytes_of(row).check(file, first)


# of units of two files, as they were before there was a table
SIGNATURES = {
    "txt": "6d2d3fc47ad35f75ea0ebd0e8b74d0acd5879ee7ad1da31245fbcfacd221a420",
    "jsonl": "96c8e93f0cd547032685b8f9153d04dcb287a907cbfcc24fdcda82e684277348",
}


@pytest.mark.parametrize("format", SIGNATURES)
def test_signatures_of_units_are_what_they_were(format: str) -> None:
    """By them a build goes on with the units of an earlier one, and of an earlier version."""
    names = (f"a.{format}", f"b.{format}")
    files = tuple(InputFile(name=name, url=f"/{name}", size=9, version="1") for name in names)
    unit = WorkUnit(
        source="s",
        name="00000-a-00000",
        files=files,
        format=format,
        text_field=text_field_of(format, "text"),
        skip_bad=False,
        start=0,
        stop=2,
        size_bytes=18,
        files_are_rows=FORMATS[format].files_are_rows,
    )
    assert unit_signature(unit, "sha", 0.1) == SIGNATURES[format]
    assert len(unit.parts()) == (1 if format == "txt" else 2)


@pytest.mark.parametrize("format", ID_FORMATS)
def test_no_tokenizer_is_learned_from_ids(tmp_path: Path, format: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(64))
    with pytest.raises(UserError, match=f"^--format {format}: ids of a tokenizer, no text; name "):
        texts_of_files([str(path)], format, "text", 1000)

"""CSV as its writers write it: a lone carriage return is a part of the text, unless it ends the
records.
"""

import io
from pathlib import Path

import datasets
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.text_files import read, read_error, units_of

from data_prep.formats.csv_records import header_ending, read_records

TEXTS = [
    "first half\rsecond half",
    "\rbegins so",
    'quotes "and\r" CR',
    "CR\r\nLF",
    "LF\nalone",
    "a,b\rc",
    "last",
]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def texts_of(path: Path) -> tuple[list[str], list[int]]:
    texts, rows, bad = read(units_of(path, format="csv", skip_bad=True))
    assert not bad
    return texts, rows


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_what_pandas_writes_comes_back(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "a.csv"
    pandas.DataFrame({"id": range(len(TEXTS)), "text": TEXTS}).to_csv(
        path, index=False, lineterminator=ending
    )
    assert texts_of(path) == (TEXTS, list(range(len(TEXTS))))
    pandas.DataFrame({"text": TEXTS}).to_csv(path, index=False, lineterminator=ending)
    assert texts_of(path) == (TEXTS, list(range(len(TEXTS))))


def test_what_datasets_writes_comes_back(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"id": range(len(TEXTS)), "text": TEXTS}).to_csv(
        str(tmp_path / "a.csv")
    )
    assert texts_of(tmp_path / "a.csv") == (TEXTS, list(range(len(TEXTS))))


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(
        st.text("a\r\n\",' é").filter(lambda text: not text.endswith("\r")), min_size=1, max_size=5
    ),
    ending=st.sampled_from(["\n", "\r\n"]),
)
def test_any_text_comes_back_from_pandas(texts: list[str], ending: str) -> None:
    """But for a CR at the end of an unquoted field before LF: the two are CRLF, whoever looks."""
    frame = pandas.DataFrame({"id": range(len(texts)), "text": texts})
    content = frame.to_csv(index=False, lineterminator=ending).encode()
    records = [*read_records(io.BytesIO(content), "a.csv", 1 << 20)]
    assert [text for _, text in records[1:]] == texts


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"text\nfirst half\rsecond half\nsecond\n", ["first half\rsecond half", "second"]),
        (b"text\r\na\rb\r\nc\r\n", ["a\rb", "c"]),
        (b"text\r\na\r\nb\r", ["a", "b"]),  # cut within its last CRLF
        (b"text\nx\r\ny\n", ["x", "y"]),  # of two writers
        (b'"te\rxt",text\n1,a\rb\n', ["a\rb"]),  # the header's own quotes
        (b'text\rone\r"two\nlines"\rthree\r', ["one", "two\nlines", "three"]),  # of old Macs
        (b"text\na\x80b\rc\n", []),
    ],
)
def test_what_ends_the_header_ends_all_records(
    tmp_path: Path, content: bytes, expected: list[str]
) -> None:
    texts, _, bad = read(units_of(write(tmp_path / "a.csv", content), format="csv", skip_bad=True))
    assert texts == expected
    assert bool(bad) == (not expected)


def test_the_line_of_what_is_no_csv_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'text\na\rb\n"open\rand\nnever closed\n')
    assert "line 4: not CSV (unexpected end of data)" in read_error(path, "csv", skip_bad=True)


def test_a_header_with_the_text_column_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"text,id,text\na,1,b\n")
    for skip_bad in (False, True):
        assert f"{path}: 2 columns of its header are named 'text'; rename" in read_error(
            path, "csv", skip_bad=skip_bad
        )
    assert read(units_of(write(path, b"id,text,id\n1,b,2\n"), format="csv"))[0] == ["b"]


@pytest.mark.parametrize(
    ("beginning", "ending"),
    [
        (b"a,b\nc", b"\n"),
        (b"a\r\nb", b"\r\n"),
        (b"a\rb", b"\r"),
        (b'"a\rb",c\r\n', b"\r\n"),
        (b"a", b"\n"),
        (b"", b"\n"),
    ],
)
def test_the_end_of_the_header(beginning: bytes, ending: bytes) -> None:
    assert header_ending(beginning) == ending

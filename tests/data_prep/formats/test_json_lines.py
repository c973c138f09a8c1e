"""Every line of JSON lines is a document, blank, or listed as bad, however the bytes are cut
into blocks.
"""

import gzip
import io
import itertools
import json
import os
from collections.abc import Iterator, Sequence

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.formats import json_lines
from data_prep.formats.json_lines import blocks, line_cuts, parse_block, read_chunks

fuzz = settings(deadline=None, max_examples=int(os.environ.get("FUZZ_CASES", "200")))

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
BESIDE = st.dictionaries(
    st.sampled_from(["id", "", "texts", "é"]), st.none() | st.booleans() | st.integers() | TEXT
)
NESTED = st.fixed_dictionaries(
    {}, optional={"meta": st.just({"text": [{"text": None}]}), "tags": st.just([None, None])}
)
GOOD_LINES = st.builds(
    lambda text, beside, nested, ascii, before, after: (
        before + json.dumps({**beside, "text": text, **nested}, ensure_ascii=ascii).encode() + after
    ),
    TEXT, BESIDE, NESTED, st.booleans(), st.sampled_from([b"", b"", b" ", b"\t"]),
    st.sampled_from([b"", b"", b"\r", b" \r"]),
)  # fmt: skip
ODD_LINES = st.sampled_from(
    [
        b"", b" ", b"\r", b"\x0b", b"null", b"1", b'"text"', b"[]", b"{}", b"{", b"}", b'{"text"',
        b': "b"}', b"\0", b"\xff", b"\xef\xbb\xbf", b'\xef\xbb\xbf{"text": "mark"}',
        b'{"text": null}', b'{"text": 5}', b'{"text": {"text": "x"}}', b'{"body": "x"}',
        b'{"text": "a"} {"text": "b"}', b'{"text": "a"}{"text": "b"}', b'{"text": "a"} null',
        b'{"text": "a"},', b'{"text": "a"}\r{"text": "b"}', b'{"text": "first", "text": "last"}',
        b'{"text": null, "text": "last"}', b'{"text": "a", "text": null}',
        b'{"text": "a", "n": ' + b"7" * 5000 + b"}", b'{"text": "a", "n": 1e999}',
        b'{"text": "a", "n": NaN}', b'{"text": "a", "n": 01}', b'{"text": "a",}', b"{'text': 'a'}",
        b'{"text": "\\ud800"}', b'{"text": "a", "n": "\\udc00"}', b'{"text": "a", "n": "\xff"}',
        b'{"text": "\xed\xa0\x80"}', b'{"text": "\0"}', b'{"text": "\\u0000"}',
        b'{"te\\u0078t": "escaped"}', b'{"text": "a"}\0', b'{"text": "a\tb"}', b'{"text": "\\x41"}',
    ]
)  # fmt: skip
TOKENS = [
    b"{", b"}", b"[", b"]", b'"text"', b'"a"', b":", b",", b"null", b"1", b" ", b"\r", b"\\", b'"',
    b"\xff", b"\0",
]  # fmt: skip
SCRAPS = st.lists(st.sampled_from(TOKENS), max_size=9).map(b"".join)
BRACED = SCRAPS.map(lambda scrap: b"{" + scrap + b"}")
LINES = st.lists(
    st.one_of(GOOD_LINES, GOOD_LINES, GOOD_LINES, ODD_LINES, SCRAPS, BRACED)
) | st.lists(GOOD_LINES)
BAD = object()


def cut(content: bytes, sizes: Sequence[int]) -> list[bytes]:
    """Pieces of these sizes, over and over."""
    pieces, at = [], 0
    for size in itertools.cycle(sizes):
        if at >= len(content):
            return pieces
        pieces.append(content[at : at + size])
        at += size
    return [content]


def read(content: bytes, sizes: Sequence[int], block_bytes: int) -> dict[int, object]:
    """Text of every line that has one, and BAD for those that are bad."""
    found: dict[int, object] = {}
    row = 0
    for block in blocks(iter(cut(content, sizes)), block_bytes):
        texts, rows, bad = parse_block(block, "text", row == 0)
        texts.validate(full=True)
        new = {row + int(at): text for at, text in zip(rows, texts.to_pylist(), strict=True)}
        new |= {row + at: BAD for at, reason in bad if reason}
        assert len(new) == len(texts) + len(bad)
        found |= new
        row += json_lines.count_lines(block)
    assert row == len(content.removesuffix(b"\n").split(b"\n")) * bool(content)
    return found


def parse_by_hand(line: bytes) -> object:
    """What JSON lines mean by a line."""
    try:
        text = json.loads(line.decode(), parse_int=float)["text"]
        text.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return BAD
    return text


@fuzz
@given(
    LINES, st.booleans(), st.lists(st.integers(1, 99), min_size=1, max_size=3), st.integers(1, 200)
)
def test_no_line_is_lost_however_the_bytes_are_cut(
    lines: list[bytes], ends: bool, sizes: list[int], block_bytes: int
) -> None:
    """For the long form, set the environment's FUZZ_CASES to 20000."""
    content = b"\n".join(lines) + b"\n" * (ends and bool(lines))
    expected = {
        row: parse_by_hand(line) for row, line in enumerate(lines) if line and not line.isspace()
    }
    if content.startswith(b"\xef\xbb\xbf"):
        expected[0] = parse_by_hand(lines[0].removeprefix(b"\xef\xbb\xbf"))
    assert read(content, sizes, block_bytes) == expected
    assert read(content, [1 << 20], 1 << 20) == expected


@given(st.lists(st.sampled_from([b"", b"a", b"\n", b"bc\n", b"\n\n", b"d\ne"])), st.integers(1, 9))
def test_blocks_are_whole_lines_of_the_same_bytes(chunks: list[bytes], block_bytes: int) -> None:
    found = list(blocks(iter(chunks), block_bytes))
    assert b"".join(found) == b"".join(chunks)
    assert all(block.endswith(b"\n") for block in found[:-1])
    assert all(found)


@given(st.lists(st.integers(0, 12)), st.integers(1, 4), st.integers(1, 20), st.booleans())
def test_a_line_too_long_is_one_bad_line_however_the_bytes_are_cut(
    lengths: list[int], size: int, block_bytes: int, ends: bool
) -> None:
    lines = [b"x" * length for length in lengths]
    content = b"\n".join(lines) + b"\n" * (ends and bool(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "MAX_LINE_BYTES", 5)
        patch.setattr(json_lines, "TOO_LONG", b"!")
        found = b"".join(blocks(iter(cut(content, [size])), block_bytes))
    assert found == b"\n".join(b"!" if len(line) > 5 else line for line in lines) + b"\n" * (
        ends and bool(lines)
    )


def test_a_line_too_long_is_not_kept_in_memory() -> None:
    """The reason names the limit; what came before the line and after it is read."""
    held = 0
    chunk = b"x" * 100

    def chunks() -> Iterator[bytes]:
        nonlocal held
        yield b'{"text": "a"}\n{"text": "'
        for _ in range(1000):
            held = max(held, len(reader.gi_frame.f_locals["begun"]))
            yield chunk
        yield b'"}\n{"text": "b"}'

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "MAX_LINE_BYTES", 5000)
        reader = blocks(chunks(), 1 << 20)
        texts, rows, bad = parse_block(b"".join(reader), "text", True)
        assert (texts.to_pylist(), rows.tolist(), bad) == (
            ["a", "b"],
            [0, 2],
            [(1, "a line of more than 0 MB")],
        )
    assert held <= 5100


def test_a_first_line_of_null_does_not_reach_arrow() -> None:
    """It would crash there, and take the build with it (pyarrow 26)."""
    for content in (
        b"null",
        b"null\nnull\n",
        b" null\n",
        b"\xef\xbb\xbfnull\n",
        b'null\n{"text": "a"}',
    ):
        assert read(content, [99], 99)[0] is BAD


def test_nesting_beside_the_text_is_refused_line_by_line_alone() -> None:
    """The known difference of the two ways; a thousand levels are in no real file."""
    deep = b'{"text": "a", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    assert read(deep, [1 << 20], 1 << 20) == {0: "a"}
    assert read(b"\n" + deep, [1 << 20], 1 << 20) == {1: BAD}


@given(st.lists(st.integers(0, 9)), st.integers(1, 20), st.booleans())
def test_cuts_are_line_starts_that_cover_the_file(
    lengths: list[int], unit_bytes: int, ends: bool
) -> None:
    content = b"\n".join(b"x" * length for length in lengths) + b"\n" * ends
    cuts = line_cuts(io.BytesIO(content), len(content), unit_bytes)
    assert (cuts[0], cuts[-1]) == (0, len(content))
    assert all(start < stop for start, stop in itertools.pairwise(cuts)) or not content
    assert all(content[at - 1 : at] == b"\n" for at in cuts[1:-1])
    parts = [
        b"".join(read_chunks(io.BytesIO(content), "jsonl", *part))
        for part in itertools.pairwise(cuts)
    ]
    assert b"".join(parts) == content


@given(st.lists(st.binary(max_size=50), min_size=1), st.integers(1, 9), st.integers(0, 3))
@pytest.mark.parametrize("format", ["jsonl.gz", "jsonl.zst"])
def test_joined_streams_are_one(
    format: str, parts: list[bytes], read_bytes: int, padding: int
) -> None:
    compress = gzip.compress if format == "jsonl.gz" else zstandard.compress
    whole = b"".join(compress(part) for part in parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "COMPRESSED_BYTES", read_bytes)
        stream = io.BytesIO(whole + bytes(padding))  # tape drives pad with NULs
        assert b"".join(read_chunks(stream, format, 0, len(whole))) == b"".join(parts)
        for left in (len(whole) - 1, len(compress(parts[0])) - 1, 0):
            with pytest.raises(OSError, match="the compressed stream ends early"):
                list(read_chunks(io.BytesIO(whole[:left]), format, 0, left))


def test_what_broke_the_stream_is_raised_after_the_lines_before_it() -> None:
    def chunks() -> Iterator[bytes]:
        yield b"a\nb\nc"
        raise OSError("broken")

    reader = blocks(chunks(), 100)
    assert next(reader) == b"a\nb\n"
    with pytest.raises(OSError, match="broken"):
        next(reader)

"""Files of bare ids are read in the width that they have, or refused; never in another one."""

import io
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.files_of_ids import EOS, HUGE, input_file, read_all

from data_prep.building.work_units import cut_units
from data_prep.errors import UserError
from data_prep.formats.pretokenized import id_width
from data_prep.formats.pretokenized.documents import cut_ids, read_ids
from data_prep.formats.pretokenized.flat_ids import check_lengths
from data_prep.formats.pretokenized.id_width import refuse_other_width
from data_prep.inputs.sources import InputFile

MANY = np.random.default_rng(0).integers(6, 50_000, 300_000)
MANY[24::50] = EOS


def written(path: Path, content: bytes) -> InputFile:
    path.write_bytes(content)
    return input_file(path)


def saved(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def llm_c(magic: int, version: int, ids: np.ndarray) -> bytes:
    return np.array([magic, version, len(ids), *[0] * 253], "<i4").tobytes() + ids.tobytes()


def documents_of(ids: np.ndarray) -> list[list[int]]:
    """The documents that end with EOS."""
    parts = np.split(ids, np.flatnonzero(ids == EOS) + 1)
    return [part[part != EOS].tolist() for part in parts if len(part)]


@pytest.mark.parametrize("dtype", ["<u2", "<i2", ">u2", "<u4", "<i4", "<i8", "<u8", ">i4", "u1"])
@pytest.mark.parametrize("unit_bytes", [64, HUGE])
def test_npy_is_read_as_its_header_says(tmp_path: Path, dtype: str, unit_bytes: int) -> None:
    ids = (MANY[:500] % (100 if dtype == "u1" else 30_000)).astype(dtype)
    file = written(tmp_path / "a.npy", saved(ids))
    assert read_all(file, "uint16", unit_bytes) == documents_of(ids)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (
            np.ones(99, np.float32),
            "numbers of type float32, expected integers; write ids as uint16",
        ),
        (np.ones(99, bool), "numbers of type bool, expected integers"),
        (np.ones((9, 9), np.uint16), r"of shape \(9, 9\), expected one dimension"),
        (np.array(1, np.uint16), r"of shape \(\), expected one dimension"),
    ],
)
def test_npy_of_something_else_is_refused(tmp_path: Path, array: np.ndarray, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        cut_ids(written(tmp_path / "a.npy", saved(array)), "uint16", EOS, HUGE)


@pytest.mark.parametrize(
    ("number", "dtype"), [(-1, "<i2"), (-1, "<i4"), (-7, "<i8"), (2**40, "<i8"), (2**63, "<u8")]
)
def test_what_is_no_id_is_named_by_its_value(tmp_path: Path, number: int, dtype: str) -> None:
    file = written(tmp_path / "a.npy", saved(np.array([1, number, EOS], dtype)))
    with pytest.raises(UserError, match=rf"a\.npy: holds {number}, and ids are 0 to 65,535; "):
        read_all(file, "uint16")


def test_npy_that_is_cut_or_damaged(tmp_path: Path) -> None:
    whole = saved(MANY.astype(np.uint16))
    for content, expected in (
        (whole[:-1], "a header of 128 and 300,000 ids of 2"),
        (whole[:50], "damaged, no NumPy"),
    ):
        with pytest.raises(UserError, match=expected):
            cut_ids(written(tmp_path / "a.npy", content), "uint16", EOS, HUGE)
    for at in range(128):
        flipped = bytearray(whole[:2000])
        flipped[at] ^= 0x20
        with pytest.raises(UserError):
            cut_ids(written(tmp_path / "a.npy", bytes(flipped)), "uint16", EOS, HUGE)


@pytest.mark.parametrize(
    ("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")]
)
def test_llm_c_headers_tell_the_width(tmp_path: Path, magic: int, version: int, dtype: str) -> None:
    ids = np.array([EOS, 1, 2, EOS, 3, EOS], dtype)
    assert (
        read_all(written(tmp_path / "a.bin", llm_c(magic, version, ids)), "uint16")
        == [[1, 2], [3], []][:2]
    )
    with pytest.raises(UserError, match=f"llm.c's header {magic} of version 99, not known"):
        cut_ids(written(tmp_path / "a.bin", llm_c(magic, 99, ids)), "uint16", EOS, HUGE)


WIDE = MANY.astype("<u4")
WITH_LARGE = np.where(np.arange(len(WIDE)) % 7 == 1, WIDE + 65_536, WIDE).astype("<u4")
OTHER_WIDTHS = {
    "uint32": WIDE.tobytes(),
    "int64": MANY.astype("<i8").tobytes(),
    "uint32, some above 65,535": WITH_LARGE.tobytes(),
    "uint32 shifted by 2 bytes": WIDE.tobytes()[2:-2],
    "uint16 and then uint32": MANY.astype("<u2").tobytes() + WIDE.tobytes(),
    "uint32 and then uint16": WIDE.tobytes() + MANY.astype("<u2").tobytes(),
    "a few": WIDE[:9].tobytes(),
    "20 bytes": np.array([7, EOS, 8, 9, 300], "<u4").tobytes(),
    "big-endian": WIDE.astype(">u4").tobytes(),
}


@pytest.mark.parametrize("kind", OTHER_WIDTHS)
def test_ids_of_another_width_are_refused(tmp_path: Path, kind: str) -> None:
    file = written(tmp_path / "a.bin", OTHER_WIDTHS[kind])
    with pytest.raises(
        UserError,
        match=r"a\.bin: every second id is at most 3, as in ids of 4 or 8 bytes; write them",
    ):
        cut_ids(file, "uint16", EOS, HUGE)


def test_what_lies_between_the_places_looked_at_is_seen_when_it_is_read(tmp_path: Path) -> None:
    narrow = np.tile(MANY, 8).astype("<u2")
    content = bytearray(narrow.tobytes())
    part = WIDE[: id_width.WINDOW_IDS].tobytes()
    at = 2 * (len(narrow) // 16)
    content[at : at + len(part)] = part
    file = written(tmp_path / "a.bin", bytes(content))
    ((start, stop, _),) = cut_ids(file, "uint16", EOS, HUGE)
    with pytest.raises(UserError, match="as in ids of 4 or 8 bytes"):
        list(read_ids(file, "uint16", start, stop, EOS))


@pytest.mark.parametrize("dtype", ["<u4", "<i8", ">u4"])
@pytest.mark.parametrize("at", [0, 70_001, 300_000])
@pytest.mark.parametrize("run", [1023, 5000])
def test_a_run_of_wider_ids_is_refused_wherever_it_lies(
    tmp_path: Path, dtype: str, at: int, run: int
) -> None:
    narrow = MANY.astype("<u2")
    wide = np.frombuffer(MANY.astype(dtype).tobytes(), "<u2")[:run]
    ids = np.concatenate([narrow[:at], wide, narrow[at:]])
    file = written(tmp_path / "a.bin", ids.tobytes())
    with pytest.raises(UserError, match=r"every second id .* as in ids of 4 or 8 bytes") as caught:
        read_all(file, "uint16")
    if named := re.search(r"at byte ([\d,]+)", str(caught.value)):
        assert 2 * at <= int(named[1].replace(",", "")) < 2 * (at + run)


def test_a_text_of_few_ids_in_turns_is_no_run_of_wider_ones(tmp_path: Path) -> None:
    ids = np.concatenate([MANY[:70_000], [0, 30, 0, 31] * 600, [0] * 3000, MANY[70_000:]])
    assert read_all(
        written(tmp_path / "a.bin", ids.astype("<u2").tobytes()), "uint16"
    ) == documents_of(ids)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 65_535), st.integers(5, 400), st.integers(0, 2**32 - 1))
def test_ordinary_ids_are_not_refused(largest: int, length: int, seed: int) -> None:
    """Vocabularies of any size, most ids small as real ones are."""
    ids = np.minimum(np.random.default_rng(seed).zipf(1.3, length) + 3, largest + 4)
    refuse_other_width(ids.astype("<u2"), "a.bin")


def test_a_leading_empty_document_is_one(tmp_path: Path) -> None:
    """nanoGPT's files end with the id that follows each document; llm.c's begin with the one
    that precedes it.
    """
    ids = [0, 45, 46, 0, 48, 49, 0, 51, 52, 0]

    def rows(values: list[int], header: bytes = b"") -> list[tuple[int, list[int]]]:
        file = written(tmp_path / "a.bin", header + np.array(values, "<u2").tobytes())
        (start, stop, _), *more = cut_ids(file, "uint16", 0, HUGE)
        assert not more
        ((found, offsets),) = read_ids(file, "uint16", start, stop, 0)
        return [(i, found[a:b].tolist()) for i, (a, b) in enumerate(itertools.pairwise(offsets))]

    documents = [[45, 46], [48, 49], [51, 52]]
    assert rows(ids) == [*enumerate([[], *documents])]
    assert rows(ids[:-1]) == [*enumerate(documents)]
    assert rows(ids[1:]) == [*enumerate(documents)]
    assert rows([0, *ids]) == [*enumerate([[], [], *documents])]
    header = np.array([20240520, 1, len(ids), *[0] * 253], "<i4").tobytes()
    assert rows(ids, header)[:3] == [*enumerate(documents)]


@pytest.mark.parametrize("ids", [[EOS] * 90, [7, EOS] * 50, [7, 8, 9, *[EOS] * 20] * 9])
def test_a_source_of_hardly_any_tokens_a_document_is_refused(
    tmp_path: Path, ids: list[int]
) -> None:
    files = [written(tmp_path / f"{i}.bin", np.array(ids, "<u2").tobytes()) for i in range(3)]
    with pytest.raises(
        UserError, match=r"source 's': .* documents looked at have one token or none; see"
    ):
        cut_units(files, source="s", format="uint16", text_field=None, eos_id=EOS)
    check_lengths(
        [written(tmp_path / "good.bin", MANY.astype("<u2").tobytes()), *files[:1]], EOS, "here"
    )


def test_a_file_of_another_kind_says_so(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    with pytest.raises(
        UserError, match=r"a git-lfs pointer by its first bytes, not uint16; .*git lfs pull"
    ):
        cut_ids(written(tmp_path / "a.bin", pointer), "uint16", EOS, HUGE)

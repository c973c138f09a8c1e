"""A parquet file with encrypted columns is refused by its footer, before a library is asked about
its columns.

No such file is made here: the field that says so is put into the footers of ordinary ones, which
stay harmless.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.text_files import input_files, read, units_of

from data_prep.errors import UserError
from data_prep.formats import parquet_footer
from data_prep.formats.parquet import open_parquet
from data_prep.formats.parquet_footer import is_encrypted, refuse_encrypted

# field 8 (1 behind the last), a struct; in it field 1, a struct (AES_GCM_V1) that is empty; the
# ends of both
ALGORITHM = b"\x1c\x1c\x00\x00"


def write(path: Path, columns: int = 2, groups: int = 3, **more: object) -> Path:
    texts = {"text": [f"text {i}" for i in range(groups)]}
    more_columns = {f"column {i}": [f"{i}" * 9] * groups for i in range(columns - 1)}
    pq.write_table(pa.table(texts | more_columns), path, row_group_size=1, **more)
    return path


def footer_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[-8 - int.from_bytes(content[-8:-4], "little") : -8]


def marked(path: Path) -> Path:
    """The same file, its footer with one field more; its columns are as they were."""
    content, footer = path.read_bytes(), footer_of(path)
    assert footer.endswith(b"\0")
    changed = footer[:-1] + ALGORITHM + b"\0"
    path.write_bytes(
        content[: -8 - len(footer)] + changed + len(changed).to_bytes(4, "little") + b"PAR1"
    )
    return path


@pytest.mark.parametrize("columns", [1, 2, 300])
@pytest.mark.parametrize("version", ["1.0", "2.6"])
def test_footers_of_ordinary_and_of_marked_files(
    tmp_path: Path, columns: int, version: str
) -> None:
    path = write(tmp_path / "a.parquet", columns, version=version)
    created_by = pq.read_metadata(path).created_by.encode()
    for known in (created_by, b"", b"of another writer"):
        assert not is_encrypted(footer_of(path), known)
    marked(path)
    for known in (created_by, b"", b"of another writer"):
        assert is_encrypted(footer_of(path), known)


@pytest.mark.parametrize("tail_bytes", [16, 300, 1 << 20])
def test_the_end_of_a_large_footer_is_enough_or_all_is_read(
    tmp_path: Path, tail_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_footer, "TAIL_BYTES", tail_bytes)
    path = write(tmp_path / "a.parquet", 50)
    texts = [f"text {i}" for i in range(3)]
    assert read(units_of(path, format="parquet")) == (texts, [0, 1, 2], [])
    with pytest.raises(
        UserError, match=r"a\.parquet: has encrypted columns; decrypt it, and write it again"
    ):
        open_parquet(input_files(marked(path))[0], "text")


@pytest.mark.parametrize("skip_bad", [False, True])
def test_no_unit_is_cut_of_such_a_file(tmp_path: Path, skip_bad: bool) -> None:
    path = marked(write(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match="has encrypted columns"):
        units_of(path, format="parquet", skip_bad=skip_bad)


@pytest.mark.parametrize("keep", range(1, 60, 7))
def test_a_footer_that_ends_early_is_damaged(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "a.parquet")
    cut = footer_of(path)[:keep]
    (tmp_path / "cut").write_bytes(cut + len(cut).to_bytes(4, "little") + b"PAR1")
    (file,) = input_files(tmp_path / "cut")
    with (
        open(file.url, "rb") as stream,
        pytest.raises(UserError, match="damaged, its footer can't be read"),
    ):
        refuse_encrypted(file, stream, None)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_footer_whose_writer_is_not_utf8_is_damaged(tmp_path: Path, skip_bad: bool) -> None:
    path = write(tmp_path / "a.parquet")
    content, writer = path.read_bytes(), b"parquet-cpp-arrow version"
    assert content.count(writer) == 1
    path.write_bytes(content.replace(writer, b"\xf0" + writer[1:]))
    with pytest.raises(UserError, match=r"a\.parquet: not a readable parquet file .*codec"):
        units_of(path, format="parquet", skip_bad=skip_bad)

"""Files that outlive a kill, and what is said where they can't be written."""

from pathlib import Path

import pytest

from data_prep.errors import os_error_line
from data_prep.files import replace_directory, try_place, write_durably


def test_a_refusal_names_the_file_that_was_asked_for() -> None:
    """On a file system that takes no file: not the one that is written beside."""
    path = Path("/proc/report.html")
    said = f"{path}: No such file or directory; check the path"
    for action in (
        lambda: write_durably(path, b"content"),
        lambda: replace_directory(path, lambda staged: None),
        lambda: try_place(path),
    ):
        with pytest.raises(OSError, match="/proc") as refused:
            action()
        assert os_error_line(refused.value) == said


def test_trying_a_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    for path in (tmp_path / "there", tmp_path / "new", tmp_path / "deep" / "below" / "new"):
        try_place(path)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "mine"


def test_a_place_below_a_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as refused:
        try_place(tmp_path / "file" / "new")
    assert refused.value.filename == str(tmp_path / "file" / "new")

"""The scores of documents: read back as they were written, and refused where they are damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.errors import UserError
from pretrain.evaluation.documents import (
    DocumentScores,
    documents_path,
    read_documents,
    write_documents,
)


def three_documents(**changes: Any) -> DocumentScores:
    """Two documents of one source and one of another."""
    fields: dict[str, Any] = {
        "nats": np.array([1.5, 0.1, 7.25]),
        "targets": np.array([3, 1, 9]),
        "text_bytes": np.array([5, 0, 12]),
        "sources": ("ä/b", "c"),
        "source_of": np.array([0, 0, 1], np.int32),
    }
    return DocumentScores(**{**fields, **changes})


def test_scores_are_read_as_they_were_written_in_the_same_bytes(tmp_path: Path) -> None:
    path = documents_path(tmp_path / "evaluations" / "step-00000100.abc.json")
    assert path.relative_to(tmp_path).as_posix() == "evaluations/step-00000100.abc.documents.npz"
    written = three_documents()
    write_documents(written, path)
    first = path.read_bytes()
    read = read_documents(path)
    assert read.sources == written.sources
    for name in ("nats", "targets", "text_bytes", "source_of"):
        assert (getattr(read, name) == getattr(written, name)).all()
        assert getattr(read, name).dtype == getattr(written, name).dtype
    write_documents(read, path)
    assert path.read_bytes() == first
    assert len(read) == 3
    assert read.of_source(1).nats.tolist() == [7.25]
    assert len(read.of_source(0)) == 2


@pytest.mark.parametrize("cut", [0, 10, 300])
def test_a_cut_file_is_one_clear_line(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.documents.npz"
    write_documents(three_documents(), path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"not what pretrain.evaluate writes \(.*pretrain.evaluate"):
        read_documents(path)


def test_arrays_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.documents.npz"
    write_documents(three_documents(targets=np.array([3, 1])), path)
    with pytest.raises(UserError, match=r"its array targets"):
        read_documents(path)
    write_documents(three_documents(source_of=np.array([0, 0, 2], np.int32)), path)
    with pytest.raises(UserError, match=r"a document of no source"):
        read_documents(path)
    path.unlink()
    with pytest.raises(UserError, match=r"no such file; run python -m pretrain.evaluate"):
        read_documents(path)


def test_whichever_byte_is_changed_there_is_one_clear_line_or_the_same_scores(
    tmp_path: Path,
) -> None:
    path = tmp_path / "evaluation.documents.npz"
    write_documents(three_documents(), path)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            read = read_documents(path)
        except UserError:
            refused += 1
        else:
            assert read.nats.tolist() == [1.5, 0.1, 7.25]
    assert refused > len(whole) / 10


def test_another_kind_of_numpy_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.documents.npz"
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(UserError, match=r"not what pretrain\.evaluate writes"):
        read_documents(path)

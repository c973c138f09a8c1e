"""The scores of each document of an evaluation, and the file that keeps them beside the result.

    evaluation.json                  the figures of the whole
    evaluation.documents.npz         nats, targets and bytes of each document behind them

What compares models, or says how sure a figure is, draws documents anew from it. Only this module
knows its arrays: a plain NumPy archive, no pickle.
"""

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.errors import UserError, explained
from data_prep.files import write_durably

DOCUMENTS_SUFFIX = ".documents.npz"
ADVICE = "run python -m pretrain.evaluate again, or remove it"
# Arrays of the file, and the kind of number that each holds.
ARRAYS: dict[str, np.dtype[Any]] = {
    "nats": np.dtype(np.float64),
    "targets": np.dtype(np.int64),
    "text_bytes": np.dtype(np.int64),
    "source_of": np.dtype(np.int32),
}
# What NumPy and the archive below it raise for a damaged file, or for one of another kind.
DAMAGES = (
    ValueError,
    LookupError,
    TypeError,
    SyntaxError,
    EOFError,
    OSError,
    NotImplementedError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)
SOURCES = "sources"  # their names, one for each number of `source_of`


@dataclass(frozen=True, kw_only=True, eq=False)
class DocumentScores:
    """What D documents gave under a model, in the order of the stream."""

    nats: npt.NDArray[np.float64]  # (D,), of all targets of a document
    targets: npt.NDArray[np.int64]  # (D,), end-of-document included
    text_bytes: npt.NDArray[np.int64]  # (D,), UTF-8, without end-of-document
    sources: tuple[str, ...]
    source_of: npt.NDArray[np.int32]  # (D,), indices of `sources`

    def __len__(self) -> int:
        return len(self.nats)

    def of_source(self, index: int) -> "DocumentScores":
        """The documents of one source, by its index."""
        mine = self.source_of == index
        return DocumentScores(
            nats=self.nats[mine],
            targets=self.targets[mine],
            text_bytes=self.text_bytes[mine],
            sources=self.sources,
            source_of=self.source_of[mine],
        )


def documents_path(result_path: Path) -> Path:
    """Where the documents of a result lie: beside it."""
    return result_path.with_name(result_path.stem + DOCUMENTS_SUFFIX)


def write_documents(scores: DocumentScores, path: Path) -> None:
    """Write the scores of documents durably, the same bytes for the same scores.

    Raises OSError where that can't be.
    """
    arrays: dict[str, npt.NDArray[Any]] = {
        name: np.ascontiguousarray(getattr(scores, name), dtype) for name, dtype in ARRAYS.items()
    }
    arrays[SOURCES] = np.array(scores.sources, np.str_)
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_durably(path, content.getbuffer())


def read_documents(path: Path) -> DocumentScores:
    """The scores of documents as they were written.

    Raises UserError for a file that is not there or not what `write_documents` writes.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; run python -m pretrain.evaluate to make it")
    problem = f"{path}: not what pretrain.evaluate writes"
    with explained(DAMAGES, problem, ADVICE), np.load(path, allow_pickle=False) as held:
        arrays = {name: held[name] for name in (*ARRAYS, SOURCES)}
    documents = len(arrays["source_of"])
    for name, dtype in ARRAYS.items():
        if arrays[name].dtype != dtype or arrays[name].shape != (documents,):
            raise UserError(f"{problem} (its array {name}); {ADVICE}")
    sources = tuple(str(name) for name in arrays.pop(SOURCES))
    source_of = arrays["source_of"]
    if documents and not 0 <= source_of.min() <= source_of.max() < len(sources):
        raise UserError(f"{problem} (a document of no source); {ADVICE}")
    return DocumentScores(sources=sources, **arrays)

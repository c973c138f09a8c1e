"""The text that a model is measured on: a stream of ids, and the documents in it.

That is the validation split of a data set, or files of any format that data preparation reads.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from data_prep.errors import UserError
from data_prep.shards import TOKEN_DTYPE, TOKENIZER_NAME, ShardReader, Tokens
from data_prep.tokenizer.text_files import TextEncoder, TextFile, text_bytes_of_documents
from pretrain.data.loader import ValidationWindows
from pretrain.data.stream import I64


class IdStream(Protocol):
    """Ids, one after another, wherever they lie."""

    tokens: int

    def read(self, start: int, length: int) -> Tokens:
        """`length` ids from `start`."""

    def windows(self, starts: I64, length: int) -> Tokens:
        """One row of `length` ids for each start, shape (starts, length)."""


class HeldIds:
    """Ids in memory, as a stream."""

    def __init__(self, ids: Tokens) -> None:
        self.ids = ids
        self.tokens = len(ids)

    def read(self, start: int, length: int) -> Tokens:
        """`length` ids from `start`."""
        return self.ids[start : start + length]

    def windows(self, starts: I64, length: int) -> Tokens:
        """One row of `length` ids for each start, shape (starts, length)."""
        places: I64 = starts[:, None] + np.arange(length)
        return self.ids[places]


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredText:
    """A stream and the D documents in it, in its order. Its first id is no target."""

    stream: IdStream
    ends: I64  # (D,), the position behind the last id of each document
    text_bytes: I64  # (D,), UTF-8, without end-of-document
    sources: tuple[str, ...]
    source_of: npt.NDArray[np.int32]  # (D,), indices of `sources`
    eos_id: int
    fingerprint: str  # of the data set, or the digest of the texts


def validation_text(reader: ShardReader) -> MeasuredText:
    """The validation split of a data set, as one stream over its shards.

    Raises UserError for a split of fewer than two ids.
    """
    stream = ValidationWindows(reader, seq_len=1).stream
    manifest = reader.manifest
    shards = manifest.shards_of("validation")
    names = tuple(dict.fromkeys(shard.source for shard in shards))
    ends = []
    source_of = []
    for begin, shard in zip(stream.begins.tolist(), shards, strict=False):
        starts = reader.documents(shard)[:, 0].astype(np.int64)
        ends_in_shard = np.append(starts[1:], shard.tokens)
        ends.append(begin + ends_in_shard)
        source_of.append(np.full(len(starts), names.index(shard.source), np.int32))
    tokenizer_dir = reader.data_dir / TOKENIZER_NAME
    encoder = TextEncoder(tokenizer_dir) if tokenizer_dir.is_dir() else None
    return MeasuredText(
        stream=stream,
        ends=np.concatenate(ends),
        text_bytes=text_bytes_of_documents(reader, "validation", encoder),
        sources=names,
        source_of=np.concatenate(source_of),
        eos_id=manifest.eos_id,
        fingerprint=manifest.fingerprint,
    )


def text_of_files(asked: TextFile, encoder: TextEncoder) -> MeasuredText:
    """The documents of files, as one stream that begins with an end-of-document id.

    So each of their ids is a target, as it is behind another document. Raises UserError for files
    that can't be read or hold no text.
    """
    eos_id = encoder.tokenizer.eos_id
    texts = encoder.read(asked)
    before = np.array([eos_id], TOKEN_DTYPE)
    return MeasuredText(
        stream=HeldIds(np.concatenate([before, texts.tokens])),
        ends=texts.bounds[1:] + 1,
        text_bytes=texts.text_bytes,
        sources=(asked.path,),
        source_of=np.zeros(len(texts.text_bytes), np.int32),
        eos_id=eos_id,
        fingerprint=texts.digest,
    )


def run_encoder(run_dir: Path | None, expected: str | None) -> TextEncoder:
    """The tokenizer that a run keeps, to encode other texts as its data was.

    `expected` is its identity as the checkpoint tells it. Raises UserError where it is not at hand
    or another one.
    """
    if run_dir is None:
        raise UserError(
            "a checkpoint outside of its run has no tokenizer to encode a text with; give the run's"
            " directory to --run-dir"
        )
    directory = run_dir / TOKENIZER_NAME
    encoder = TextEncoder(directory)
    if expected and encoder.sha256 != expected:
        raise UserError(
            f"{directory}: is not the tokenizer of the checkpoint (sha256 {encoder.sha256[:12]}, "
            f"not {expected[:12]}); copy the tokenizer of the run's data set there"
        )
    return encoder

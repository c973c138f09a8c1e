"""Texts as ids, and ids as bytes of text, for whoever measures a model and builds no data set.

Files are read by the same readers, and encoded by the same code, as those of a data set.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from data_prep.building.unit_shards import ended
from data_prep.building.work_units import SourceInputs, cut_units
from data_prep.errors import UserError
from data_prep.formats.documents import Documents
from data_prep.formats.flat_arrays import bounds_of, byte_lengths
from data_prep.formats.known import (
    find_files,
    format_of,
    read_documents,
    refusal,
    text_field_of,
    with_files_beside,
)
from data_prep.formats.work_unit import WorkUnit
from data_prep.shards import ShardReader, Tokens
from data_prep.tokenizer.encode import Encoded, Encoder, decode_ids, new_encoder, special_documents
from data_prep.tokenizer.load import LoadedTokenizer, load_tokenizer

DEFAULT_TEXT_FIELD = "text"
PIECE_TOKENS = 1 << 20  # decoded at once

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TextFile:
    """Where some text lies, and how it is to be read."""

    path: str  # of a file, or a glob of several
    format: str | None = None  # None: the names tell it
    text_field: str = DEFAULT_TEXT_FIELD


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedTexts:
    """D documents as ids."""

    tokens: Tokens  # (N,), each document followed by the end-of-document id
    bounds: Counts  # (D + 1,), where each document begins, and where the last one ends
    text_bytes: Counts  # (D,), UTF-8
    digest: str  # xxh3-128 of the texts, whatever file or format they were in


class TextEncoder:
    """A tokenizer's directory, to encode texts and to tell bytes of ids.

    Raises UserError for a tokenizer that shards can't be made with.
    """

    def __init__(self, directory: Path) -> None:
        self.tokenizer: LoadedTokenizer = load_tokenizer(directory)

    @property
    def sha256(self) -> str:
        """The tokenizer's identity."""
        return self.tokenizer.sha256

    @cached_property
    def _encoder(self) -> Encoder:
        return new_encoder(self.tokenizer, prefer="gigatoken")

    def encode(self, text: str) -> list[int]:
        """The ids of a text; what spells a special token is text."""
        return self.tokenizer.by_reference.encode([text])[0]

    def decode(self, ids: list[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become replacement characters."""
        return self.tokenizer.by_reference.decode(ids)

    def read(self, asked: TextFile) -> EncodedTexts:
        """All documents of some files, in order.

        Raises UserError for what is not there, for a bad document, and where there is no text.
        """
        digest = xxhash.xxh3_128()
        tokens = []
        lengths = []
        text_bytes = []
        for ids, documents in self._batches(asked):
            offsets = ids[1]
            tokens.append(ended(ids[0], offsets, self.tokenizer.eos_id))
            lengths.append(np.diff(offsets) + 1)
            of_texts = byte_lengths(documents.texts)
            text_bytes.append(of_texts)
            digest.update(of_texts.tobytes())
            for text in documents.texts:
                digest.update(text.as_buffer())
        if not tokens:
            raise UserError(f"{asked.path}: holds no text to measure; name files that hold some")
        return EncodedTexts(
            tokens=np.concatenate(tokens),
            bounds=bounds_of(np.concatenate(lengths)),
            text_bytes=np.concatenate(text_bytes),
            digest=digest.hexdigest(),
        )

    def _batches(self, asked: TextFile) -> Iterator[tuple[Encoded, Documents]]:
        """Batches of documents that are not empty, with their ids."""
        for unit in units_of(asked, self.tokenizer.eos_id):
            for documents in read_documents(unit, self.tokenizer):
                if not len(documents.texts):
                    continue
                encoded = documents.encoded or self._encoder.encode(documents.texts)
                reasons = special_documents(self.tokenizer, *encoded)
                if reasons:
                    first = min(reasons)
                    of_file = unit.parts()[documents.file]
                    row = int(documents.rows[first]) - documents.rows_before
                    raise refusal(of_file, row, reasons[first])
                yield encoded, documents

    @cached_property
    def _bytes_of_id(self) -> Counts | None:
        """Bytes that each id of a byte-level tokenizer stands for; None of another one."""
        table = self.tokenizer.token_bytes
        return None if table is None else byte_lengths(table)

    def byte_lengths(self, tokens: Tokens, bounds: Counts) -> Counts:
        """UTF-8 bytes of documents, (D,), as their ids decode.

        `tokens` are theirs, each document followed by the end-of-document id; `bounds`, (D + 1,),
        say where each begins. Exact where the tokenizer keeps all text.
        """
        if self._bytes_of_id is not None:
            of_tokens = self._bytes_of_id[tokens]
            of_tokens[bounds[1:] - 1] = 0  # end of document
            return np.add.reduceat(of_tokens, bounds[:-1])
        lengths: list[Counts] = []
        first = 0
        while first < len(bounds) - 1:
            stop = int(np.searchsorted(bounds, bounds[first] + PIECE_TOKENS, side="right")) - 1
            stop = max(stop, first + 1)
            starts = bounds[first : stop + 1]
            is_text = np.ones(int(starts[-1] - starts[0]), np.bool_)
            is_text[starts[1:] - starts[0] - 1] = False
            ids = tokens[starts[0] : starts[-1]][is_text].astype(np.uint32)
            texts = decode_ids(self.tokenizer, ids, bounds_of(np.diff(starts) - 1))
            lengths.append(byte_lengths(texts))
            first = stop
        return np.concatenate(lengths)


def units_of(asked: TextFile, eos_id: int) -> list[WorkUnit]:
    """The parts of some files that readers take. Raises UserError where there are none."""
    where = "--text"
    base = Path.cwd()
    units = []
    for file in find_files(asked.format, base, asked.path, where):
        name = asked.format or format_of(file.name, where)
        text_field = text_field_of(name, asked.text_field)
        (whole,) = with_files_beside(name, base, [file], where)
        inputs = SourceInputs(
            source="text", files=[whole], format=name, text_field=text_field, eos_id=eos_id
        )
        units += cut_units(inputs)
    return units


def text_bytes_of_documents(reader: ShardReader, split: str, encoder: TextEncoder | None) -> Counts:
    """UTF-8 bytes of each document of a split, (D,), in the order of the stream.

    They add up to what the manifest says of each shard: where ids do not decode to all of the
    text, or there is no tokenizer, its bytes are shared out by what they decode to, or by tokens.
    """
    lengths: list[Counts] = [np.zeros(0, np.int64)]
    for shard in reader.manifest.shards_of(split):
        bounds = np.append(reader.documents(shard)[:, 0].astype(np.int64), shard.tokens)
        of_documents = np.diff(bounds)
        if encoder is not None:
            of_documents = encoder.byte_lengths(reader.tokens(shard), bounds)
        lengths.append(shared_out(shard.text_bytes, of_documents))
    return np.concatenate(lengths)


def shared_out(total: int, weights: Counts) -> Counts:
    """A whole number in parts that are about proportional to weights, and add up to it."""
    summed = int(weights.sum())
    if summed == total:
        return weights
    # Parts of a running sum, rounded down: each part is off by less than one. In fp64 the sum of a
    # shard is exact.
    ends = np.cumsum(weights, dtype=np.float64) / max(summed, 1) * total
    rounded = np.floor(ends).astype(np.int64)
    rounded[-1] = total
    return np.diff(rounded, prepend=0)

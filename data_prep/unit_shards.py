"""One work unit to its shards: encode, prove, split, append end-of-document ids, write.

The inner loop of `build_shards`: a line of four threads that read, encode, assemble and write, so that
encoding never waits. Ids stay in flat arrays all the way.
"""

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from data_prep.corpus import Documents, WorkUnit, read_documents
from data_prep.encode import Encoder, Ids, LoadedTokenizer, Offsets, reference_ids
from data_prep.errors import UserError
from data_prep.ranks import Progress
from data_prep.shards import INDEX_DTYPE, SPLITS, TOKEN_DTYPE, Index, Tokens, write_array

PARITY_ONE_IN = 1024  # documents, chosen by their hash
PARITY_CHARACTERS = 64 << 10  # of a document, at most

SPACE = "make space or choose another --output-dir, and build again"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ShardFacts:
    """What the manifest says about one written shard, apart from where it lies."""

    split: str
    tokens: int
    documents: int
    text_bytes: int
    text_characters: int
    xxh3_128: str
    index_xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class UnitResult:
    """A finished work unit."""

    unit: WorkUnit
    rows: int
    empty_documents: int
    shards: tuple[ShardFacts, ...]


@dataclass(kw_only=True)
class SplitContent:
    """What has come together for one split of a unit."""

    tokens: list[Tokens] = field(default_factory=list)
    index: list[Index] = field(default_factory=list)
    size: int = 0
    text_bytes: int = 0
    text_characters: int = 0

    def add(self, tokens: Tokens, starts: Offsets, rows: npt.NDArray[np.uint64]) -> None:
        """Append whole documents: their tokens, where each starts in them, and their rows."""
        self.index.append(np.stack([starts.astype(INDEX_DTYPE) + np.uint64(self.size), rows], axis=1))
        self.tokens.append(tokens)
        self.size += len(tokens)


class UnitBuilder:
    """Turns work units into shards; one for each rank."""

    def __init__(
        self, *, output_dir: Path, tokenizer: LoadedTokenizer, encoder: Encoder, validation_fraction: float
    ) -> None:
        self.output_dir = output_dir
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.validation_below = np.uint64(min(int(validation_fraction * 2**64), 2**64 - 1))

    def build(self, units: Sequence[WorkUnit], progress: Progress) -> list[UnitResult]:
        """Build the units in order; returns once every file is on the disk."""
        written: list[Future[UnitResult]] = []
        with ThreadPoolExecutor(1) as writer:
            for unit, batches in itertools.groupby(read_ahead(self._encode_units(units)), operator.itemgetter(0)):
                content = {split: SplitContent() for split in SPLITS}
                rows = empty = 0
                for _, documents, encoded in batches:
                    if encoded is not None:
                        self._add(unit, documents, *encoded, content, is_first=rows == 0)
                    rows, empty = rows + documents.rows_read, empty + documents.empty
                    progress.add(documents.input_bytes, pc.sum(pc.binary_length(documents.texts)).as_py() or 0)
                for earlier in written[-1:]:
                    earlier.result()  # at most two units in memory
                written.append(writer.submit(self._write, unit, rows, empty, content))
            return [unit_written.result() for unit_written in written]

    def _encode_units(
        self, units: Iterable[WorkUnit]
    ) -> Iterator[tuple[WorkUnit, Documents, tuple[Ids, Offsets] | None]]:
        """The units' batches with their ids; None where a batch has no documents."""
        for unit, documents in read_ahead(_read_units(units)):
            yield unit, documents, self.encoder.encode(documents.texts) if len(documents.texts) else None

    def _add(
        self, unit: WorkUnit, documents: Documents, ids: Ids, offsets: Offsets, content: dict[str, SplitContent],
        *, is_first: bool,
    ) -> None:  # fmt: skip
        """Prove a batch and add its documents to their splits."""
        hashes = hash_texts(documents.texts)
        self._prove(unit, documents, ids, offsets, _parity_sample(hashes, at_least_one=is_first))
        tokens, starts = self._with_eos(ids, offsets)
        is_validation = hashes < self.validation_below
        lengths = pc.binary_length(documents.texts).to_numpy()
        characters = pc.utf8_length(documents.texts).to_numpy()
        for split, chosen in zip(SPLITS, (~is_validation, is_validation), strict=True):
            part = content[split]
            for first, stop in _runs(chosen):
                start = starts[first]
                part.add(tokens[start : starts[stop]], starts[first:stop] - start, documents.rows[first:stop])
            part.text_bytes += int(lengths[chosen].sum())
            part.text_characters += int(characters[chosen].sum())

    def _with_eos(self, ids: Ids, offsets: Offsets) -> tuple[Tokens, Offsets]:
        """Shard tokens of a batch, and the start of each document in them (documents + 1)."""
        if len(ids) and ids.max() >= self.tokenizer.vocab_size:
            raise UserError(f"{self.encoder.name} gave id {ids.max()}, beyond the vocabulary; use --encoder tokenizers")
        documents = len(offsets) - 1
        starts = offsets + np.arange(documents + 1)
        tokens = np.full(len(ids) + documents, self.tokenizer.eos_id, TOKEN_DTYPE)
        is_text = np.ones(len(tokens), bool)
        is_text[starts[1:] - 1] = False
        tokens[is_text] = ids
        if np.count_nonzero(tokens == self.tokenizer.eos_id) != documents:
            directory, token = self.tokenizer.directory, self.tokenizer.eos_token
            raise UserError(
                f"{directory}: some text encodes to eos_token {token!r}; name a token that text never gives"
            )
        return tokens, starts

    def _prove(self, unit: WorkUnit, documents: Documents, ids: Ids, offsets: Offsets, sample: Iterable[int]) -> None:
        """Compare documents with the reference. Raises UserError naming the one that differs."""
        if self.encoder.is_reference:
            return
        for i in sample:
            text, got = documents.texts[i].as_py(), ids[offsets[i] : offsets[i + 1]]
            if len(text) > PARITY_CHARACTERS:
                text = text[:PARITY_CHARACTERS]
                got, _ = self.encoder.encode(pa.array([text], pa.large_string()))
            if not np.array_equal(got, reference_ids(self.tokenizer, text)):
                document = f"{unit.path}: document in row {documents.rows[i]} of unit {unit.name}"
                different = f"{self.encoder.name} and tokenizers give different ids"
                raise UserError(f"{document}: {different}; build with --encoder tokenizers")

    def _write(self, unit: WorkUnit, rows: int, empty: int, content: dict[str, SplitContent]) -> UnitResult:
        """Write the unit's shards and indexes durably."""
        parts = {split: part for split, part in content.items() if part.size}
        try:
            shards = tuple(self._write_shard(unit, split, part) for split, part in parts.items())
        except OSError as error:
            raise UserError(f"{self.output_dir}: can't write unit {unit.name} ({error.strerror}); {SPACE}") from None
        return UnitResult(unit=unit, rows=rows, empty_documents=empty, shards=shards)

    def _write_shard(self, unit: WorkUnit, split: str, part: SplitContent) -> ShardFacts:
        path = self.output_dir / shard_path(split, unit)
        index = np.concatenate(part.index)
        return ShardFacts(
            split=split,
            tokens=part.size,
            documents=len(index),
            text_bytes=part.text_bytes,
            text_characters=part.text_characters,
            xxh3_128=write_array(path, np.concatenate(part.tokens)),
            index_xxh3_128=write_array(path.with_name(f"{unit.name}.documents.npy"), index),
        )


def shard_path(split: str, unit: WorkUnit) -> str:
    """Where a unit's shard of a split lies in the data set."""
    return f"shards/{split}/{unit.source}/{unit.name}.npy"


def hash_texts(texts: pa.LargeStringArray) -> Index:
    """xxh3-64 of each text's UTF-8 bytes: a document's split, and its place in the parity sample."""
    _, offsets, data = texts.buffers()
    bounds = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1].tolist()
    view = memoryview(data)
    hashes = (xxhash.xxh3_64_intdigest(view[start:stop]) for start, stop in itertools.pairwise(bounds))
    return np.fromiter(hashes, np.uint64, len(texts))


def read_ahead(batches: Iterator[T]) -> Iterator[T]:
    """The same batches; the next one is read while the last one is worked on."""
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(next, batches, None)
        while (batch := ahead.result()) is not None:
            ahead = reader.submit(next, batches, None)
            yield batch


def _read_units(units: Iterable[WorkUnit]) -> Iterator[tuple[WorkUnit, Documents]]:
    return ((unit, documents) for unit in units for documents in read_documents(unit))


def _parity_sample(hashes: Index, *, at_least_one: bool) -> list[int]:
    sample = np.flatnonzero(hashes % PARITY_ONE_IN == 0).tolist()
    return sample or ([int(hashes.argmin())] if at_least_one else [])


def _runs(chosen: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Ranges of neighbours that are chosen."""
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False)).tolist()
    return zip(edges[::2], edges[1::2], strict=True)

"""What a report takes from the shards of a data set: how long documents are, and which documents a
step was made of. No more of them is read than takes a moment, of a data set of any size.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from data_prep.layout import SPLITS
from data_prep.manifest import Shard, load_manifest
from data_prep.shards import INDEX_DTYPE, TOKENIZER_NAME, Index, ShardReader, open_array
from pretrain.config.recipe import Recipe
from pretrain.data.loader import TrainingLoader
from pretrain.data.provenance import Part, parts_of

MOST_COUNTED = 4_000_000  # documents of a data set whose lengths are looked at: 0.2 s
PIECE_DOCUMENTS = 65_536  # neighbours in an index, looked at in one place
MOST_ROWS_READ = 8  # rows of a step whose documents are looked up
MOST_NAMED = 3  # documents of a step that are named
MOST_INDEX = 4_000_000  # documents of a shard in which one is looked up: 64 MB of index
FIRST_IDS = 40  # of a document that become the text beside its name
FIRST_CHARACTERS = 80

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SourceLengths:
    """Tokens of the documents of a source in both splits, their end-of-document ids aside."""

    name: str
    documents: int
    counted: int  # of these, evenly spread
    median: float
    longest: int  # of those counted
    # How many counted documents have a length of so many bits: 4 to 7 tokens have 3.
    by_bits: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StepDocuments:
    """Some documents of a step's batch."""

    named: tuple[str, ...]  # those with the most tokens in it
    others: int  # that are not named
    rows: int  # of the batch that were looked at
    of_rows: int


class PatientReader(ShardReader):
    """Keeps the index it read last: the documents of a window mostly lie in one shard."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        self._newest: tuple[str, Index] | None = None

    def documents(self, shard: Shard) -> Index:
        """As of any reader."""
        newest = self._newest
        if newest is not None and newest[0] == shard.path:
            return newest[1]
        index = super().documents(shard)
        self._newest = (shard.path, index)
        return index


@functools.lru_cache(maxsize=4)  # runs on one page mostly share a data set
def source_lengths(data_dir: Path, fingerprint: str) -> tuple[SourceLengths, ...]:
    """Document lengths of each source of the data set that lies there, of that fingerprint.

    Raises UserError where an index is missing or damaged.
    """
    manifest = load_manifest(data_dir)
    assert manifest.fingerprint == fingerprint
    share = MOST_COUNTED // len(manifest.sources)
    found = []
    for source in manifest.sources:
        shards = [s for split in SPLITS for s in manifest.shards_of(split, source.name)]
        documents = sum(shard.documents for shard in shards)
        every = max(1, -(-documents // share))
        pieces = list(length_pieces(data_dir, shards, every))
        if not pieces:
            continue
        lengths = np.concatenate(pieces)
        # The exponent of a length is its number of bits.
        _, bits = np.frexp(lengths)
        own = SourceLengths(
            name=source.name,
            documents=documents,
            counted=len(lengths),
            median=float(np.median(lengths)),
            longest=int(lengths.max()),
            by_bits=tuple(np.bincount(bits).tolist()),
        )
        found.append(own)
    return tuple(found)


def length_pieces(data_dir: Path, shards: Sequence[Shard], every: int) -> Iterator[Integers]:
    """Lengths of one of `every` pieces of the indexes, which are mapped and never read whole."""
    number = 0
    for shard in shards:
        if shard.documents == 0:
            continue
        index = open_array(data_dir, shard.index_path, INDEX_DTYPE, (shard.documents, 2))
        for first in range(0, shard.documents, PIECE_DOCUMENTS):
            number += 1
            if (number - 1) % every != 0:
                continue
            bounds = index[first : first + PIECE_DOCUMENTS + 1, 0].astype(np.int64)
            if first + PIECE_DOCUMENTS >= shard.documents:
                bounds = np.append(bounds, shard.tokens)
            # A damaged index may go backwards; `verify` says so, and here it is no length.
            yield np.maximum(np.diff(bounds) - 1, 0)


def documents_of_steps(
    data_dir: Path, recipe: Recipe, steps: Sequence[int], samples_before: int = 0
) -> dict[int, StepDocuments]:
    """The documents of some steps, before whose data set the run drew so many samples from others.
    Steps whose shards are too large to search have none.

    Raises UserError where a file of the data set is missing or damaged.
    """
    reader = PatientReader(data_dir)
    loader = TrainingLoader(reader, seq_len=recipe.model.seq_len, seed=recipe.seed)
    tokenizer_path = data_dir / TOKENIZER_NAME / "tokenizer.json"
    tokenizer = None
    if tokenizer_path.is_file():
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    largest = max(shard.documents for shard in reader.manifest.shards_of("train"))
    if largest > MOST_INDEX:
        return {}
    rows = recipe.global_batch_size
    looked_at = min(rows, MOST_ROWS_READ)
    found = {}
    for step in steps:
        parts: list[Part] = []
        for row in range(looked_at):
            parts += parts_of(loader, step * rows + row - samples_before)
        parts.sort(key=lambda part: len(part.offsets), reverse=True)
        named = [words_on(part, reader, tokenizer) for part in parts[:MOST_NAMED]]
        found[step] = StepDocuments(
            named=tuple(named),
            others=len(parts) - len(named),
            rows=looked_at,
            of_rows=rows,
        )
    return found


def words_on(part: Part, reader: ShardReader, tokenizer: Tokenizer | None) -> str:
    """A document by its file and row, and the beginning of what the batch has of it."""
    file, row = part.origin
    name = f"{PurePath(file).name}, row {row:,}"
    if tokenizer is None:
        return name
    ids = reader.tokens(part.shard)[part.offsets.start : part.offsets.stop][:FIRST_IDS]
    # on one line
    text = " ".join(tokenizer.decode(ids.tolist()).split())
    return f"{name}: {text[:FIRST_CHARACTERS]}…"

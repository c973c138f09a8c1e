"""The figures of a source: how long its documents are, and how often each id occurs.

Both splits together. Documents are all counted; of tokens at most about COUNTED_TOKENS, in pieces
that are spread evenly over the shards.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm

from data_prep.layout import SPLITS
from data_prep.manifest import MAX_VOCAB_SIZE, Shard, Source
from data_prep.shards import ShardReader

PIECE_TOKENS = 1 << 20  # counted at a time: bincount makes 8 bytes of each id
COUNTED_TOKENS = 500_000_000  # of a source; of a larger one, pieces evenly spread
UPPER_BYTE = re.compile("<0x[89A-F][0-9A-F]>")  # as a byte-fallback tokenizer names 0x80 to 0xFF
REPLACEMENT = "\ufffd"  # what bytes that are no whole character decode to

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SourceStatistics:
    """What was counted in the shards of a source."""

    lengths: Integers  # tokens of each document, its end-of-document id aside, (documents,)
    counts: Integers  # how often each id occurs among the counted tokens, (MAX_VOCAB_SIZE,)
    tokens: int  # of all its shards, end-of-document ids included
    vocab_size: int

    @property
    def counted(self) -> int:
        """Tokens that `counts` counts."""
        return int(self.counts.sum())

    @property
    def unseen_ids(self) -> int:
        """Ids of the vocabulary that none of the counted tokens is."""
        return int((self.counts[: self.vocab_size] == 0).sum())

    def share_of(self, ids: Sequence[int]) -> float:
        """The part of the counted tokens that these ids are."""
        return float(self.counts[ids].sum() / self.counted)

    def commonest(self, number: int) -> list[int]:
        """The ids that occur most often, the commonest first; equally common ones by number."""
        by_count = np.argsort(-self.counts, kind="stable")
        ids: list[int] = by_count[:number].tolist()
        return [i for i in ids if self.counts[i] > 0]


class LengthBin(NamedTuple):
    """Documents of about one length."""

    shortest: int  # tokens
    longest: int  # twice as many, less one
    documents: int


def measure(reader: ShardReader, source: Source) -> SourceStatistics:
    """Count a source; this reads its shards."""
    manifest = reader.manifest
    shards = [shard for split in SPLITS for shard in manifest.shards_of(split, source.name)]
    return SourceStatistics(
        lengths=document_lengths(reader, shards),
        counts=count_ids(reader, shards),
        tokens=sum(shard.tokens for shard in shards),
        vocab_size=manifest.vocab_size,
    )


def document_lengths(reader: ShardReader, shards: Sequence[Shard]) -> Integers:
    """Tokens of every document, its end-of-document id aside, (documents,)."""
    lengths = []
    for shard in shards:
        starts = reader.documents(shard)[:, 0]
        bounds = np.append(starts, shard.tokens).astype(np.int64)
        lengths.append(np.diff(bounds) - 1)
    return np.concatenate(lengths)


def count_ids(reader: ShardReader, shards: Sequence[Shard]) -> Integers:
    """How often each id occurs in at most about COUNTED_TOKENS, (MAX_VOCAB_SIZE,)."""
    tokens = sum(shard.tokens for shard in shards)
    # Rounded up: every second piece as soon as there is one token too many.
    every = -(-tokens // COUNTED_TOKENS)
    pieces: list[tuple[Shard, int]] = []
    for shard in shards:
        starts = range(0, shard.tokens, PIECE_TOKENS)
        pieces += [(shard, start) for start in starts]
    counts = np.zeros(MAX_VOCAB_SIZE, np.int64)
    for shard, start in tqdm(pieces[::every], desc="counting", leave=False, disable=None):
        piece = reader.tokens(shard)[start : start + PIECE_TOKENS]
        counts += np.bincount(piece, minlength=MAX_VOCAB_SIZE)
    return counts


def length_bins(lengths: Integers) -> list[LengthBin]:
    """Documents by length, in powers of two, from the shortest to the longest."""
    # The exponent of a length is its number of bits: 4 to 7 have 3.
    _, bits_of_each = np.frexp(lengths)
    documents = np.bincount(bits_of_each).tolist()
    fewest_bits = int(lengths.min()).bit_length()
    bins = []
    for bits in range(fewest_bits, len(documents)):
        longest = (1 << bits) - 1
        shortest = (longest + 1) // 2
        bins.append(LengthBin(shortest, longest, documents[bits]))
    return bins


def raw_bytes(tokenizer: Tokenizer) -> list[int]:
    """Ids of the single bytes 0x80 to 0xFF, which are no text on their own.

    Of a byte-level tokenizer these are characters of its alphabet, of a byte-fallback one `<0x80>`
    and so on; other tokenizers have none.
    """
    alphabet = set(ByteLevel.alphabet())
    found = []
    for token, i in tokenizer.get_vocab().items():
        may_be_one = token in alphabet or UPPER_BYTE.fullmatch(token)
        if may_be_one and tokenizer.decode([i]) == REPLACEMENT:
            found.append(i)
    return found

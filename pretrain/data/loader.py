"""The stateless loader: sample n of a run is a pure function of (fingerprint, seed, n).

Every block of 4,096 samples holds a whole number of samples of each source (its share), at places
that one keyed permutation fixes; so n gives its source and its ordinal within that source by
arithmetic. A source is one stream over its shards, cut into windows of seq_len + 1 ids that overlap
by one (the last target of a window is the first input of the next). Epoch e of a source visits its
W windows in the order of a keyed permutation (a Feistel network with cycle walking), so W
consecutive draws cover every window once, with no index in memory or on disk.

Step s consumes samples [s * B, (s + 1) * B) on any number of ranks, so resuming is arithmetic.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_prep.errors import UserError
from data_prep.manifest import BLOCK_SAMPLES, Shard
from data_prep.shards import ShardReader, Tokens
from pretrain.data.permutation import derive_key, permute
from pretrain.data.stream import I64, TokenStream


@dataclass(frozen=True, kw_only=True)
class SamplePlace:
    """Where a sample comes from: a window of a source's stream."""

    source: str
    epoch: int
    ordinal: int  # of the source's windows in this epoch
    start: int  # first id of the window in the source's stream


@dataclass(frozen=True, kw_only=True)
class SourceWindows:
    """A source's part of the corpus, cut into windows."""

    name: str
    share: int  # samples of every block
    begin: int  # of its stream in the corpus
    tokens: int
    windows: int  # whole ones, of seq_len + 1 ids that overlap by one


class Block(NamedTuple):
    """The samples of one block."""

    number: int
    starts: I64  # first position in the corpus of each


class TrainingLoader:
    """Training samples by number. Holds no state: the same n gives the same ids, always.

    Raises UserError for a source that is shorter than one window.
    """

    def __init__(self, reader: ShardReader, *, seq_len: int, seed: int) -> None:
        self.manifest = reader.manifest
        self.seq_len = seq_len
        self.identity = (self.manifest.fingerprint, seed)
        self.sources: list[SourceWindows] = []
        shards: list[Shard] = []
        begin = 0
        for source in self.manifest.sources:
            own = self.manifest.shards_of("train", source.name)
            tokens = sum(shard.tokens for shard in own)
            windows = (tokens - 1) // seq_len  # the last target is one id behind a window
            if windows < 1:
                raise UserError(
                    f"{reader.data_dir}: source {source.name} has {tokens:,} training tokens, "
                    f"fewer than one window of {seq_len + 1:,}; give it more text or leave it out "
                    "of the mixture"
                )
            in_corpus = SourceWindows(
                name=source.name,
                share=source.share,
                begin=begin,
                tokens=tokens,
                windows=windows,
            )
            self.sources.append(in_corpus)
            shards += own
            begin += tokens
        self.corpus = TokenStream(reader, tuple(shards))
        self._lay_out_block()

    def _lay_out_block(self) -> None:
        """Which source each place of a block belongs to, and its rank among those of the source."""
        # Every block is laid out alike: each source has as many places as its share, and where they
        # are is drawn from the seed.
        shares = [source.share for source in self.sources]
        in_order = np.repeat(np.arange(len(shares)), shares)
        key = derive_key(*self.identity, "block")
        every_place = np.arange(BLOCK_SAMPLES, dtype=np.uint64)
        places = permute(every_place, BLOCK_SAMPLES, np.array(key, np.uint64))
        self._source_at = in_order[places]
        self._rank_at = np.empty(BLOCK_SAMPLES, np.int64)
        for index, share in enumerate(shares):
            mine = self._source_at == index
            self._rank_at[mine] = np.arange(share)
        self._last_block: Block | None = None

    @property
    def names(self) -> list[str]:
        """The sources, in the order of the manifest."""
        return [source.name for source in self.sources]

    @property
    def window_counts(self) -> list[int]:
        """Windows of each source."""
        return [source.windows for source in self.sources]

    def source(self, name: str) -> SourceWindows:
        """The source of that name."""
        return next(source for source in self.sources if source.name == name)

    def _block_starts(self, block: int) -> I64:
        """The first position in `corpus` of every sample of a block.

        A step takes a few windows of a block and the next step the next few: so the last block is
        kept.
        """
        known = self._last_block  # read once: another thread may change it
        if known is not None and known.number == block:
            return known.starts
        starts = np.empty(BLOCK_SAMPLES, np.int64)
        for index, source in enumerate(self.sources):
            mine = self._source_at == index
            starts[mine] = self._starts_of(source, block)
        self._last_block = Block(block, starts)
        return starts

    def _starts_of(self, source: SourceWindows, block: int) -> I64:
        """The first position in `corpus` of a source's samples of a block, in order."""
        drawn_before = block * source.share
        drawn = drawn_before + np.arange(source.share)
        epochs, ordinals = np.divmod(drawn, source.windows)
        unique_epochs, epoch_index = np.unique(epochs, return_inverse=True)
        keys = [derive_key(*self.identity, "epoch", source.name, epoch) for epoch in unique_epochs]
        key_of_each = np.array(keys, np.uint64)[epoch_index]
        windows = permute(ordinals.astype(np.uint64), source.windows, key_of_each)
        return source.begin + windows.astype(np.int64) * self.seq_len

    def samples(self, numbers: I64) -> Tokens:
        """Ids of the samples, shape (len(numbers), seq_len + 1), uint16."""
        blocks, places = np.divmod(numbers, BLOCK_SAMPLES)
        starts = np.empty_like(blocks)
        for block in np.unique(blocks).tolist():
            mine = blocks == block
            of_block = self._block_starts(block)
            starts[mine] = of_block[places[mine]]
        return self.corpus.windows(starts, self.seq_len + 1)

    def place(self, number: int) -> SamplePlace:
        """Where sample `number` comes from."""
        block, place = divmod(number, BLOCK_SAMPLES)
        source = self.sources[self._source_at[place]]
        rank = int(self._rank_at[place])
        drawn = block * source.share + rank
        epoch, ordinal = divmod(drawn, source.windows)
        start = int(self._block_starts(block)[place])
        return SamplePlace(
            source=source.name, epoch=epoch, ordinal=ordinal, start=start - source.begin
        )

    def unseen_tail_tokens(self) -> dict[str, int]:
        """Ids at the end of each source's stream that no window reaches."""
        return {source.name: (source.tokens - 1) % self.seq_len for source in self.sources}


class ValidationWindows:
    """The validation split as consecutive windows.

    Each id after the first is a target exactly once.
    """

    def __init__(self, reader: ShardReader, *, seq_len: int) -> None:
        self.stream = TokenStream(reader, reader.manifest.shards_of("validation"))
        self.seq_len = seq_len
        self.targets = self.stream.tokens - 1  # in the whole split
        self.whole_windows = self.targets // seq_len  # those with seq_len targets
        if self.targets < 1:
            raise UserError(
                f"{reader.data_dir}: fewer than two validation tokens; raise validation_fraction"
            )

    def window(self, index: int) -> Tokens:
        """Ids of window `index`: seq_len + 1 of them, fewer in the last, partial window."""
        start = index * self.seq_len
        length = min(self.seq_len + 1, self.stream.tokens - start)
        return self.stream.read(start, length)

    def windows(self, indices: I64) -> Tokens:
        """Ids of whole windows, shape (len(indices), seq_len + 1)."""
        return self.stream.windows(indices * self.seq_len, self.seq_len + 1)

"""The stateless loader: sample n of a run is a pure function of (fingerprint, seed, n).

Every block of 4,096 samples holds a whole number of samples of each source (its share), at places
that one keyed permutation fixes; so n gives its source and its ordinal within that source by
arithmetic. A source is one stream over its shards, cut into windows of seq_len + 1 ids that overlap
by one (the last target of a window is the first input of the next). Epoch e of a source visits its
W windows in the order of a keyed permutation (a Feistel network with cycle walking), so W
consecutive draws cover every window once, with no index in memory or on disk.

Step s consumes samples [s * B, (s + 1) * B) on any number of ranks, so resuming is arithmetic.
"""

import itertools
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from data_prep.errors import UserError
from data_prep.manifest import BLOCK_SAMPLES
from data_prep.shards import ShardReader, Tokens
from pretrain.data.permutation import derive_key, permute
from pretrain.data.stream import I64, TokenStream

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SamplePlace:
    """Where a sample comes from: a window of a source's stream."""

    source: str
    epoch: int
    ordinal: int  # of the source's windows in this epoch
    start: int  # first id of the window in the source's stream


class TrainingLoader:
    """Training samples by number. Holds no state: the same n gives the same ids, always."""

    def __init__(self, reader: ShardReader, *, seq_len: int, seed: int) -> None:
        self.manifest, self.seq_len = reader.manifest, seq_len
        self.identity = (self.manifest.fingerprint, seed)
        self.names = [source.name for source in self.manifest.sources]
        shards = [self.manifest.shards_of("train", name) for name in self.names]
        self.corpus = TokenStream(reader, tuple(itertools.chain(*shards)))
        self.tokens = [sum(shard.tokens for shard in of_source) for of_source in shards]
        self.begins = np.cumsum([0, *self.tokens])  # of the sources in it
        self.window_counts = [(tokens - 1) // seq_len for tokens in self.tokens]
        for name, count, tokens in zip(self.names, self.window_counts, self.tokens, strict=True):
            if count < 1:
                problem = (
                    f"source {name} has {tokens:,} training tokens, fewer than one window of "
                    f"{seq_len + 1:,}"
                )
                raise UserError(
                    f"{reader.data_dir}: {problem}; give it more text or leave it out of the "
                    "mixture"
                )
        self.shares = np.array([source.share for source in self.manifest.sources], np.int64)
        self._lay_out_block()

    def _lay_out_block(self) -> None:
        """Which source each place of a block belongs to, and its rank among that source's
        places.
        """
        in_order = np.repeat(np.arange(len(self.shares)), self.shares)
        key = np.array(derive_key(*self.identity, "block"), np.uint64)
        places = permute(np.arange(BLOCK_SAMPLES, dtype=np.uint64), BLOCK_SAMPLES, key)
        self.source_at = in_order[places]
        self.rank_at = np.empty(BLOCK_SAMPLES, np.int64)
        for index, share in enumerate(self.shares):
            self.rank_at[self.source_at == index] = np.arange(share)
        # and the starts of its samples
        self._last_block: tuple[int, I64] = (-1, np.empty(0, np.int64))

    def _block_starts(self, block: int) -> I64:
        """The first position in `corpus` of every sample of a block.

        A step takes a few windows of a block and the next step the next few: so the last block is
        kept.
        """
        known, starts = self._last_block  # read once: another thread may change it
        if known != block:
            starts = np.empty(BLOCK_SAMPLES, np.int64)
            for source, (share, count) in enumerate(
                zip(self.shares.tolist(), self.window_counts, strict=True)
            ):
                epochs, ordinals = np.divmod(block * share + np.arange(share), count)
                unique_epochs, epoch_index = np.unique(epochs, return_inverse=True)
                keys = [
                    derive_key(*self.identity, "epoch", self.names[source], epoch)
                    for epoch in unique_epochs
                ]
                windows = permute(
                    ordinals.astype(np.uint64), count, np.array(keys, np.uint64)[epoch_index]
                )
                starts[self.source_at == source] = (
                    self.begins[source] + windows.astype(np.int64) * self.seq_len
                )
            self._last_block = block, starts
        return starts

    def samples(self, numbers: I64) -> Tokens:
        """Ids of the samples, shape (len(numbers), seq_len + 1), uint16."""
        blocks, places = np.divmod(numbers, BLOCK_SAMPLES)
        starts = np.empty(len(numbers), np.int64)
        for block in np.unique(blocks).tolist():
            mine = blocks == block
            starts[mine] = self._block_starts(block)[places[mine]]
        return self.corpus.windows(starts, self.seq_len + 1)

    def place(self, number: int) -> SamplePlace:
        """Where sample `number` comes from."""
        block, place = divmod(number, BLOCK_SAMPLES)
        source = int(self.source_at[place])
        ordinal = block * int(self.shares[source]) + int(self.rank_at[place])
        epoch, ordinal = divmod(ordinal, self.window_counts[source])
        start = int(self._block_starts(block)[place] - self.begins[source])
        return SamplePlace(source=self.names[source], epoch=epoch, ordinal=ordinal, start=start)

    def unseen_tail_tokens(self) -> dict[str, int]:
        """Ids at the end of each source's stream that no window reaches."""
        return {
            name: (tokens - 1) % self.seq_len
            for name, tokens in zip(self.names, self.tokens, strict=True)
        }


class ValidationWindows:
    """The validation split as consecutive windows: each id after the first is a target exactly
    once.
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
        return self.stream.read(start, min(self.seq_len + 1, self.stream.tokens - start))

    def windows(self, indices: I64) -> Tokens:
        """Ids of whole windows, shape (len(indices), seq_len + 1)."""
        return self.stream.windows(indices * self.seq_len, self.seq_len + 1)

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
import mmap
import resource
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar, cast

import numpy as np
import numpy.typing as npt
import xxhash

from data_prep.errors import UserError
from data_prep.manifest import BLOCK_SAMPLES, Shard
from data_prep.shards import SHARD_HEADER_BYTES, TOKEN_DTYPE, ShardReader, Tokens

T = TypeVar("T")
FEISTEL_ROUNDS = 6
# in a larger call that finds its pages in memory, asking would take half of the time
READ_AHEAD_WINDOWS = 1_024
OTHER_OPEN_FILES = 256
# of libraries, threads and large tensors: 488 once all is imported on a CPU, more with CUDA
OTHER_MAPS = 4_096
MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")  # of a process; 65,530 unless somebody raised it
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]


def derive_key(*parts: object) -> int:
    """A 64-bit key that depends on every part."""
    return xxhash.xxh3_64_intdigest("\x1f".join(map(str, parts)).encode())


def mix(values: U64) -> U64:
    """The finaliser of SplitMix64: every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(ordinals: U64, size: int, keys: U64) -> U64:
    """Where a keyed permutation of range(size) sends each ordinal; one key for all or one for each.

    A balanced Feistel network permutes the next power of four; values outside the range walk on
    along their cycle until they are inside (fewer than four rounds on average).
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low_mask = np.uint64((1 << int(half_bits)) - 1)
    result = ordinals.astype(np.uint64)
    keys = np.broadcast_to(keys, result.shape)
    outside = np.arange(len(result))
    while len(outside):
        left, right, key = result[outside] >> half_bits, result[outside] & low_mask, keys[outside]
        for round_number in range(FEISTEL_ROUNDS):
            salt = np.uint64((0x9E3779B97F4A7C15 * (round_number + 1)) % 2**64)
            left, right = right, left ^ (mix(right + key + salt) & low_mask)
        result[outside] = (left << half_bits) | right
        outside = outside[result[outside] >= size]
    return result


def allow_open_files(reader: ShardReader) -> None:
    """Raise this process's limit of open files where the shards need it: the memory map of each
    holds one open.
    """
    shards = len(reader.manifest.shards)
    needed = shards + OTHER_OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        problem = (
            f"has {shards:,} shards to keep open, and this process may open {hard:,} files at most"
        )
        raise UserError(f"{reader.data_dir}: {problem}; allow it {needed:,} (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def check_maps(reader: ShardReader) -> None:
    """Raise UserError where the kernel lets a process map fewer files: it would speak of memory
    that lacks.
    """
    if not MAX_MAP_COUNT.is_file():  # another system than Linux, with other limits
        return
    shards, allowed = len(reader.manifest.shards), int(MAX_MAP_COUNT.read_text())
    needed = shards + OTHER_MAPS
    if needed > allowed:
        problem = (
            f"has {shards:,} shards to map, and this kernel allows a process {allowed:,} memory "
            "maps"
        )
        raise UserError(
            f"{reader.data_dir}: {problem}; have it allow more: sysctl -w "
            f"vm.max_map_count={2 * needed}"
        )


class TokenStream:
    """The shards of one source, one after another, as a single array of ids."""

    def __init__(self, reader: ShardReader, shards: tuple[Shard, ...]) -> None:
        allow_open_files(reader)
        check_maps(reader)
        self.reader, self.shards = reader, shards
        self.begins = np.cumsum([0, *(shard.tokens for shard in shards)], dtype=np.int64)
        self.tokens = int(self.begins[-1])

    def locate(self, position: int) -> tuple[Shard, int]:
        """The shard that holds a position of the stream, and the offset in it."""
        index = int(np.searchsorted(self.begins, position, side="right")) - 1
        return self.shards[index], position - int(self.begins[index])

    def read(self, start: int, length: int) -> Tokens:
        """`length` ids from `start`, across shards where needed."""
        pieces = []
        while length > 0:
            shard, offset = self.locate(start)
            piece = self.reader.tokens(shard)[offset : offset + length]
            pieces.append(piece)
            start, length = start + len(piece), length - len(piece)
        return np.concatenate(pieces)

    def windows(self, starts: I64, length: int) -> Tokens:
        """One row of `length` ids for each start, shape (starts, length)."""
        shard_of = np.searchsorted(self.begins, starts, side="right") - 1
        offsets = (starts - self.begins[shard_of]).tolist()
        ids = {
            index: self.reader.tokens(self.shards[index]) for index in np.unique(shard_of).tolist()
        }
        places = [
            (ids[index], offset) for index, offset in zip(shard_of.tolist(), offsets, strict=True)
        ]
        if len(places) <= READ_AHEAD_WINDOWS:
            read_ahead(places, length)
        rows = np.empty((len(starts), length), np.uint16)
        for row, (shard_ids, offset) in enumerate(places):
            piece = shard_ids[offset : offset + length]
            rows[row] = piece if len(piece) == length else self.read(int(starts[row]), length)
        return rows


def read_ahead(places: list[tuple[Tokens, int]], length: int) -> None:
    """Have the kernel fetch these windows, (ids of a shard, offset) each, all at once and nothing
    else.

    A page fault would wait for each, and have a whole read-ahead (128 KB to megabytes) fetched
    around it.
    """
    for shard_ids, offset in places:
        first = SHARD_HEADER_BYTES + offset * TOKEN_DTYPE.itemsize
        into_page = first % mmap.PAGESIZE
        mapped = cast(mmap.mmap, shard_ids.base)
        mapped.madvise(
            mmap.MADV_WILLNEED, first - into_page, into_page + length * TOKEN_DTYPE.itemsize
        )


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


class Prefetch(Generic[T]):
    """Makes the batches of the next step in a thread while this one trains."""

    def __init__(self, make: Callable[[int], T], stop_at_step: int) -> None:
        self.make, self.stop_at_step = make, stop_at_step
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[T]] | None = None

    def take(self, step: int) -> T:
        """What `make(step)` gives; begins with the next step's."""
        ready = (
            self._ahead[1].result() if self._ahead and self._ahead[0] == step else self.make(step)
        )
        if step + 1 < self.stop_at_step:
            self._ahead = (step + 1, self._thread.submit(self.make, step + 1))
        return ready

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

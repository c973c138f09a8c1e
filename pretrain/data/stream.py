"""Shards, of one source or of several, as one stream of ids, read where they lie."""

import itertools
import mmap
import resource
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from data_prep.errors import UserError
from data_prep.manifest import Shard
from data_prep.shards import SHARD_HEADER_BYTES, TOKEN_DTYPE, ShardReader, Tokens

# Windows of a call up to which the kernel is asked to read ahead: in a larger one that finds its
# pages in memory, asking would take half of the time.
READ_AHEAD_WINDOWS = 1_024
OTHER_OPEN_FILES = 256
# Memory maps of libraries, threads and large tensors: 488 once all is imported on a CPU, more with
# CUDA.
OTHER_MAPS = 4_096
# What the kernel allows a process; 65,530 unless somebody raised it.
MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
I64 = npt.NDArray[np.int64]


def allow_open_files(reader: ShardReader) -> None:
    """Raise this process's limit of open files where the shards need it.

    The memory map of each shard holds a file open. Raises UserError where the system allows fewer.
    """
    shards = len(reader.manifest.shards)
    needed = shards + OTHER_OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UserError(
            f"{reader.data_dir}: has {shards:,} shards to keep open, and this process may open "
            f"{hard:,} files at most; allow it {needed:,} (ulimit -Hn)"
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def check_maps(reader: ShardReader) -> None:
    """Raise UserError where the kernel lets a process map fewer files.

    Its own error would speak of memory that lacks.
    """
    if not MAX_MAP_COUNT.is_file():  # another system than Linux, with other limits
        return
    shards = len(reader.manifest.shards)
    allowed = int(MAX_MAP_COUNT.read_text())
    needed = shards + OTHER_MAPS
    if needed > allowed:
        raise UserError(
            f"{reader.data_dir}: has {shards:,} shards to map, and this kernel allows a process "
            f"{allowed:,} memory maps; have it allow more: sysctl -w vm.max_map_count={2 * needed}"
        )


class TokenStream:
    """Shards, one after another, as a single array of ids."""

    def __init__(self, reader: ShardReader, shards: tuple[Shard, ...]) -> None:
        allow_open_files(reader)
        check_maps(reader)
        self.reader = reader
        self.shards = shards
        # Where each shard begins in the stream, and where the last one ends.
        sizes = [shard.tokens for shard in shards]
        begins = list(itertools.accumulate(sizes, initial=0))
        self.begins = np.array(begins, np.int64)
        self.tokens = int(self.begins[-1])

    def locate(self, position: int) -> tuple[Shard, int]:
        """The shard that holds a position of the stream, and the offset in it."""
        index = int(np.searchsorted(self.begins, position, side="right")) - 1
        offset = position - int(self.begins[index])
        return self.shards[index], offset

    def read(self, start: int, length: int) -> Tokens:
        """`length` ids from `start`, across shards where needed."""
        pieces = []
        while length > 0:
            shard, offset = self.locate(start)
            ids = self.reader.tokens(shard)
            piece = ids[offset : offset + length]
            pieces.append(piece)
            start += len(piece)
            length -= len(piece)
        return np.concatenate(pieces)

    def windows(self, starts: I64, length: int) -> Tokens:
        """One row of `length` ids for each start, shape (starts, length)."""
        # The last shard that begins no later: an empty one holds nothing.
        shard_of = np.searchsorted(self.begins, starts, side="right") - 1
        offsets = starts - self.begins[shard_of]
        ids = {}
        for index in np.unique(shard_of).tolist():
            ids[index] = self.reader.tokens(self.shards[index])
        in_shards = zip(shard_of.tolist(), offsets.tolist(), strict=True)
        places = [(ids[index], offset) for index, offset in in_shards]
        if len(places) <= READ_AHEAD_WINDOWS:
            read_ahead(places, length)
        rows = np.empty((len(starts), length), np.uint16)
        for row, (shard_ids, offset) in enumerate(places):
            piece = shard_ids[offset : offset + length]
            if len(piece) < length:  # it goes on in the next shard
                piece = self.read(int(starts[row]), length)
            rows[row] = piece
        return rows


def read_ahead(places: list[tuple[Tokens, int]], length: int) -> None:
    """Have the kernel fetch these windows, all at once and nothing else.

    `places` are the ids of a shard and an offset in them, for each window of `length` ids.
    A page fault would wait for each, and have a whole read-ahead (128 KB to megabytes) fetched
    around it.
    """
    size = length * TOKEN_DTYPE.itemsize
    for shard_ids, offset in places:
        first = SHARD_HEADER_BYTES + offset * TOKEN_DTYPE.itemsize
        into_page = first % mmap.PAGESIZE  # advice begins at a page
        mapped = cast(mmap.mmap, shard_ids.base)
        mapped.madvise(mmap.MADV_WILLNEED, first - into_page, into_page + size)

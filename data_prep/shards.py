"""The files of a data set: token ids, document indexes, the copy of the tokenizer.

    shards/<split>/<source>/<unit>.npy            token ids, one dimension, "<u2"
    shards/<split>/<source>/<unit>.documents.npy  start offset and row of every document,
                                                  (documents, 2), "<u8"
    units/<source>/<unit>.json                    what a finished work unit gave: a build that was
                                                  killed goes on here

A shard holds whole documents, each followed by the end-of-document id and nothing else. Every id
from 0 to 65,535 is an ordinary id. Both kinds of file are plain NumPy files: `np.load(path,
mmap_mode="r")`.
"""

import contextlib
import hashlib
import io
import math
import mmap
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import xxhash

from data_prep.errors import UserError, explained
from data_prep.files import digest_file, write_durably
from data_prep.manifest import Shard, ShardFacts, load_manifest

TOKEN_DTYPE = np.dtype("<u2")
INDEX_DTYPE = np.dtype("<u8")
TOKENIZER_NAME = "tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# kept beside them; it decides no id, so no tokenizer's identity
CHAT_TEMPLATE_NAME = "chat_template.jinja"
COUNTED_TOKENS = 64 << 20  # by count_ids, at most about so many: 128 MB
COUNTED_PIECE = 128 << 10  # tokens counted in one place
SHARD_HEADER_BYTES = 128  # what NumPy pads the header of a one-dimensional array to
TOO_MANY_MAPS = "see ulimit -v, and sysctl vm.max_map_count: each shard takes a map of its own"
# a file of it; the manifest is good
REPAIR = "python -m data_prep.verify DATASET --repair builds it again"

Tokens = npt.NDArray[np.uint16]
Index = npt.NDArray[np.uint64]


def write_array(path: Path, array: npt.NDArray[Any]) -> str:
    """Write a NumPy file durably; returns the xxh3-128 digest of the file."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    write_durably(path, content.getbuffer())
    return xxhash.xxh3_128_hexdigest(content.getbuffer())


def array_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The first SHARD_HEADER_BYTES of an array of at most two dimensions, as np.save writes
    them.
    """
    header = io.BytesIO()
    description = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def shard_header(tokens: int) -> bytes:
    """The first SHARD_HEADER_BYTES of a shard of so many tokens."""
    return array_header(TOKEN_DTYPE, (tokens,))


class ShardWriter:
    """Writes one shard and its document index, piece by piece and beside; `finish` makes them
    durable and names them.

    Its file appears with the first document. What it keeps in memory is the index alone: 16 bytes a
    document.
    """

    def __init__(self, path: Path, split: str) -> None:
        self.path, self.split = path, split
        # of the text: counted by the caller
        self.tokens = self.documents = self.text_bytes = self.text_characters = 0
        self._index: list[Index] = []
        self._staged = path.with_name(path.name + ".tmp")

    @cached_property
    def _file(self) -> IO[bytes]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # what a kill left there; or a link, which opening would follow
        self._staged.unlink(missing_ok=True)
        file = self._staged.open("xb")
        file.write(bytes(SHARD_HEADER_BYTES))
        return file

    def add(self, tokens: Tokens, starts: npt.NDArray[Any], rows: Index) -> None:
        """Append whole documents: their tokens, where each starts in them, and its row."""
        self._index.append(
            np.stack([starts.astype(INDEX_DTYPE) + np.uint64(self.tokens), rows], axis=1)
        )
        self._file.write(np.ascontiguousarray(tokens, TOKEN_DTYPE).data)
        self.tokens += len(tokens)
        self.documents += len(rows)

    def finish(self) -> ShardFacts:
        """What there is to know of shard and index, both on the disk."""
        with self._file as file:
            file.seek(0)
            file.write(shard_header(self.tokens))
            file.flush()
            os.fsync(file.fileno())
        digest = digest_file(self._staged)
        os.replace(self._staged, self.path)
        index_path = self.path.with_name(self.path.stem + ".documents.npy")
        # also makes the rename durable
        index_digest = write_array(index_path, np.concatenate(self._index))
        return ShardFacts(
            split=self.split,
            tokens=self.tokens,
            documents=self.documents,
            text_bytes=self.text_bytes,
            text_characters=self.text_characters,
            xxh3_128=digest,
            index_xxh3_128=index_digest,
        )

    def close(self) -> None:
        """After an error: give the file back, and the space it takes. Nothing counts as written."""
        self._staged.unlink(missing_ok=True)
        with contextlib.suppress(OSError, KeyError):  # what it still holds may find the disk full
            vars(self)["_file"].close()


def tokenizer_sha256(directory: Path) -> str:
    """The identity of a tokenizer: what `sha256sum FILES | sha256sum` prints in its directory."""
    return sha256_of_files(read_tokenizer(directory))


def read_tokenizer(directory: Path) -> dict[str, bytes]:
    """The files of a tokenizer in a data set's or a run's directory, by name; others beside them
    are not taken.

    Raises UserError if one of them is a link that leads out of the data set or run.
    """
    home = directory.parent.resolve()
    known = [directory / name for name in (*TOKENIZER_FILES, CHAT_TEMPLATE_NAME)]
    present = [path for path in known if path.is_file()]
    for path in present:
        if not path.resolve().is_relative_to(home):
            raise UserError(
                f"{path}: a link to {path.resolve()}, outside of {home}; put the file itself there"
            )
    return {path.name: path.read_bytes() for path in present}


def sha256_of_files(files: dict[str, bytes]) -> str:
    """The same for a tokenizer's files by name."""
    named = [(name, files[name]) for name in TOKENIZER_FILES if name in files]
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in named]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def open_array(
    data_dir: Path, path: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    """Memory-map one file of a data set. Raises UserError unless it is an array of this type and
    shape.

    Its header is known to the byte, so it is compared: NumPy's own reader runs it through Python's
    parser, which is five times as slow and raises more kinds of exceptions than it tells.
    """
    full_path = data_dir / path
    if not full_path.is_file():
        raise UserError(f"{full_path}: missing, but the manifest lists it; {REPAIR}")
    damaged = f"{full_path}: truncated or damaged"
    size = SHARD_HEADER_BYTES + dtype.itemsize * math.prod(shape)
    with explained((ValueError, OSError), damaged, REPAIR), full_path.open("rb") as file:
        if (got := os.fstat(file.fileno()).st_size) != size:
            raise UserError(f"{damaged} ({got:,} bytes, expected {size:,}); {REPAIR}")
        # through the map: 8 MB read ahead
        if file.read(SHARD_HEADER_BYTES) != array_header(dtype, shape):
            raise UserError(
                f"{damaged} (its header is not that of {dtype} of shape {shape}); {REPAIR}"
            )
        with explained(OSError, f"{full_path}: not mapped into memory", TOO_MANY_MAPS):
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    return np.ndarray(shape, dtype, mapped, SHARD_HEADER_BYTES)


class ShardReader:
    """Reads a data set: memory-mapped shards and document indexes, opened when first touched."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.manifest = load_manifest(data_dir)
        self._tokens: dict[str, Tokens] = {}

    def tokens(self, shard: Shard) -> Tokens:
        """The token ids of a shard, shape (tokens,), uint16, memory-mapped.

        Raises UserError where the file is shorter than its map by now: to read behind its end would
        end the process by SIGBUS, without a word. (A call takes 1 microsecond with that look. Who
        keeps the array has no such guard.)
        """
        ids = self._tokens.get(shard.path)
        if ids is None:
            ids = self._tokens[shard.path] = open_array(
                self.data_dir, shard.path, TOKEN_DTYPE, (shard.tokens,)
            )
        size = SHARD_HEADER_BYTES + ids.nbytes
        if (got := cast(mmap.mmap, ids.base).size()) < size:
            problem = f"{got:,} bytes, expected {size:,}: truncated while it was in use"
            raise UserError(
                f"{self.data_dir / shard.path}: {problem}; bring it back, and the same command "
                "continues"
            )
        return ids

    def count_ids(self, ids: Sequence[int]) -> tuple[list[int], int]:
        """How often ids occur in both splits, and in how many tokens: in all, or in
        COUNTED_TOKENS evenly spread.
        """
        total = sum(shard.tokens for shard in self.manifest.shards)
        every = max(1, -(-total // COUNTED_TOKENS))  # so manieth piece
        counts, counted = [0] * len(ids), 0
        start = 0  # of the next piece, in the shard at hand
        for shard in self.manifest.shards:
            while start < shard.tokens:
                piece = self.tokens(shard)[start : start + COUNTED_PIECE]
                counts = [
                    count + int(np.count_nonzero(piece == i))
                    for count, i in zip(counts, ids, strict=True)
                ]
                counted += len(piece)
                start += every * COUNTED_PIECE
            start = max(0, start - shard.tokens) if every > 1 else 0
        return counts, counted

    def documents(self, shard: Shard) -> Index:
        """Start offset in the shard and row in the input file of each document, shape (documents,
        2).

        Raises UserError for an index that can't be of this shard.
        """
        index = open_array(self.data_dir, shard.index_path, INDEX_DTYPE, (shard.documents, 2))
        starts, rows = index[:, 0], index[:, 1]
        is_sorted = bool((starts[1:] > starts[:-1]).all() and (rows[1:] > rows[:-1]).all())
        if (
            not is_sorted
            or starts[0] != 0
            or starts[-1] >= shard.tokens
            or rows[-1] >= max(shard.rows, 1)
        ):
            raise UserError(
                f"{self.data_dir / shard.index_path}: damaged, not of this shard's documents; "
                f"{REPAIR}"
            )
        return index + np.array([0, shard.first_row], INDEX_DTYPE)

    def document_at(self, shard: Shard, offset: int) -> int:
        """Number of the document in a shard that holds a token."""
        return int(np.searchsorted(self.documents(shard)[:, 0], offset, side="right")) - 1

    def document(self, shard: Shard, number: int) -> tuple[range, tuple[str, int]]:
        """Where a document lies in its shard, end-of-document id included; its input file and
        row in that.
        """
        index = self.documents(shard)
        start, row = index[number].tolist()
        stop = int(index[number + 1, 0]) if number + 1 < len(index) else shard.tokens
        return range(start, stop), shard.origin(row)

    def check_files(self) -> None:
        """Cheap check before a run: the tokenizer is the one, every shard is there and as long
        as it should be.
        """
        expected = self.manifest.tokenizer_sha256
        if expected and tokenizer_sha256(self.data_dir / TOKENIZER_NAME) != expected:
            raise UserError(
                f"{self.data_dir / TOKENIZER_NAME}: not the tokenizer that made the shards; "
                f"{REPAIR}"
            )
        for shard in self.manifest.shards:
            path = self.data_dir / shard.path
            if not path.is_file():
                raise UserError(f"{path}: missing, but the manifest lists it; {REPAIR}")
            size, got = (
                SHARD_HEADER_BYTES + TOKEN_DTYPE.itemsize * shard.tokens,
                path.stat().st_size,
            )
            if got != size:
                raise UserError(
                    f"{path}: {got:,} bytes, expected {size:,}: truncated or damaged; {REPAIR}"
                )

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
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import xxhash

from data_prep.errors import UserError, explained
from data_prep.files import digest_file, write_durably
from data_prep.layout import INDEX_SUFFIX
from data_prep.manifest import Origin, Shard, ShardFacts, load_manifest

TOKEN_DTYPE = np.dtype("<u2")
INDEX_DTYPE = np.dtype("<u8")
TOKENIZER_NAME = "tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# Kept beside them; it decides no id, so no tokenizer's identity.
CHAT_TEMPLATE_NAME = "chat_template.jinja"
COUNTED_TOKENS = 64 << 20  # by count_ids, at most about so many: 128 MB
COUNTED_PIECE = 128 << 10  # tokens counted in one place
SHARD_HEADER_BYTES = 128  # what NumPy pads the header of a one-dimensional array to
TOO_MANY_MAPS = "see ulimit -v, and sysctl vm.max_map_count: each shard takes a map of its own"
# What to do about a file of a data set whose manifest is good.
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
    """What np.save writes in front of an array of at most two dimensions, SHARD_HEADER_BYTES."""
    header = io.BytesIO()
    description = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def shard_header(tokens: int) -> bytes:
    """The first SHARD_HEADER_BYTES of a shard of so many tokens."""
    return array_header(TOKEN_DTYPE, (tokens,))


class ShardWriter:
    """Writes one shard and its document index, piece by piece.

    They are written beside; `finish` makes them durable and names them. The file appears with the
    first document. What is kept in memory is the index alone: 16 bytes a document.
    """

    def __init__(self, path: Path, split: str) -> None:
        self.path = path
        self.split = split
        self.tokens = 0
        self.documents = 0
        # Whoever adds documents knows their text, and counts it.
        self.text_bytes = 0
        self.text_characters = 0
        self._index: list[Index] = []
        self._staged = path.with_name(path.name + ".tmp")

    @cached_property
    def _file(self) -> IO[bytes]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # What a kill left there; or a link, which opening would follow.
        self._staged.unlink(missing_ok=True)
        file = self._staged.open("xb")
        file.write(bytes(SHARD_HEADER_BYTES))
        return file

    def add(self, tokens: Tokens, starts: npt.NDArray[Any], rows: Index) -> None:
        """Append whole documents: their tokens, where each starts in them, and its row."""
        starts_in_shard = starts.astype(INDEX_DTYPE) + np.uint64(self.tokens)
        self._index.append(np.stack([starts_in_shard, rows], axis=1))
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
        index_path = self.path.with_name(self.path.stem + INDEX_SUFFIX)
        # This makes the rename durable too: both lie in one directory.
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
        # Without a document there is no file; what it still holds may find the disk full.
        with contextlib.suppress(OSError, KeyError):
            vars(self)["_file"].close()


def tokenizer_sha256(directory: Path) -> str:
    """The identity of a tokenizer: what `sha256sum FILES | sha256sum` prints in its directory."""
    return sha256_of_files(read_tokenizer(directory))


def read_tokenizer(directory: Path) -> dict[str, bytes]:
    """The files of a tokenizer in a data set's or a run's directory, by name; no others.

    Raises UserError if one of them is a link that leads out of the data set or run.
    """
    home = directory.parent.resolve()
    files = {}
    for name in (*TOKENIZER_FILES, CHAT_TEMPLATE_NAME):
        path = directory / name
        if not path.is_file():
            continue
        target = path.resolve()
        if not target.is_relative_to(home):
            raise UserError(
                f"{path}: a link to {target}, outside of {home}; put the file itself there"
            )
        files[name] = path.read_bytes()
    return files


def sha256_of_files(files: dict[str, bytes]) -> str:
    """The identity of a tokenizer, from its files by name."""
    lines = []
    for name in TOKENIZER_FILES:
        if name in files:
            digest = hashlib.sha256(files[name]).hexdigest()
            lines.append(f"{digest}  {name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def open_array(
    data_dir: Path, path: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    """Memory-map one file of a data set.

    Raises UserError unless it is an array of this type and shape. Its header is known to the byte,
    so it is compared: NumPy's own reader runs it through Python's parser, which is five times as
    slow and raises more kinds of exceptions than it tells.
    """
    full_path = data_dir / path
    if not full_path.is_file():
        raise UserError(f"{full_path}: missing, but the manifest lists it; {REPAIR}")
    damaged = f"{full_path}: truncated or damaged"
    size = SHARD_HEADER_BYTES + dtype.itemsize * math.prod(shape)
    with explained((ValueError, OSError), damaged, REPAIR), full_path.open("rb") as file:
        got = os.fstat(file.fileno()).st_size
        if got != size:
            problem = f"{got:,} bytes, expected {size:,}"
            raise UserError(f"{damaged} ({problem}); {REPAIR}")
        # Read as a file: through the map, the kernel would read 8 MB ahead.
        if file.read(SHARD_HEADER_BYTES) != array_header(dtype, shape):
            problem = f"its header is not that of {dtype} of shape {shape}"
            raise UserError(f"{damaged} ({problem}); {REPAIR}")
        with explained(OSError, f"{full_path}: not mapped into memory", TOO_MANY_MAPS):
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    return np.ndarray(shape, dtype, mapped, SHARD_HEADER_BYTES)


def is_increasing(values: Index) -> bool:
    """Whether each value is larger than the one before."""
    return bool((values[1:] > values[:-1]).all())


class IdCounts(NamedTuple):
    """How often some ids occur."""

    of_ids: list[int]  # of each that was asked for
    counted: int  # in so many tokens


class DocumentPlace(NamedTuple):
    """Where a document lies, and where it comes from."""

    tokens: range  # in its shard, the end-of-document id included
    origin: Origin


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
            ids = open_array(self.data_dir, shard.path, TOKEN_DTYPE, (shard.tokens,))
            self._tokens[shard.path] = ids
        size = SHARD_HEADER_BYTES + ids.nbytes
        got = cast(mmap.mmap, ids.base).size()
        if got < size:
            problem = f"{got:,} bytes, expected {size:,}: truncated while it was in use"
            advice = "bring it back, and the same command continues"
            path = self.data_dir / shard.path
            raise UserError(f"{path}: {problem}; {advice}")
        return ids

    def count_ids(self, ids: Sequence[int]) -> IdCounts:
        """How often ids occur in both splits: in all tokens, or in COUNTED_TOKENS evenly spread."""
        # Rounded up: of one token too many, every second piece is counted.
        every = max(1, -(-self.manifest.all_tokens // COUNTED_TOKENS))
        counts = [0] * len(ids)
        counted = 0
        for piece in self._pieces(every):
            counted += len(piece)
            for place, i in enumerate(ids):
                counts[place] += int(np.count_nonzero(piece == i))
        return IdCounts(counts, counted)

    def _pieces(self, every: int) -> Iterator[Tokens]:
        """One of so many pieces of COUNTED_PIECE tokens, through all shards."""
        start = 0  # of the next piece, in the shard at hand
        for shard in self.manifest.shards:
            while start < shard.tokens:
                yield self.tokens(shard)[start : start + COUNTED_PIECE]
                start += every * COUNTED_PIECE
            if every == 1:
                start = 0
            else:  # the way to the next piece runs on in the next shard
                start -= shard.tokens

    def documents(self, shard: Shard) -> Index:
        """Start in the shard and row in the input file of each document, shape (documents, 2).

        Raises UserError for an index that can't be of this shard.
        """
        index = open_array(self.data_dir, shard.index_path, INDEX_DTYPE, (shard.documents, 2))
        starts = index[:, 0]
        rows = index[:, 1]
        is_sorted = is_increasing(starts) and is_increasing(rows)
        begins_at_0 = starts[0] == 0
        ends_within = starts[-1] < shard.tokens
        has_rows_within = rows[-1] < max(shard.rows, 1)
        if not (is_sorted and begins_at_0 and ends_within and has_rows_within):
            path = self.data_dir / shard.index_path
            raise UserError(f"{path}: damaged, not of this shard's documents; {REPAIR}")
        return index + np.array([0, shard.first_row], INDEX_DTYPE)

    def document_at(self, shard: Shard, offset: int) -> int:
        """Number of the document in a shard that holds a token."""
        starts = self.documents(shard)[:, 0]
        return int(np.searchsorted(starts, offset, side="right")) - 1

    def document(self, shard: Shard, number: int) -> DocumentPlace:
        """Where a document lies in its shard; its input file and row in that."""
        index = self.documents(shard)
        start, row = index[number].tolist()
        stop = shard.tokens
        if number + 1 < len(index):
            stop = int(index[number + 1, 0])
        return DocumentPlace(range(start, stop), shard.origin(row))

    def check_files(self) -> None:
        """Cheap check before a run: the tokenizer is the one, shards are there and long enough.

        Raises UserError for the first file that is not so. Digests are looked at by `verify`.
        """
        tokenizer_dir = self.data_dir / TOKENIZER_NAME
        expected = self.manifest.tokenizer_sha256
        if expected and tokenizer_sha256(tokenizer_dir) != expected:
            raise UserError(f"{tokenizer_dir}: not the tokenizer that made the shards; {REPAIR}")
        for shard in self.manifest.shards:
            path = self.data_dir / shard.path
            if not path.is_file():
                raise UserError(f"{path}: missing, but the manifest lists it; {REPAIR}")
            size = SHARD_HEADER_BYTES + TOKEN_DTYPE.itemsize * shard.tokens
            got = path.stat().st_size
            if got != size:
                problem = f"{got:,} bytes, expected {size:,}: truncated or damaged"
                raise UserError(f"{path}: {problem}; {REPAIR}")

"""The on-disk contract between data preparation and training: shards, document index, manifest.

A data set is a directory:

    manifest.json                                what is in it; written last, so its existence means complete
    build.json                                   how it was made (time, host, ranks, versions); not part of the data
    tokenizer/                                   a copy of the tokenizer that made the ids
    shards/<split>/<source>/<unit>.npy           token ids, one dimension, "<u2"
    shards/<split>/<source>/<unit>.documents.npy start offset and row of every document, (documents, 2), "<u8"
    units/<source>/<unit>.json                   what a finished work unit gave: a build that was killed goes on here

A shard holds whole documents, each followed by the end-of-document id and nothing else. Every id
from 0 to 65,535 is an ordinary id. Both kinds of file are plain NumPy files: `np.load(path,
mmap_mode="r")`.

The fingerprint of a data set is the xxh3-128 digest of its manifest, which holds the digest of
every file: two data sets with equal fingerprints are equal bit for bit.
"""

import contextlib
import hashlib
import io
import json
import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import pydantic
import xxhash

from data_prep import layout
from data_prep.errors import UserError, explained, parse_json

# what pretrain takes of data_prep, it takes from here
from data_prep.files import digest_file as digest_file
from data_prep.files import fsync_directory as fsync_directory
from data_prep.files import replace_directory as replace_directory
from data_prep.files import write_durably as write_durably
from data_prep.inputs.urls import without_credentials as without_credentials
from data_prep.layout import SHARDS_NAME
from data_prep.layout import SPLITS as SPLITS
from data_prep.layout import UNITS_NAME as UNITS_NAME
from data_prep.locks import HOLDER_NAME as HOLDER_NAME
from data_prep.locks import LOCK_NAME as LOCK_NAME
from data_prep.locks import Lock as Lock
from data_prep.locks import lock as lock

FORMAT = "tablefree-shards"
FORMAT_VERSION = 2
MAX_VOCAB_SIZE = 65_536
BLOCK_SAMPLES = 4_096  # sources share a block of this many samples in whole numbers
TOKEN_DTYPE = np.dtype("<u2")
INDEX_DTYPE = np.dtype("<u8")
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# kept beside them; it decides no id, so no tokenizer's identity
CHAT_TEMPLATE_NAME = "chat_template.jinja"
SEPARATOR = "eos after every document"
COUNTED_TOKENS = 64 << 20  # by count_ids, at most about so many: 128 MB
COUNTED_PIECE = 128 << 10  # tokens counted in one place
SHARD_HEADER_BYTES = 128  # what NumPy pads the header of a one-dimensional array to
TOO_MANY_MAPS = "see ulimit -v, and sysctl vm.max_map_count: each shard takes a map of its own"
REBUILD = f"remove its {MANIFEST_NAME} and run python -m data_prep.build_shards again"
# a file of it; the manifest is good
REPAIR = "python -m data_prep.verify DATASET --repair builds it again"

Tokens = npt.NDArray[np.uint16]
Index = npt.NDArray[np.uint64]


def later(default: Any) -> Any:
    """A field that records of this format version got later, left out of the file where it is at
    its default.

    So data sets made before keep their bytes, and with them their fingerprint.
    """
    return field(default=default, metadata={"later": True})


@cache
def later_fields(kind: type) -> dict[str, Any]:
    """The fields of a kind of record that `later` made, and their defaults."""
    return {own.name: own.default for own in fields(kind) if own.metadata.get("later")}


def as_written(record: object) -> dict[str, Any]:
    """The fields of a record that its file holds."""
    held = dict(vars(record))  # asdict would copy every shard deeply
    held.pop("fingerprint", None)  # what a manifest remembers of itself
    for name, default in later_fields(type(record)).items():  # type: ignore[arg-type]
        if held[name] == default:
            del held[name]
    return held


@dataclass(frozen=True, kw_only=True)
class TokenizerLoss:
    """What a tokenizer loses: unk in all documents, and of sampled ones (of a long one, its
    beginning) what changes.

    Data sets made by earlier versions hold the tokens of the sampled documents alone, and so do
    records of units where the tokenizer keeps all text.
    """

    documents: int  # sampled
    tokens: int  # of all documents, without what ends them
    unknown_tokens: int  # of these; unk: they stand for text that the vocabulary lacks
    changed_documents: int  # of the sampled ones, those whose ids do not decode to their text

    def __add__(self, other: "TokenizerLoss") -> "TokenizerLoss":
        return TokenizerLoss(
            **{name: count + vars(other)[name] for name, count in vars(self).items()}
        )

    def __bool__(self) -> bool:
        return self.unknown_tokens > 0 or self.changed_documents > 0

    @property
    def unknown_share(self) -> float:
        """Of the tokens, how many are unk."""
        return self.unknown_tokens / max(self.tokens, 1)

    def __str__(self) -> str:
        share = f"{self.unknown_share:.1%} of tokens are unk"
        changed = (
            f"{self.changed_documents:,} of {self.documents:,} sampled documents do not decode to "
            "their text"
        )
        return f"{share}; {changed}"


NO_LOSS = TokenizerLoss(documents=0, tokens=0, unknown_tokens=0, changed_documents=0)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One named part of the mixture."""

    name: str
    share: int  # samples of this source in every block of BLOCK_SAMPLES training samples
    weight: int | float  # as written in the mixture; in its manifest an int stays one
    origin: str  # path, glob or name as written in the mixture
    format: str
    text_field: str | None
    revision: str | None
    license: str | None = None  # of the texts, as the mixture states it
    empty_documents: int = 0  # left out
    bad_documents: int = 0  # left out, with `on_bad_document: skip`
    loss: TokenizerLoss | None = later(None)  # noqa: RUF009  # None where nothing of any source is lost


@dataclass(frozen=True, kw_only=True)
class ShardFacts:
    """What is known of a shard once it is written."""

    split: str
    tokens: int  # end-of-document ids included
    documents: int
    text_bytes: int  # UTF-8, without end-of-document
    text_characters: int
    xxh3_128: str
    index_xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class Shard(ShardFacts):
    """One file of token ids and the part of the input that it holds."""

    source: str
    path: str  # relative to the data set, with forward slashes
    # the input file, as the mixture names it; of small files, all of this shard's work unit
    inputs: tuple[str, ...]
    # row of the input file at which this shard's work unit starts; 0 where it has several files
    first_row: int
    rows: int  # rows that this shard's work unit covers; a text file is a row
    # of several files of JSON lines, the rows of each; rows count through them
    input_rows: tuple[int, ...] = later(())

    @property
    def index_path(self) -> str:
        """Path of the document index, relative to the data set."""
        return self.path.removesuffix(".npy") + ".documents.npy"

    @property
    def digests(self) -> dict[str, str]:
        """Both files, by path."""
        return {self.path: self.xxh3_128, self.index_path: self.index_xxh3_128}

    @property
    def accounts_for_its_rows(self) -> bool:
        """Whether every row belongs to an input: to the only one, to its own (a text file), or
        by `input_rows`.
        """
        if not self.input_rows:
            return len(self.inputs) in (1, self.rows)
        is_sum = sum(self.input_rows) == self.rows and min(self.input_rows) >= 0
        return is_sum and len(self.inputs) == len(self.input_rows)

    def origin(self, row: int) -> tuple[str, int]:
        """Input file and row in it of a row of `ShardReader.documents`."""
        name, row = input_of(self.inputs, self.input_rows, row)
        return without_credentials(name), row  # manifests of before may hold some


def input_of(inputs: Sequence[str], input_rows: Sequence[int], row: int) -> tuple[str, int]:
    """Input file and row in it of a row that counts through a shard's `inputs`, from its
    `first_row`.
    """
    if input_rows:
        ends = np.cumsum(input_rows)
        number = int(np.searchsorted(ends, row, side="right"))
        return inputs[number], row - int(ends[number] - input_rows[number])
    return (inputs[row], 0) if len(inputs) > 1 else (inputs[0], row)


@dataclass(frozen=True, kw_only=True)
class BadDocument:
    """A document that could not be read and was left out."""

    source: str
    input: str
    row: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a data set holds: a function of its inputs, tokenizer and mixture alone."""

    vocab_size: int
    eos_id: int
    eos_token: str
    tokenizer_sha256: str
    validation_fraction: float
    sources: tuple[Source, ...]
    shards: tuple[Shard, ...]
    document_separator: str = SEPARATOR
    # of the tokenizer; text never gives their ids
    special_tokens: dict[str, int] = field(default_factory=dict)
    # the first of each source; `Source.bad_documents` counts all
    bad_documents: tuple[BadDocument, ...] = ()

    def to_bytes(self) -> bytes:
        """The manifest file, byte for byte reproducible."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **as_written(self)}
        return (
            json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, default=as_written)
            + "\n"
        ).encode()

    @property
    def loss(self) -> TokenizerLoss | None:
        """What the tokenizer loses of all sources; None if that is nothing."""
        return sum((source.loss or NO_LOSS for source in self.sources), NO_LOSS) or None

    @cached_property
    def fingerprint(self) -> str:
        """xxh3-128 of the manifest file: the identity of the data set."""
        return xxhash.xxh3_128_hexdigest(self.to_bytes())

    def shards_of(self, split: str, source: str | None = None) -> tuple[Shard, ...]:
        """The shards of a split, in stream order; of one source if it is named."""
        return tuple(s for s in self.shards if s.split == split and source in (None, s.source))

    def tokens(self, split: str, source: str | None = None) -> int:
        """Number of token ids in a split, end-of-document ids included."""
        return sum(s.tokens for s in self.shards_of(split, source))

    def epochs(self, train_tokens: int) -> dict[str, float]:
        """How often training on so many tokens goes through each source."""
        drawn = {
            source.name: train_tokens * source.share / BLOCK_SAMPLES for source in self.sources
        }
        return {name: drawn[name] / self.tokens("train", name) for name in drawn}


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


def integer_shares(weights: Sequence[float], total: int = BLOCK_SAMPLES) -> list[int]:
    """Split `total` in whole numbers proportional to positive weights (largest remainder, ties
    to the first).
    """
    exact = [w / sum(weights) * total for w in weights]
    shares = [int(x) for x in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


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


def load_manifest(data_dir: Path) -> Manifest:
    """Read and check `manifest.json`. Raises UserError if the data set is missing or not
    complete.
    """
    path = data_dir / MANIFEST_NAME
    if not data_dir.is_dir():
        raise UserError(
            f"{data_dir}: no such directory; build a data set with python -m data_prep.build_shards"
        )
    if not path.is_file():
        problem = f"no {MANIFEST_NAME}, so the data set is not complete"
        raise UserError(f"{data_dir}: {problem}; run python -m data_prep.build_shards")
    raw = path.read_bytes()
    content = parse_json(raw, str(path), REBUILD)
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise UserError(f"{path}: not a manifest of this project's shards; {REBUILD}")
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, expected {FORMAT_VERSION}; {REBUILD}")
    with contextlib.suppress(pydantic.ValidationError):
        manifest = pydantic.TypeAdapter(Manifest).validate_python(content)
        if (
            manifest.to_bytes() == raw
            and sum(source.share for source in manifest.sources) == BLOCK_SAMPLES
        ):
            check_places(data_dir, manifest)
            return manifest
    raise UserError(f"{path}: damaged manifest (not as build_shards writes it); {REBUILD}")


def check_places(data_dir: Path, manifest: Manifest) -> None:
    """Every path is the one that the layout gives, and leads to nowhere else; figures are such as a
    build counts.

    A manifest is read wherever it comes from, and its paths are read, copied to and, by a repair,
    written.
    """
    where = data_dir / MANIFEST_NAME
    advice = f"fetch the data set again from where it was built, or {REBUILD}"
    names = {source.name for source in manifest.sources}
    for name in names:
        if not layout.is_name(name):
            raise UserError(f"{where}: source name {name!r} can't name a directory; {advice}")
    for shard in manifest.shards:
        if shard.source not in names or not layout.is_shard_path(
            shard.path, shard.split, shard.source
        ):
            of = f"split {shard.split!r} and source {shard.source!r}"
            raise UserError(f"{where}: {shard.path!r} is not where a shard of {of} lies; {advice}")
        figures = (shard.text_bytes, shard.text_characters, shard.first_row, shard.rows)
        is_countable = 0 < shard.documents <= shard.tokens < 2**63 and all(
            0 <= figure < 2**63 for figure in figures
        )
        if not is_countable or not shard.accounts_for_its_rows:
            raise UserError(f"{where}: {shard.path}: figures that no build gives; {advice}")
    paths = [path for shard in manifest.shards for path in (shard.path, shard.index_path)]
    if len(set(paths)) < len(paths):
        raise UserError(f"{where}: two shards of one path; {advice}")
    if not 0 <= manifest.eos_id < manifest.vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(
            f"{where}: eos_id {manifest.eos_id} and vocab_size {manifest.vocab_size} don't fit; "
            f"{advice}"
        )
    refuse_links_out(data_dir, paths)


def check_links(home: Path, manifest: Manifest) -> None:
    """No file of a copy of a data set is reached by a link that leads out of it."""
    refuse_links_out(
        home, [path for shard in manifest.shards for path in (shard.path, shard.index_path)]
    )


def refuse_links_out(home: Path, paths: Sequence[str]) -> None:
    """Raise UserError for the first of some paths of a data set that a link leads out of it."""
    for link in layout.links_out(home, paths):
        problem = f"leads out of the data set, to {os.path.realpath(link)}"
        raise UserError(
            f"{link}: {problem}; copy what it leads to in its place, or link {SHARDS_NAME}/ as a "
            "whole"
        )


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

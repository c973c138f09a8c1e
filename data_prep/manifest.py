"""The manifest: what a data set holds, and the identity of it.

A data set is a directory:

    manifest.json    what is in it; written last, so its existence means complete
    build.json       how it was made (time, host, ranks, versions); not part of the data
    tokenizer/       a copy of the tokenizer that made the ids
    shards/, units/  its files, see data_prep/shards.py and data_prep/layout.py

The fingerprint of a data set is the xxh3-128 digest of its manifest, which holds the digest of
every file: two data sets with equal fingerprints are equal bit for bit.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import xxhash

from data_prep import layout
from data_prep.errors import UserError, parse_json
from data_prep.inputs.urls import without_credentials
from data_prep.layout import SHARDS_NAME

FORMAT = "tablefree-shards"
FORMAT_VERSION = 2
MAX_VOCAB_SIZE = 65_536
BLOCK_SAMPLES = 4_096  # sources share a block of this many samples in whole numbers
MANIFEST_NAME = "manifest.json"
SEPARATOR = "eos after every document"
REBUILD = f"remove its {MANIFEST_NAME} and run python -m data_prep.build_shards again"


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

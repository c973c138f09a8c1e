"""The manifest: what a data set holds, and the identity of it.

A data set is a directory:

    manifest.json    what is in it; written last, so its existence means complete
    build.json       how it was made (time, host, ranks, versions); not part of the data
    tokenizer/       a copy of the tokenizer that made the ids
    shards/, units/  its files, see data_prep/shards.py and data_prep/layout.py

The fingerprint of a data set is the xxh3-128 digest of its manifest, which holds the digest of
every file: two data sets with equal fingerprints are equal bit for bit.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pydantic
import xxhash

from data_prep import layout
from data_prep.errors import UserError, parse_json
from data_prep.inputs.urls import without_credentials
from data_prep.layout import INDEX_SUFFIX, SHARD_SUFFIX, SHARDS_NAME

FORMAT = "tablefree-shards"
FORMAT_VERSION = 2
MAX_VOCAB_SIZE = 65_536  # ids are 2 bytes
# Repeated more often, text is worth little (Muennighoff et al. 2023, arXiv 2305.16264).
MANY_EPOCHS = 4
# Above all that is counted: a figure beyond it would overflow where arrays of 64 bits take it.
COUNTABLE = 2**63
BLOCK_SAMPLES = 4_096  # sources share a block of this many samples in whole numbers
MANIFEST_NAME = "manifest.json"
SEPARATOR = "eos after every document"
REBUILD = f"remove its {MANIFEST_NAME} and run python -m data_prep.build_shards again"


def later(default: Any) -> Any:
    """A field that records of this format version got later, left out of files at its default.

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
    """What a tokenizer loses: unk in all documents, and what changes of sampled ones.

    Of a long sampled document its beginning is looked at. Data sets made by earlier versions hold
    the tokens of the sampled documents alone, and so do records of units where the tokenizer keeps
    all text.
    """

    documents: int  # sampled
    tokens: int  # of all documents, without what ends them
    unknown_tokens: int  # of these; unk: they stand for text that the vocabulary lacks
    changed_documents: int  # of the sampled ones, those whose ids do not decode to their text

    def __add__(self, other: Self) -> "TokenizerLoss":
        return TokenizerLoss(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            unknown_tokens=self.unknown_tokens + other.unknown_tokens,
            changed_documents=self.changed_documents + other.changed_documents,
        )

    def __bool__(self) -> bool:
        return self.unknown_tokens > 0 or self.changed_documents > 0

    @property
    def unknown_share(self) -> float:
        """Of the tokens, how many are unk."""
        return self.unknown_tokens / max(self.tokens, 1)

    def __str__(self) -> str:
        unknown = f"{self.unknown_share:.1%} of tokens are unk"
        changed = f"{self.changed_documents:,} of {self.documents:,} sampled documents"
        return f"{unknown}; {changed} do not decode to their text"


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
    # None where nothing of any source is lost.
    loss: TokenizerLoss | None = later(None)  # noqa: RUF009


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
    # The input file, as the mixture names it; of small files, all of this shard's work unit.
    inputs: tuple[str, ...]
    # The row of the input file at which this shard's work unit starts; 0 where it has several.
    first_row: int
    rows: int  # rows that this shard's work unit covers; a text file is a row
    # Of several files of JSON lines, the rows of each; rows count through them.
    input_rows: tuple[int, ...] = later(())

    @property
    def index_path(self) -> str:
        """Path of the document index, relative to the data set."""
        return self.path.removesuffix(SHARD_SUFFIX) + INDEX_SUFFIX

    @property
    def digests(self) -> dict[str, str]:
        """Both files, by path."""
        return {self.path: self.xxh3_128, self.index_path: self.index_xxh3_128}

    @property
    def accounts_for_its_rows(self) -> bool:
        """Whether every row belongs to an input.

        To the only one, to its own (a text file is a row), or by `input_rows`.
        """
        if not self.input_rows:
            return len(self.inputs) in (1, self.rows)
        if len(self.inputs) != len(self.input_rows):
            return False
        return sum(self.input_rows) == self.rows and min(self.input_rows) >= 0

    @property
    def has_countable_figures(self) -> bool:
        """Whether its figures are such as a build counts: a document has a token, none is large."""
        if not 0 < self.documents <= self.tokens < COUNTABLE:
            return False
        figures = (self.text_bytes, self.text_characters, self.first_row, self.rows)
        return all(0 <= figure < COUNTABLE for figure in figures)

    def origin(self, row: int) -> "Origin":
        """Where a row of `ShardReader.documents` comes from, without a URL's secrets."""
        found = input_of(self.inputs, self.input_rows, row)
        # Manifests of early versions may hold some.
        return found._replace(input=without_credentials(found.input))


class Origin(NamedTuple):
    """A row of an input file."""

    input: str  # the file, as the mixture names it
    row: int  # from 0


def input_of(inputs: Sequence[str], input_rows: Sequence[int], row: int) -> Origin:
    """Where a row lies that counts through a shard's `inputs`, from its `first_row`."""
    if input_rows:
        ends = np.cumsum(input_rows)
        number = int(np.searchsorted(ends, row, side="right"))
        rows_before = int(ends[number]) - input_rows[number]
        return Origin(inputs[number], row - rows_before)
    if len(inputs) > 1:
        return Origin(inputs[row], 0)
    return Origin(inputs[0], row)


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
    # Those of the tokenizer; text never gives their ids.
    special_tokens: dict[str, int] = field(default_factory=dict)
    # The first of each source; `Source.bad_documents` counts all.
    bad_documents: tuple[BadDocument, ...] = ()

    def to_bytes(self) -> bytes:
        """The manifest file, byte for byte reproducible."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **as_written(self)}
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, default=as_written)
        return f"{text}\n".encode()

    @property
    def loss(self) -> TokenizerLoss | None:
        """What the tokenizer loses of all sources; None if that is nothing."""
        whole = NO_LOSS
        for source in self.sources:
            whole += source.loss or NO_LOSS
        return whole or None

    @cached_property
    def fingerprint(self) -> str:
        """xxh3-128 of the manifest file: the identity of the data set."""
        return xxhash.xxh3_128_hexdigest(self.to_bytes())

    def shards_of(self, split: str, source: str | None = None) -> tuple[Shard, ...]:
        """The shards of a split, in stream order; of one source if it is named."""
        of_split = (shard for shard in self.shards if shard.split == split)
        return tuple(shard for shard in of_split if source in (None, shard.source))

    def tokens(self, split: str, source: str | None = None) -> int:
        """Number of token ids in a split, end-of-document ids included."""
        return sum(shard.tokens for shard in self.shards_of(split, source))

    @property
    def all_tokens(self) -> int:
        """Number of token ids in both splits, end-of-document ids included."""
        return sum(shard.tokens for shard in self.shards)

    def paths(self) -> list[str]:
        """The files of all shards, relative to the data set: of each its ids and its index."""
        return [path for shard in self.shards for path in shard.digests]

    def epochs(self, train_tokens: int) -> dict[str, float]:
        """How often training on so many tokens goes through each source."""
        epochs = {}
        for source in self.sources:
            drawn = train_tokens * source.share / BLOCK_SAMPLES
            epochs[source.name] = drawn / self.tokens("train", source.name)
        return epochs


def integer_shares(weights: Sequence[float], total: int = BLOCK_SAMPLES) -> list[int]:
    """Split `total` in whole numbers that are proportional to positive weights.

    What is left after rounding down goes to the largest remainders, among equal ones to the first.
    """
    exact = [weight / sum(weights) * total for weight in weights]
    shares = [int(share) for share in exact]

    def by_remainder(i: int) -> tuple[float, int]:
        return shares[i] - exact[i], i

    left = total - sum(shares)
    for i in sorted(range(len(weights)), key=by_remainder)[:left]:
        shares[i] += 1
    return shares


def load_manifest(data_dir: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises UserError if the data set is missing or not complete, or its manifest is not as a build
    writes it.
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
    damaged = UserError(f"{path}: damaged manifest (not as build_shards writes it); {REBUILD}")
    try:
        manifest = pydantic.TypeAdapter(Manifest).validate_python(content)
    except pydantic.ValidationError:
        raise damaged from None
    shares = sum(source.share for source in manifest.sources)
    # The fingerprint is that of the bytes which a build writes: another form of them is none.
    if manifest.to_bytes() != raw or shares != BLOCK_SAMPLES:
        raise damaged
    check_places(data_dir, manifest)
    return manifest


def check_places(data_dir: Path, manifest: Manifest) -> None:
    """Every path is the one that the layout gives, and figures are such as a build counts.

    A manifest is read wherever it comes from, and its paths are read, copied to and, by a repair,
    written. Raises UserError for the first that is not so, and for a link that leads out.
    """
    where = data_dir / MANIFEST_NAME
    advice = f"fetch the data set again from where it was built, or {REBUILD}"
    names = {source.name for source in manifest.sources}
    for name in names:
        if not layout.is_name(name):
            raise UserError(f"{where}: source name {name!r} can't name a directory; {advice}")
    for shard in manifest.shards:
        is_in_place = layout.is_shard_path(shard.path, shard.split, shard.source)
        if shard.source not in names or not is_in_place:
            of = f"split {shard.split!r} and source {shard.source!r}"
            raise UserError(f"{where}: {shard.path!r} is not where a shard of {of} lies; {advice}")
        if not shard.has_countable_figures or not shard.accounts_for_its_rows:
            raise UserError(f"{where}: {shard.path}: figures that no build gives; {advice}")
    paths = manifest.paths()
    if len(set(paths)) < len(paths):
        raise UserError(f"{where}: two shards of one path; {advice}")
    if not 0 <= manifest.eos_id < manifest.vocab_size <= MAX_VOCAB_SIZE:
        sizes = f"eos_id {manifest.eos_id} and vocab_size {manifest.vocab_size}"
        raise UserError(f"{where}: {sizes} don't fit; {advice}")
    refuse_links_out(data_dir, paths)


def check_links(home: Path, manifest: Manifest) -> None:
    """No file of a copy of a data set is reached by a link that leads out of it."""
    refuse_links_out(home, manifest.paths())


def refuse_links_out(home: Path, paths: Sequence[str]) -> None:
    """Raise UserError for the first of some paths of a data set that a link leads out of it."""
    for link in layout.links_out(home, paths):
        problem = f"leads out of the data set, to {os.path.realpath(link)}"
        advice = f"copy what it leads to in its place, or link {SHARDS_NAME}/ as a whole"
        raise UserError(f"{link}: {problem}; {advice}")

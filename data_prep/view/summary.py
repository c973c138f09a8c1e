"""A data set in numbers, as a finished build and `show` print it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.layout import SPLITS
from data_prep.manifest import BLOCK_SAMPLES, MANY_EPOCHS, Manifest, Shard, Source
from data_prep.view.columns import LINE_CHARACTERS, cut, facts, table

HEADER: tuple[str, ...] = (
    "split",
    "source",
    "documents",
    "tokens",
    "chars/token",
    "bytes/token",
    "share",
)


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What some shards hold together."""

    documents: int
    tokens: int  # end-of-document ids included
    text_characters: int
    text_bytes: int  # UTF-8

    @property
    def text_tokens(self) -> int:
        """Tokens of text, without end-of-document ids; at least 1, as it is divided by."""
        return max(self.tokens - self.documents, 1)

    @property
    def characters_per_token(self) -> float:
        """Of the text alone."""
        return self.text_characters / self.text_tokens

    @property
    def bytes_per_token(self) -> float:
        """Of the text alone."""
        return self.text_bytes / self.text_tokens


def total(shards: Sequence[Shard]) -> Totals:
    """What some shards hold together; of none, nothing."""
    return Totals(
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        text_characters=sum(shard.text_characters for shard in shards),
        text_bytes=sum(shard.text_bytes for shard in shards),
    )


def describe(data_dir: Path, manifest: Manifest) -> str:
    """The data set in numbers: what it is, and a table of splits and sources."""
    about = {
        "data set": str(data_dir),
        "fingerprint": manifest.fingerprint,
        "vocabulary": f"{manifest.vocab_size:,} ids",
        "special": cut(about_special(manifest), LINE_CHARACTERS),
        "separator": about_separator(manifest),
        "shards": f"{len(manifest.shards):,}",
    }
    if manifest.loss:
        about["lossy"] = str(manifest.loss)
    lines = list(facts(about.items()))
    rows = [HEADER]
    for split in SPLITS:
        for source in manifest.sources:
            rows.append(table_row(manifest, split, source))
    lines += ["", table(rows)]
    return "\n".join(lines)


def about_special(manifest: Manifest) -> str:
    """The tokenizer's special tokens and their ids."""
    tokens = []
    for token, i in manifest.special_tokens.items():
        tokens.append(f"{token} = {i}")
    return ", ".join(tokens) or "none"


def about_separator(manifest: Manifest) -> str:
    """What stands between documents."""
    end = f"{manifest.eos_token} = {manifest.eos_id}"
    return f"{manifest.document_separator}: {end}"


def table_row(manifest: Manifest, split: str, source: Source) -> tuple[str, ...]:
    """One row of the table; a share is one of training samples, so validation has none."""
    shards = manifest.shards_of(split, source.name)
    held = total(shards)
    share = source.share / BLOCK_SAMPLES
    return (
        split,
        source.name,
        f"{held.documents:,}",
        f"{held.tokens:,}",
        f"{held.characters_per_token:.2f}",
        f"{held.bytes_per_token:.2f}",
        f"{share:.2%}" if split == "train" else "",
    )


def print_epochs(manifest: Manifest, train_tokens: int | None) -> None:
    """How often training on so many tokens sees each source; warns of one seen too often."""
    if train_tokens is None:
        return
    for name, epochs in manifest.epochs(train_tokens).items():
        line = f"epochs       {name}: {epochs:,.2f} over {train_tokens:,} training tokens"
        if epochs > MANY_EPOCHS:
            line += f"; above {MANY_EPOCHS} repeats teach little: add text or lower its weight"
        print(line)

"""A data set in numbers, as a finished build and `show` print it."""

from collections.abc import Sequence
from pathlib import Path

from data_prep.layout import SPLITS
from data_prep.manifest import BLOCK_SAMPLES, Manifest, Shard
from data_prep.view.columns import LINE_CHARACTERS, cut, facts, table

MAX_EPOCHS = 4  # Muennighoff et al. 2023, arXiv 2305.16264: repeats beyond it are worth little
HEADER = ("split", "source", "documents", "tokens", "chars/token", "bytes/token", "share")


def describe(data_dir: Path, manifest: Manifest) -> str:
    """The data set in numbers."""
    rows = [HEADER]
    for split in SPLITS:
        for source in manifest.sources:
            share = f"{source.share / BLOCK_SAMPLES:.2%}" if split == "train" else ""
            rows.append(
                (split, source.name, *figures(manifest.shards_of(split, source.name)), share)
            )
    special = ", ".join(f"{token} = {i}" for token, i in manifest.special_tokens.items()) or "none"
    about = (
        ("data set", str(data_dir)),
        ("fingerprint", manifest.fingerprint),
        ("vocabulary", f"{manifest.vocab_size:,} ids"),
        ("special", cut(special, LINE_CHARACTERS)),
        ("separator", f"{manifest.document_separator}: {manifest.eos_token} = {manifest.eos_id}"),
        ("shards", f"{len(manifest.shards):,}"),
        *(("lossy", str(loss)) for loss in [manifest.loss] if loss),
    )
    return "\n".join([*facts(about), "", table(rows)])


def figures(shards: Sequence[Shard]) -> tuple[str, str, str, str]:
    """Documents, tokens, characters and bytes per token (end-of-document ids not counted as
    tokens in these two).
    """
    documents, tokens = (
        sum(shard.documents for shard in shards),
        sum(shard.tokens for shard in shards),
    )
    of_text = max(tokens - documents, 1)
    characters, size = (
        sum(shard.text_characters for shard in shards),
        sum(shard.text_bytes for shard in shards),
    )
    return f"{documents:,}", f"{tokens:,}", f"{characters / of_text:.2f}", f"{size / of_text:.2f}"


def print_epochs(manifest: Manifest, train_tokens: int | None) -> None:
    """How often a training run of so many tokens sees each source; a source seen too often is
    warned of.
    """
    for name, epochs in manifest.epochs(train_tokens or 0).items() if train_tokens else ():
        warning = f"; above {MAX_EPOCHS} repeats teach little: add text or lower its weight" * (
            epochs > MAX_EPOCHS
        )
        print(f"epochs       {name}: {epochs:,.2f} over {train_tokens:,} training tokens{warning}")

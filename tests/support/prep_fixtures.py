"""Fixtures of data preparation, as a pytest plugin: text, a tokenizer, a data set, an S3."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_prep import train_tokenizer
from support.prep_helpers import (
    NASTY_TEXTS,
    VOCAB_SIZE,
    build,
    source,
    speeches,
    write_jsonl,
    write_mixture,
    write_parquet,
)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Real documents and nasty ones, none empty."""
    return [*speeches(40), *NASTY_TEXTS]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 512 ids."""
    base = tmp_path_factory.mktemp("tokenizer")
    source = write_jsonl(base / "speeches.jsonl", speeches(10))
    arguments = [
        "--vocab-size",
        str(VOCAB_SIZE),
        "--source",
        str(source),
        "--output-dir",
        str(base / "tokenizer"),
    ]
    train_tokenizer.main(arguments)
    return base / "tokenizer"


@pytest.fixture(scope="session")
def dataset(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, texts: list[str]
) -> Path:
    """A data set of two sources and three files; read only."""
    base = tmp_path_factory.mktemp("dataset")
    write_jsonl(base / "more" / "0.jsonl", texts[:5])
    write_jsonl(base / "more" / "1.jsonl", texts[5:20])
    write_parquet(base / "speeches.parquet", texts)
    sources = [
        source("speeches", "speeches.parquet", weight=3),
        source("more", "more/*.jsonl", format="jsonl"),
    ]
    build(write_mixture(base, tokenizer_dir, sources), base / "dataset")
    return base / "dataset"


@pytest.fixture(scope="session")
def bucket() -> Iterator[Any]:
    """A client of a local S3 with a bucket `corpus`; as users do, the environment names it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(key, value)
        fs = fsspec.filesystem("s3")
        fs.mkdir("corpus")
        yield fs
    server.stop()

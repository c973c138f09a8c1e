"""A data set built from the hub, S3 or a web server, through the clients that users have, is the
one built from here.

The servers are local and fail on the way; the builds are processes of their own, on one rank and on
two, as the hub's clients read HF_ENDPOINT when they are imported.
"""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.hub_server import COMMIT, DROPPED, HubServer
from support.prep_helpers import (
    BUILD_WITH_UNITS_OF,
    build_command,
    decoded,
    needs_mpi,
    run,
    source,
    write_jsonl,
    write_mixture,
    write_parquet,
)

from data_prep.manifest import Manifest, load_manifest

pytest_plugins = ("support.prep_fixtures",)

on_one_rank_and_on_two = pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=needs_mpi)])
UNIT_BYTES = 20_000
IMPATIENT = "import time; time.sleep = lambda seconds: None\n" + BUILD_WITH_UNITS_OF
CARD = """---
configs:
- config_name: books
  data_files: books/train-*.parquet
- config_name: web
  data_files: web/*.jsonl
---
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Iterator[HubServer]:
    """A server of one data set: a column of large files behind a redirect, and lines."""
    root = tmp_path_factory.mktemp("hub")
    corpus = root / "owner" / "corpus"
    (corpus / "books").mkdir(parents=True)
    (corpus / "README.md").write_text(CARD)
    write_parquet(corpus / "books" / "train-0.parquet", texts)
    write_parquet(corpus / "books" / "train-1.parquet", texts[::-1])
    write_jsonl(corpus / "web" / "0.jsonl", texts[5:25])
    with HubServer(root) as server:
        yield server


def sources(books: dict[str, str], web: dict[str, str]) -> list[dict[str, Any]]:
    """The entries of a mixture; where the two lie is all that differs."""
    entries = []
    for place, format, weight in ((books, "parquet", 3), (web, "jsonl", 1)):
        entry: dict[str, Any] = source(
            "books" if weight == 3 else "web", "", format=format, weight=weight
        )
        del entry["path"]
        entries.append(entry | place)
    return entries


def build_from(
    base: Path,
    tokenizer_dir: Path,
    books: dict[str, str],
    web: dict[str, str],
    *,
    ranks: int = 1,
    **environment: str,
) -> tuple[Path, str]:
    """Build in other processes, which don't wait between tries; the data set, and what they said
    on the way.
    """
    base.mkdir()
    mixture = write_mixture(base, tokenizer_dir, sources(books, web))
    command = build_command(mixture, base / "out", ranks=ranks, unit_bytes=UNIT_BYTES)
    command[command.index(BUILD_WITH_UNITS_OF)] = IMPATIENT
    result = run(command, **environment)
    assert result.returncode == 0, result.stderr
    return base / "out", result.stderr


@pytest.fixture(scope="module")
def here(
    hub: HubServer, tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, texts: list[str]
) -> Path:
    """The data set of the same files, read from the disk."""
    base = tmp_path_factory.mktemp("here")
    shutil.copytree(hub.root / "owner" / "corpus", base / "files")
    books, web = (
        {"path": f"{base}/files/{name}"} for name in ("books/train-*.parquet", "web/*.jsonl")
    )
    built, _ = build_from(base / "build", tokenizer_dir, books, web)
    assert len(load_manifest(built).shards) > 10
    assert [*decoded(built).values()].count(texts[7]) == 3
    return built


def without_places(manifest: Manifest) -> Manifest:
    """The manifest without what says where the files were found: all digests are still in it."""
    shards = (
        replace(s, inputs=tuple(name.rpartition("/")[2] for name in s.inputs))
        for s in manifest.shards
    )
    unplaced = (replace(source, origin="", revision=None) for source in manifest.sources)
    return replace(manifest, shards=tuple(shards), sources=tuple(unplaced))


@on_one_rank_and_on_two
def test_from_the_hub(
    hub: HubServer, here: Path, tmp_path: Path, tokenizer_dir: Path, ranks: int
) -> None:
    hub.reset()
    hub.failures.next = {"v1": [503, DROPPED], "train-0.parquet": [503] * 8, "0.jsonl": [503, 503]}
    hub.failures.cut_bytes = {"train-1.parquet": [10]}
    books, web = (
        {"hub": "owner/corpus", "config": name, "revision": "v1"} for name in ("books", "web")
    )
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    built, said = build_from(
        tmp_path / "hub", tokenizer_dir, books, web, ranks=ranks, **environment
    )
    manifest = load_manifest(built)
    assert [source.revision for source in manifest.sources] == [COMMIT, COMMIT]
    assert manifest.sources[0].origin == "hf://datasets/owner/corpus books train"
    assert {name for shard in manifest.shards for name in shard.inputs} == {
        "books/train-0.parquet", "books/train-1.parquet", "web/0.jsonl"
    }  # fmt: skip
    assert without_places(manifest) == without_places(load_manifest(here))
    assert not any([*hub.failures.next.values(), *hub.failures.cut_bytes.values()])
    assert "retrying in" in said


@on_one_rank_and_on_two
def test_from_a_web_server(
    hub: HubServer, here: Path, tmp_path: Path, tokenizer_dir: Path, ranks: int
) -> None:
    hub.reset()
    hub.failures.next = {"train-0.parquet": [503] * 4, "0.jsonl": [503]}
    hub.failures.cut_bytes = {"train-1.parquet": [10], "0.jsonl": [10]}
    root = f"{hub.url}/owner/corpus"
    books, web = {"path": f"{root}/books/train-*.parquet"}, {"path": f"{root}/web/0.jsonl"}
    built, said = build_from(tmp_path / "web", tokenizer_dir, books, web, ranks=ranks)
    manifest = load_manifest(built)
    assert manifest.shards[0].inputs == (f"{root}/books/train-0.parquet",)
    assert without_places(manifest) == without_places(load_manifest(here))
    assert not any([*hub.failures.next.values(), *hub.failures.cut_bytes.values()])
    assert "HTTP status 503; retrying in" in said


@on_one_rank_and_on_two
def test_from_a_bucket(
    bucket: Any, hub: HubServer, here: Path, tmp_path: Path, tokenizer_dir: Path, ranks: int
) -> None:
    files = hub.root / "owner" / "corpus"
    for path in (*files.glob("books/*"), *files.glob("web/*")):
        bucket.pipe(f"corpus/{path.relative_to(files)}", path.read_bytes())
    books, web = {"path": "s3://corpus/books/train-*.parquet"}, {"path": "s3://corpus/web/*.jsonl"}
    built, _ = build_from(tmp_path / "s3", tokenizer_dir, books, web, ranks=ranks)
    manifest = load_manifest(built)
    assert manifest.sources[1].origin == "s3://corpus/web/*.jsonl"
    assert without_places(manifest) == without_places(load_manifest(here))

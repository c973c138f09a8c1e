"""Whole builds: text comes back, the bits are always the same, and bad input leaves nothing behind."""

import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prep_helpers import (
    NASTY_TEXTS,
    VOCAB_SIZE,
    build,
    build_error,
    decoded,
    source,
    write_jsonl,
    write_mixture,
    write_parquet,
)
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep import corpus, unit_shards
from data_prep.build_shards import assign
from data_prep.corpus import WorkUnit
from data_prep.encode import Encoder
from data_prep.errors import UserError
from data_prep.mixture import load_mixture
from data_prep.shards import ShardReader, load_manifest

pytest_plugins = ("prep_fixtures",)

REPOSITORY = Path(__file__).parent.parent
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def mixture(tmp_path: Path, tokenizer_dir: Path, texts: list[str]) -> Path:
    """Two sources, four files, six units."""
    write_jsonl(tmp_path / "more" / "0.jsonl", texts[:5])
    write_jsonl(tmp_path / "more" / "1.jsonl", texts[5:20])
    write_jsonl(tmp_path / "more" / "2.jsonl", texts[20:21])
    write_parquet(tmp_path / "speeches.parquet", texts)
    sources = [source("speeches", "speeches.parquet", weight=3), source("more", "more/*.jsonl", format="jsonl")]
    return write_mixture(tmp_path, tokenizer_dir, sources)


def run_build(mixture: Path, output_dir: Path, *launcher: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own; one thread for each rank, so that few cores do."""
    command = [*launcher, sys.executable, "-m", "data_prep.build_shards"]
    flags = ["--mixture", str(mixture), "--output-dir", str(output_dir)]
    path = os.pathsep.join([*environment.pop("PYTHONPATH", "").split(), str(REPOSITORY)])
    return subprocess.run(
        [*command, *flags], env={**os.environ, **environment, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def test_every_document_comes_back(dataset: Path, texts: list[str]) -> None:
    expected = {("speeches.parquet", row): text for row, text in enumerate(texts)}
    expected |= {("more/0.jsonl", row): text for row, text in enumerate(texts[:5])}
    expected |= {("more/1.jsonl", row): text for row, text in enumerate(texts[5:20])}
    assert decoded(dataset) == expected


def test_the_manifest_tells_the_truth(dataset: Path, tokenizer_dir: Path, texts: list[str]) -> None:
    manifest = load_manifest(dataset)
    assert (manifest.vocab_size, manifest.eos_id, manifest.eos_token) == (VOCAB_SIZE, 0, "<|endoftext|>")
    assert [(s.name, s.share, s.weight, s.origin) for s in manifest.sources] == [
        ("speeches", 3072, 3.0, "speeches.parquet"),
        ("more", 1024, 1.0, "more/*.jsonl"),
    ]
    speeches = [shard for shard in manifest.shards if shard.source == "speeches"]
    assert sum(shard.documents for shard in speeches) == len(texts)
    assert sum(shard.text_bytes for shard in speeches) == sum(len(text.encode()) for text in texts)
    assert sum(shard.text_characters for shard in speeches) == sum(map(len, texts))
    assert (dataset / "tokenizer" / "tokenizer.json").read_bytes() == (tokenizer_dir / "tokenizer.json").read_bytes()


def test_copies_of_a_text_stay_on_one_side(dataset: Path) -> None:
    """The jsonl files repeat texts of the parquet file."""
    splits = {(shard.input, shard.split) for shard in load_manifest(dataset).shards}
    assert ("more/1.jsonl", "validation") in splits
    reader, side = ShardReader(dataset), {}
    for shard in reader.manifest.shards:
        tokens, index = reader.tokens(shard), reader.documents(shard)
        for start, stop in itertools.pairwise([*index[:, 0].tolist(), shard.tokens]):
            assert side.setdefault(tokens[start:stop].tobytes(), shard.split) == shard.split


def test_rows_count_through_the_units_of_a_file(
    tmp_path: Path, mixture: Path, texts: list[str], dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus.cut_units, "__kwdefaults__", {"unit_bytes": 5_000})
    manifest = build(mixture, tmp_path / "out")
    assert len(manifest.shards_of("train", "speeches")) > 3
    assert decoded(tmp_path / "out").items() >= decoded(dataset).items()


@pytest.mark.skipif(MPIEXEC is None, reason="mpiexec is missing: pip install mpich")
def test_the_same_bits_from_any_number_of_ranks(tmp_path: Path, mixture: Path) -> None:
    one = build(mixture, tmp_path / "one").fingerprint
    for ranks in ("2", "3"):
        result = run_build(mixture, tmp_path / ranks, str(MPIEXEC), "-n", ranks)
        assert result.returncode == 0, result.stderr
        assert load_manifest(tmp_path / ranks).fingerprint == one
        assert json.loads((tmp_path / ranks / "build.json").read_text())["ranks"] == int(ranks)


@pytest.mark.skipif(MPIEXEC is None, reason="mpiexec is missing: pip install mpich")
def test_an_error_on_any_rank_is_one_line_and_the_end_of_all(tmp_path: Path, mixture: Path) -> None:
    (tmp_path / "more" / "1.jsonl").write_text('{"text": "x"}\nnonsense\n')
    result = run_build(mixture, tmp_path / "out", str(MPIEXEC), "-n", "2")
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "1.jsonl: line 2: not valid JSON" in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_many_worlds_of_one_rank_are_refused(tmp_path: Path, mixture: Path) -> None:
    pytest.importorskip("mpi4py.MPI", exc_type=ImportError)
    result = run_build(mixture, tmp_path / "out", OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="2")
    assert result.returncode == 2
    assert "the launcher started 2 ranks, but mpi4py sees 1" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_same_bits_without_gigatoken(tmp_path: Path, mixture: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "gigatoken.py").write_text("raise ImportError('blocked')\n")
    result = run_build(mixture, tmp_path / "slow", PYTHONPATH=str(blocked))
    assert result.returncode == 0, result.stderr
    assert "note: gigatoken is not installed; encoding with tokenizers" in result.stderr
    assert load_manifest(tmp_path / "slow").fingerprint == build(mixture, tmp_path / "fast").fingerprint
    assert (
        build(mixture, tmp_path / "chosen", "--encoder", "tokenizers").fingerprint
        == build(mixture, tmp_path / "fast").fingerprint
    )


def test_border_ids_survive(tmp_path: Path) -> None:
    """A tokenizer of 65,536 words, each its own id; gigatoken can't load it."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(65_536)}, unk_token="w7"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "w7"}')
    border = [0, 32_767, 32_768, 65_535]
    documents = [" ".join(f"w{i}" for i in (*border, extra)) for extra in range(100, 120)]
    write_parquet(tmp_path / "a.parquet", documents)
    manifest = build(write_mixture(tmp_path, tmp_path, [source("a", "a.parquet")]), tmp_path / "out")
    for shard in manifest.shards:
        tokens = ShardReader(tmp_path / "out").tokens(shard).reshape(-1, 6)
        assert (tokens[:, :4] == border).all()
        assert (tokens[:, 5] == 7).all()


def test_a_second_call_does_nothing(tmp_path: Path, mixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = build(mixture, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    build(mixture, tmp_path / "out")
    assert capsys.readouterr().out == f"already complete: {tmp_path / 'out'}, fingerprint {manifest.fingerprint}\n"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times
    (tmp_path / "out" / manifest.shards[0].path).unlink()
    with pytest.raises(UserError, match="missing"):
        build(mixture, tmp_path / "out")


def test_an_unfinished_build_is_built_again(tmp_path: Path, mixture: Path) -> None:
    manifest = build(mixture, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "shards" / "train" / "stale.npy").write_bytes(b"")
    assert build(mixture, tmp_path / "out") == manifest
    assert not (tmp_path / "out" / "shards" / "train" / "stale.npy").exists()


def test_an_output_directory_with_something_else_is_left_alone(tmp_path: Path, mixture: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    assert "not a data set of this command" in build_error(mixture, other)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    fingerprint = build(mixture, tmp_path / "out").fingerprint
    write_jsonl(tmp_path / "more" / "2.jsonl", ["changed"])
    with pytest.raises(UserError, match="holds a data set of another mixture or tokenizer"):
        build(mixture, tmp_path / "out")
    assert load_manifest(tmp_path / "out").fingerprint == fingerprint


def test_wrong_ids_of_the_fast_encoder_stop_the_build(
    tmp_path: Path, mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = unit_shards.UnitBuilder._prove

    def off_by_one(self: unit_shards.UnitBuilder, unit: WorkUnit, documents: Any, ids: Any, *more: Any) -> None:
        honest(self, unit, documents, ids + 1, *more)

    monkeypatch.setattr(unit_shards.UnitBuilder, "_prove", off_by_one)
    message = build_error(mixture, tmp_path / "out")
    assert "speeches.parquet: document in row" in message
    assert "tokenizers give different ids; build with --encoder tokenizers" in message


def test_long_documents_are_proved_by_their_beginning(
    tmp_path: Path, tokenizer_dir: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_shards, "PARITY_CHARACTERS", 100)
    seen: list[int] = []
    honest = unit_shards.reference_ids
    monkeypatch.setattr(
        unit_shards, "reference_ids", lambda tokenizer, text: seen.append(len(text)) or honest(tokenizer, text)
    )
    write_parquet(tmp_path / "a.parquet", texts[:20])
    build(write_mixture(tmp_path, tokenizer_dir, [source("a", "a.parquet")]), tmp_path / "out")
    assert seen
    assert max(seen) == 100


def test_empty_documents_are_left_out_and_counted(
    tmp_path: Path, tokenizer_dir: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_parquet(tmp_path / "a.parquet", ["", *texts[:12], "", ""])
    build(write_mixture(tmp_path, tokenizer_dir, [source("a", "a.parquet")]), tmp_path / "out")
    assert "left out" in (out := capsys.readouterr().out)
    assert "3 empty documents" in out
    assert decoded(tmp_path / "out") == {("a.parquet", i + 1): text for i, text in enumerate(texts[:12])}


def test_no_validation_documents_is_an_error(tmp_path: Path, tokenizer_dir: Path, texts: list[str]) -> None:
    write_parquet(tmp_path / "a.parquet", texts[:4])
    mixture = write_mixture(tmp_path, tokenizer_dir, [source("a", "a.parquet")], validation_fraction=1e-9)
    message = build_error(mixture, tmp_path / "out")
    assert "no document fell into validation at validation_fraction 1e-09" in message
    assert "with 4 documents, try validation_fraction: 0.5" in message
    mixture = write_mixture(tmp_path, tokenizer_dir, [source("a", "a.parquet")], validation_fraction=1 - 1e-9)
    assert "source 'a': no training documents" in build_error(mixture, tmp_path / "out2")


@pytest.mark.parametrize("documents", [[], [""]])
def test_a_source_without_documents(
    tmp_path: Path, tokenizer_dir: Path, texts: list[str], documents: list[str]
) -> None:
    write_parquet(tmp_path / "a.parquet", texts)
    write_parquet(tmp_path / "b.parquet", documents)
    sources = [source("a", "a.parquet"), source("b", "b.parquet")]
    message = build_error(write_mixture(tmp_path, tokenizer_dir, sources), tmp_path / "out")
    assert "source 'b': no documents in b.parquet" in message


A_SOURCE = source("a", "a.parquet")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"validation_fracton": 0.1}, "unknown key 'validation_fracton'; did you mean 'validation_fraction'?"),
        ({"sources": [{**A_SOURCE, "wieght": 1}]}, "sources[0]: unknown key 'wieght'; did you mean 'weight'?"),
        ({"sources": [{"name": "a"}]}, "sources[0]: 'path' is missing"),
        ({"sources": []}, "expected a list of at least one source"),
        ({"sources": ["a.parquet"]}, "sources[0]: expected the keys name, path"),
        ({"sources": [A_SOURCE, A_SOURCE]}, "two sources are named 'a'"),
        ({"sources": [{**A_SOURCE, "name": "../a"}]}, "name '../a': expected letters"),
        ({"sources": [{**A_SOURCE, "weight": 0}]}, "weight is 0.0, expected a positive number"),
        ({"sources": [{**A_SOURCE, "weight": -1}]}, "weight is -1.0, expected a positive number"),
        ({"sources": [{**A_SOURCE, "weight": True}]}, "weight is True, expected a number"),
        ({"sources": [{**A_SOURCE, "weight": float("nan")}]}, "weight is nan, expected a number"),
        ({"sources": [A_SOURCE, {**A_SOURCE, "name": "b", "weight": 1e-6}]}, "below 1/4096 of the whole"),
        ({"sources": [{**A_SOURCE, "format": "csv"}]}, "format 'csv', expected one of parquet, jsonl, jsonl.gz"),
        ({"sources": [{**A_SOURCE, "format": "txt", "text_field": "x"}]}, "text_field has no meaning for txt"),
        ({"sources": [{**A_SOURCE, "path": "b.parquet"}]}, "source 'a': no file matches b.parquet"),
        ({"sources": [{**A_SOURCE, "text_field": "body"}]}, "no column 'body', it has: id, text"),
        ({"validation_fraction": 0}, "validation_fraction is 0.0, expected above 0 and below 1"),
        ({"validation_fraction": "much"}, "validation_fraction is 'much', expected a number"),
        ({"tokenizer": "nowhere"}, "nowhere/tokenizer_config.json: No such file"),
    ],
)
def test_bad_mixtures_touch_nothing(
    tmp_path: Path, tokenizer_dir: Path, changes: dict[str, Any], expected: str
) -> None:
    write_parquet(tmp_path / "a.parquet", NASTY_TEXTS)
    content = {"tokenizer": str(tokenizer_dir), "validation_fraction": 0.3, "sources": [A_SOURCE], **changes}
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(yaml.safe_dump(content))
    message = build_error(mixture, tmp_path / "out")
    assert expected in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"- 1", b"a: [", b"\xff"])
def test_mixtures_that_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mixture.yaml").write_bytes(content)
    assert "mixture.yaml: " in build_error(tmp_path / "mixture.yaml", tmp_path / "out")
    assert "No such file" in build_error(tmp_path / "nowhere.yaml", tmp_path / "out")


def test_the_shipped_mixture_is_valid() -> None:
    mixture = load_mixture(REPOSITORY / "data_prep" / "mixtures" / "example.yaml")
    assert [item.name for item in mixture.sources] == ["web", "textbooks"]


@given(st.lists(st.integers(0, 100), max_size=20), st.integers(1, 5))
def test_units_are_dealt_out_once_and_evenly(sizes: list[int], ranks: int) -> None:
    units = tuple(
        WorkUnit(
            source="s", name=f"{i:02d}", path=Path(), input="", format="txt", text_field=None, start=0, stop=0,
            size_bytes=size,
        )
        for i, size in enumerate(sizes)
    )  # fmt: skip
    parts = assign(units, ranks)
    assert sorted(unit.name for part in parts for unit in part) == [unit.name for unit in units]
    assert all(part == sorted(part, key=lambda unit: unit.name) for part in parts)
    loads = [sum(unit.size_bytes for unit in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_text_that_encodes_to_the_end_of_document_id(tmp_path: Path, texts: list[str], tokenizer_dir: Path) -> None:
    directory = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, directory)
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "e"}))
    write_parquet(tmp_path / "a.parquet", texts)
    message = build_error(write_mixture(tmp_path, directory, [A_SOURCE]), tmp_path / "out")
    assert "some text encodes to eos_token 'e'" in message


def test_ids_beyond_the_vocabulary_stop_the_build(
    tmp_path: Path, mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_shards.UnitBuilder, "_prove", lambda *_, **__: None)
    monkeypatch.setattr("data_prep.build_shards.new_encoder", lambda *_, **__: Encoder(
        name="odd", encode=lambda texts: (np.full(len(texts), VOCAB_SIZE, np.uint32), np.arange(len(texts) + 1)),
        is_reference=False,
    ))  # fmt: skip
    assert f"odd gave id {VOCAB_SIZE}, beyond the vocabulary" in build_error(mixture, tmp_path / "out")


def test_a_full_disk_is_one_clear_line(tmp_path: Path, mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unit_shards, "write_array", full)
    message = build_error(mixture, tmp_path / "out")
    assert "can't write unit 00000-speeches-00000 (No space left on device); make space" in message


def test_the_benchmark_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "tests" / "benchmarks")
    benchmark = importlib.import_module("data_preparation")
    benchmark.main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("median of 1:")
    assert [line.split("|")[1].split()[0] for line in lines[4:]] == ["`build_shards`,", "gigatoken", "`tokenizers`"]

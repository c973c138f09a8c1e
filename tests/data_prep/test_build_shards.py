"""Whole builds: text comes back, the bits are always the same, and bad input leaves nothing
behind.
"""

import importlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.prep_helpers import (
    MPIEXEC,
    NASTY_TEXTS,
    VOCAB_SIZE,
    build,
    build_command,
    build_error,
    decoded,
    error_line,
    flip_byte,
    needs_mpi,
    run,
    source,
    stamps,
    write_jsonl,
    write_mixture,
    write_parquet,
)
from support.runs import REPOSITORY
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep import train_tokenizer
from data_prep.building import proofs, unit_shards, work_units
from data_prep.building.build_plan import assign
from data_prep.building.mixture import load_mixture, mixture_path
from data_prep.commands import exit_code
from data_prep.errors import UserError
from data_prep.formats.work_unit import WorkUnit
from data_prep.locks import lock
from data_prep.manifest import NO_LOSS, Manifest, Shard, load_manifest
from data_prep.shards import ShardReader
from data_prep.tokenizer.encode import Encoder, new_encoder
from data_prep.tokenizer.load import LoadedTokenizer

pytest_plugins = ("support.prep_fixtures",)


A_SOURCE = source("a", "a.parquet")


@pytest.fixture
def mixture(tmp_path: Path, tokenizer_dir: Path, texts: list[str]) -> Path:
    """Two sources, four files, six units."""
    write_jsonl(tmp_path / "more" / "0.jsonl", texts[:5])
    write_jsonl(tmp_path / "more" / "1.jsonl", texts[5:20])
    write_jsonl(tmp_path / "more" / "2.jsonl", texts[20:21])
    write_parquet(tmp_path / "speeches.parquet", texts)
    sources = [
        source("speeches", "speeches.parquet", weight=3),
        source("more", "more/*.jsonl", format="jsonl"),
    ]
    return write_mixture(tmp_path, tokenizer_dir, sources)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work units of 20 kB, so that tiny sources have several."""
    monkeypatch.setattr(work_units, "MIN_UNIT_BYTES", 20_000)


def test_every_document_comes_back(dataset: Path, texts: list[str]) -> None:
    expected = {("speeches.parquet", row): text for row, text in enumerate(texts)}
    expected |= {("more/0.jsonl", row): text for row, text in enumerate(texts[:5])}
    expected |= {("more/1.jsonl", row): text for row, text in enumerate(texts[5:20])}
    assert decoded(dataset) == expected


def test_the_manifest_tells_the_truth(dataset: Path, tokenizer_dir: Path, texts: list[str]) -> None:
    manifest = load_manifest(dataset)
    assert (manifest.vocab_size, manifest.eos_id, manifest.eos_token) == (
        VOCAB_SIZE,
        0,
        "<|endoftext|>",
    )
    assert [(s.name, s.share, s.weight, s.origin) for s in manifest.sources] == [
        ("speeches", 3072, 3.0, "speeches.parquet"),
        ("more", 1024, 1.0, "more/*.jsonl"),
    ]
    speeches = [shard for shard in manifest.shards if shard.source == "speeches"]
    assert sum(shard.documents for shard in speeches) == len(texts)
    assert sum(shard.text_bytes for shard in speeches) == sum(len(text.encode()) for text in texts)
    assert sum(shard.text_characters for shard in speeches) == sum(map(len, texts))
    assert manifest.special_tokens == {"<|endoftext|>": 0, "<pad>": 511}
    assert manifest.document_separator == "eos after every document"
    assert manifest.bad_documents == ()
    assert (dataset / "tokenizer" / "tokenizer.json").read_bytes() == (
        tokenizer_dir / "tokenizer.json"
    ).read_bytes()


def test_copies_of_a_text_stay_on_one_side(dataset: Path) -> None:
    """The jsonl files repeat texts of the parquet file."""
    splits = {(*shard.inputs, shard.split) for shard in load_manifest(dataset).shards}
    assert ("more/1.jsonl", "validation") in splits
    reader, side = ShardReader(dataset), {}
    for shard in reader.manifest.shards:
        tokens, index = reader.tokens(shard), reader.documents(shard)
        for start, stop in itertools.pairwise([*index[:, 0].tolist(), shard.tokens]):
            assert side.setdefault(tokens[start:stop].tobytes(), shard.split) == shard.split


def test_rows_count_through_the_units_of_a_file(
    tmp_path: Path, mixture: Path, texts: list[str], dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_units, "MIN_UNIT_BYTES", 5_000)
    manifest = build(mixture, tmp_path / "out")
    assert len(manifest.shards_of("train", "speeches")) > 3
    assert decoded(tmp_path / "out").items() >= decoded(dataset).items()


@needs_mpi
def test_an_error_on_any_rank_is_one_line_and_the_end_of_all(
    tmp_path: Path, tokenizer_dir: Path, mixture: Path
) -> None:
    """One rank meets it at once; the other has half a minute of work before it."""
    (tmp_path / "more" / "1.jsonl").write_text('{"text": "x"}\nnonsense\n')
    write_parquet(tmp_path / "a.parquet", [f"{i} " * 1000 for i in range(10_000)], group_rows=50)
    sources = [source("more", "more/*.jsonl", format="jsonl"), A_SOURCE]
    mixture = write_mixture(tmp_path, tokenizer_dir, sources)
    command = build_command(
        mixture, tmp_path / "out", "--encoder", "tokenizers", ranks=2, unit_bytes=500_000
    )
    assert "1.jsonl: line 2: not valid JSON" in error_line(run(command))
    assert len(list((tmp_path / "out" / "units").glob("a/*.json"))) < 20
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_many_worlds_of_one_rank_are_refused(tmp_path: Path, mixture: Path) -> None:
    pytest.importorskip("mpi4py.MPI", exc_type=ImportError)
    world = {"PMI_RANK": "0", "PMI_SIZE": "2"}
    line = error_line(run(build_command(mixture, tmp_path / "out"), **world))
    assert "the launcher started 2 ranks, but mpi4py sees 1" in line
    assert not (tmp_path / "out").exists()


def test_the_same_bits_without_gigatoken(tmp_path: Path, mixture: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "gigatoken.py").write_text("raise ImportError('blocked')\n")
    result = run(build_command(mixture, tmp_path / "slow"), PYTHONPATH=str(blocked))
    assert result.returncode == 0, result.stderr
    assert "(blocked); encoding with tokenizers" in result.stderr
    assert (
        load_manifest(tmp_path / "slow").fingerprint
        == build(mixture, tmp_path / "fast").fingerprint
    )
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
    manifest = build(
        write_mixture(tmp_path, tmp_path, [source("a", "a.parquet")]), tmp_path / "out"
    )
    for shard in manifest.shards:
        tokens = ShardReader(tmp_path / "out").tokens(shard).reshape(-1, 6)
        assert (tokens[:, :4] == border).all()
        assert (tokens[:, 5] == 7).all()


def test_a_second_call_does_nothing(
    tmp_path: Path, mixture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = build(mixture, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    build(mixture, tmp_path / "out")
    assert (
        capsys.readouterr().out
        == f"already complete: {tmp_path / 'out'}, fingerprint {manifest.fingerprint}\n"
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times
    (tmp_path / "out" / manifest.shards[0].path).unlink()
    with pytest.raises(UserError, match="missing"):
        build(mixture, tmp_path / "out")


def unfinish(output_dir: Path) -> dict[str, tuple[int, int]]:
    """As a kill just before the manifest leaves it; stamps of what is there."""
    (output_dir / "manifest.json").unlink()
    return stamps(output_dir)


def rewritten(output_dir: Path, before: dict[str, tuple[int, int]]) -> set[str]:
    """Records, shards and indexes that are not the files they were."""
    now = stamps(output_dir)
    return {
        name
        for name in before | now
        if name[:5] in ("shard", "units") and before.get(name) != now.get(name)
    }


def files_of_unit(manifest: Manifest, of: Shard) -> set[str]:
    name = Path(of.path).stem
    shards = [shard for shard in manifest.shards if Path(shard.path).stem == name]
    assert {shard.source for shard in shards} == {of.source}
    return {
        f"units/{of.source}/{name}.json",
        *(path for s in shards for path in (s.path, s.index_path)),
    }


def test_an_unfinished_build_goes_on(tmp_path: Path, mixture: Path, small_units: None) -> None:
    manifest = build(mixture, tmp_path / "out")
    before = unfinish(tmp_path / "out")
    stale = (
        "shards/train/more/00009-a-00000.npy",
        "shards/train/more/00009-a-00000.documents.npy.tmp",
    )
    own = (
        "shards/train/more/notes.md",
        "shards/train/copy.npy",
        "units/more/9.json",
        "units/00009-a-00000.json",
    )
    for stray in (*stale, "units/more/00009-a-00000.json", *own):
        (tmp_path / "out" / stray).write_bytes(b"")
    assert build(mixture, tmp_path / "out") == manifest
    assert rewritten(tmp_path / "out", before) == set(own)
    assert stamps(tmp_path / "out").keys() == before.keys() | {"manifest.json", *own}


DAMAGES: dict[str, Callable[[Path, Path, Path], object]] = {
    "a flipped byte of the shard": lambda shard, index, record: flip_byte(shard),
    "a flipped byte of the index": lambda shard, index, record: flip_byte(index),
    "a truncated shard": lambda shard, index, record: os.truncate(shard, 200),
    "no index": lambda shard, index, record: index.unlink(),
    "a truncated record": lambda shard, index, record: os.truncate(record, 200),
    "an empty record": lambda shard, index, record: os.truncate(record, 0),
    "a record of nothing": lambda shard, index, record: record.write_text("null"),
    "a wrong figure in a record": lambda shard, index, record: record.write_text(
        record.read_text().replace('"text_bytes": ', '"text_bytes": 1')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_unit_alone_is_built_again(
    tmp_path: Path, mixture: Path, small_units: None, damage: str
) -> None:
    manifest = build(mixture, tmp_path / "out")
    before = unfinish(tmp_path / "out")
    shard = manifest.shards_of("train", "speeches")[1]
    record = tmp_path / "out" / "units" / "speeches" / f"{Path(shard.path).stem}.json"
    DAMAGES[damage](tmp_path / "out" / shard.path, tmp_path / "out" / shard.index_path, record)
    assert build(mixture, tmp_path / "out") == manifest
    assert rewritten(tmp_path / "out", before) == files_of_unit(manifest, shard)


def test_every_record_damaged(tmp_path: Path, mixture: Path, small_units: None) -> None:
    manifest = build(mixture, tmp_path / "out")
    unfinish(tmp_path / "out")
    for record in (tmp_path / "out" / "units").glob("*/*.json"):
        flip_byte(record, 20)
    assert build(mixture, tmp_path / "out") == manifest


def test_a_changed_input_costs_its_own_units(
    tmp_path: Path, mixture: Path, texts: list[str]
) -> None:
    build(mixture, tmp_path / "out")
    before = unfinish(tmp_path / "out")
    write_jsonl(tmp_path / "more" / "2.jsonl", texts[21:22])
    build(mixture, tmp_path / "out")
    assert {Path(name).name.split(".")[0] for name in rewritten(tmp_path / "out", before)} == {
        "00002-2-00000"
    }
    assert decoded(tmp_path / "out")["more/2.jsonl", 0] == texts[21]


def test_other_weights_take_the_units_that_are_there(tmp_path: Path, mixture: Path) -> None:
    old = build(mixture, tmp_path / "out")
    before = stamps(tmp_path / "out")
    mixture.write_text(mixture.read_text().replace("weight: 3", "weight: 1"))
    with pytest.raises(
        UserError, match=r"holds a data set of another mixture .* remove its manifest\.json and run"
    ):
        build(mixture, tmp_path / "out")
    assert stamps(tmp_path / "out") == before
    (tmp_path / "out" / "manifest.json").unlink()
    new = build(mixture, tmp_path / "out")
    assert [source.share for source in new.sources] == [2048, 2048]
    assert new.shards == old.shards
    assert not rewritten(tmp_path / "out", before)


def test_bad_documents_stop_the_build_or_are_left_out(
    tmp_path: Path, tokenizer_dir: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """When the policy changes, the units that are there serve as far as they may."""
    write_jsonl(tmp_path / "0.jsonl", texts[:20])
    write_jsonl(tmp_path / "1.jsonl", texts[20:30])
    with (tmp_path / "1.jsonl").open("a") as file:
        file.write('nonsense\n{"text": "good"}\n{"text": null}\n')
    sources = [source("a", "*.jsonl", format="jsonl")]
    lenient = write_mixture(
        tmp_path, tokenizer_dir, sources, on_bad_document="skip", max_bad_fraction=1
    ).rename(tmp_path / "lenient.yaml")
    strict = write_mixture(tmp_path, tokenizer_dir, sources)
    assert "1.jsonl: line 11: not valid JSON" in build_error(strict, tmp_path / "out")
    manifest = build(lenient, tmp_path / "out")
    assert "left out                2 bad documents" in capsys.readouterr().out
    bad = [(document.source, document.input, document.row) for document in manifest.bad_documents]
    assert bad == [("a", "1.jsonl", 10), ("a", "1.jsonl", 12)]
    assert "not valid JSON" in manifest.bad_documents[0].reason
    assert (manifest.sources[0].bad_documents, manifest.sources[0].empty_documents) == (2, 0)
    assert decoded(tmp_path / "out")["1.jsonl", 11] == "good"
    before = unfinish(tmp_path / "out")
    assert "1.jsonl: line 11: not valid JSON" in build_error(strict, tmp_path / "out")
    assert build(lenient, tmp_path / "out") == manifest
    assert not rewritten(tmp_path / "out", before)


def test_an_output_directory_with_something_else_is_left_alone(
    tmp_path: Path, mixture: Path, small_units: None
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    assert "not a data set of this command" in build_error(mixture, other)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    assert "not a data set of this command" in build_error(mixture, other / "thesis.txt")
    assert "can't write the tokenizer (Not a directory)" in build_error(
        mixture, other / "thesis.txt" / "out"
    )
    build(mixture, tmp_path / "out")
    before = stamps(tmp_path / "out")
    mixture.write_text(
        mixture.read_text().replace("speeches.parquet", "more/0.jsonl").replace("parquet", "jsonl")
    )
    with pytest.raises(UserError, match="holds a data set of another mixture or tokenizer"):
        build(mixture, tmp_path / "out")
    assert stamps(tmp_path / "out") == before


def test_units_of_another_tokenizer_are_left_alone(
    tmp_path: Path, mixture: Path, small_units: None
) -> None:
    """Complete or not."""
    train_tokenizer.main(
        [
            "--vocab-size",
            "300",
            "--source",
            str(tmp_path / "more" / "0.jsonl"),
            "--output-dir",
            str(tmp_path / "other"),
        ]
    )
    build(mixture, tmp_path / "out")
    before = stamps(tmp_path / "out")
    with pytest.raises(UserError, match="holds a data set of another mixture or tokenizer"):
        build(mixture, tmp_path / "out", "--tokenizer", str(tmp_path / "other"))
    assert stamps(tmp_path / "out") == before
    before = unfinish(tmp_path / "out")
    with pytest.raises(
        UserError, match="holds finished units of another mixture or tokenizer; choose another"
    ):
        build(mixture, tmp_path / "out", "--tokenizer", str(tmp_path / "other"))
    assert stamps(tmp_path / "out") == before


def test_after_an_input_was_touched_the_advice_works(tmp_path: Path, mixture: Path) -> None:
    manifest = build(mixture, tmp_path / "out")
    for path in [*tmp_path.glob("*.parquet"), *tmp_path.glob("more/*")]:
        os.utime(path, ns=(1, 1))
    advice = r"or time of change; .*; to build it anew here, .* remove its manifest.* that loses "
    with pytest.raises(UserError, match=advice):
        build(mixture, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    assert build(mixture, tmp_path / "out") == manifest


def test_a_source_of_bad_documents_alone_says_what_is_wrong(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    (tmp_path / "a.jsonl").write_text("nonsense")
    mixture = write_mixture(
        tmp_path,
        tokenizer_dir,
        [source("a", "a.jsonl", format="jsonl")],
        on_bad_document="skip",
        max_bad_fraction=1,
    )
    message = build_error(mixture, tmp_path / "out")
    assert "a.jsonl: not one good row in it, bad: 1, the first: row 0: not valid JSON" in message
    assert message.startswith(f"source 'a': {tmp_path}")


def test_ctrl_c_is_one_word_and_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert exit_code(interrupted) == 130
    assert capfd.readouterr().err == "stopped by Ctrl-C\n"


def test_a_directory_in_which_a_build_had_just_begun(tmp_path: Path, mixture: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "build.json.tmp").write_text("{")
    (tmp_path / "out" / ".lock").write_text("")
    build(mixture, tmp_path / "out")
    assert not [name for name in stamps(tmp_path / "out") if name.endswith((".tmp", ".lock"))]


def test_two_builds_of_one_directory(tmp_path: Path, mixture: Path) -> None:
    with lock(tmp_path / "out", "at work", "--output-dir"):
        assert "out: another process is building or repairing it; wait for it" in build_error(
            mixture, tmp_path / "out"
        )
    build(mixture, tmp_path / "out")


def test_how_often_training_sees_each_source(
    tmp_path: Path, mixture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = build(mixture, tmp_path / "out")
    speeches, more = (manifest.tokens("train", name) for name in ("speeches", "more"))
    capsys.readouterr()
    build(mixture, tmp_path / "out", "--train-tokens", f"{4 * speeches:.1e}")
    _, first, second = capsys.readouterr().out.splitlines()
    tokens = float(f"{4 * speeches:.1e}")
    assert (
        first
        == f"epochs       speeches: {0.75 * tokens / speeches:,.2f} over {int(tokens):,} training "
        "tokens"
    )
    assert second.startswith(f"epochs       more: {0.25 * tokens / more:,.2f} over ")
    assert second.endswith("; above 4 repeats teach little: add text or lower its weight") == (
        tokens > 16 * more
    )


def test_wrong_ids_of_the_fast_encoder_stop_the_build(
    tmp_path: Path, mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_one(tokenizer: LoadedTokenizer, *, prefer: str) -> Encoder:
        honest = new_encoder(tokenizer, prefer=prefer)

        def encode(texts: Any) -> tuple[Any, Any]:
            ids, offsets = honest.encode(texts)
            return ids + 1, offsets

        return replace(honest, encode=encode)

    monkeypatch.setattr(unit_shards, "new_encoder", off_by_one)
    message = build_error(mixture, tmp_path / "out")
    assert re.search(
        r"(speeches\.parquet|more/\d\.jsonl): document in row \d+ of unit 0000\d-", message
    )
    assert "tokenizers give different ids; build with --encoder tokenizers" in message


def test_long_documents_are_proved_by_their_beginning(
    tmp_path: Path, tokenizer_dir: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proofs, "PARITY_CHARACTERS", 100)
    seen: list[int] = []
    honest = proofs.reference_ids
    monkeypatch.setattr(
        proofs,
        "reference_ids",
        lambda tokenizer, text: seen.append(len(text)) or honest(tokenizer, text),
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
    assert decoded(tmp_path / "out") == {
        ("a.parquet", i + 1): text for i, text in enumerate(texts[:12])
    }


def test_no_validation_documents_is_an_error(
    tmp_path: Path, tokenizer_dir: Path, texts: list[str]
) -> None:
    write_parquet(tmp_path / "a.parquet", texts[:4])
    mixture = write_mixture(
        tmp_path, tokenizer_dir, [source("a", "a.parquet")], validation_fraction=1e-9
    )
    message = build_error(mixture, tmp_path / "out")
    assert "no document fell into validation at validation_fraction 1e-09" in message
    assert "with 4 documents, try validation_fraction: 0.5" in message
    mixture = write_mixture(
        tmp_path, tokenizer_dir, [source("a", "a.parquet")], validation_fraction=1 - 1e-9
    )
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


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"validation_fracton": 0.1},
            "unknown key validation_fracton; did you mean validation_fraction?",
        ),
        (
            {"sources": [{**A_SOURCE, "wieght": 1}]},
            "unknown key sources.0.wieght; did you mean weight?",
        ),
        ({"sources": [{"name": "a"}]}, "sources.0.weight is missing"),
        ({"sources": [{"name": "a", "weight": 1}]}, "sources.0: expected either path or hub"),
        ({"sources": [{**A_SOURCE, "hub": "a/b"}]}, "sources.0: expected either path or hub"),
        (
            {"sources": [{**A_SOURCE, "split": "train"}]},
            "sources.0: split has a meaning only beside hub; remove it",
        ),
        (
            {"on_bad_document": "warn"},
            "on_bad_document: got 'warn'; expected 'error' or 'skip'",
        ),
        ({"sources": []}, "sources: got []; Tuple should have at least 1 item"),
        (
            {"sources": ["a.parquet"]},
            "sources.0: got 'a.parquet'; expected keys and values",
        ),
        ({"sources": [A_SOURCE, A_SOURCE]}, "two sources are named 'a'"),
        (
            {"sources": [{**A_SOURCE, "name": "../a"}]},
            "sources.0.name: got '../a'; String should match pattern",
        ),
        ({"sources": [{**A_SOURCE, "weight": 0}]}, "weight: got 0; expected a number above 0"),
        (
            {"sources": [{**A_SOURCE, "weight": -1}]},
            "weight: got -1; expected a number above 0",
        ),
        (
            {"sources": [{**A_SOURCE, "weight": True}]},
            "weight: got True; expected a number",
        ),
        ({"sources": [{**A_SOURCE, "weight": float("nan")}]}, "weight: got nan; expected a "),
        (
            {"sources": [A_SOURCE, {**A_SOURCE, "name": "b", "weight": 1e-6}]},
            "mixture.yaml: source 'b': weight 1e-06 is below 1/4096 of the whole; raise it, or "
            "leave that source out",
        ),
        (
            {"sources": [{**A_SOURCE, "weight": 1e300}]},
            "weight: got 1e+300; expected a number of 1",
        ),
        (
            {"sources": [{**A_SOURCE, "format": "xml"}]},
            "format 'xml', expected one of parquet, jsonl, jsonl.gz",
        ),
        (
            {"sources": [{**A_SOURCE, "format": "txt", "text_field": "x"}]},
            "text_field has no meaning for txt",
        ),
        ({"sources": [{**A_SOURCE, "path": "b.parquet"}]}, "source 'a': no file matches b.parquet"),
        ({"sources": [{**A_SOURCE, "text_field": "body"}]}, "no column 'body', it has: id, text"),
        ({"validation_fraction": 0}, "validation_fraction: got 0; expected a number above 0"),
        (
            {"validation_fraction": "much"},
            "validation_fraction: could not convert string to float: 'much'",
        ),
        ({"tokenizer": "nowhere"}, "nowhere/tokenizer.json: No such file"),
    ],
)
def test_bad_mixtures_touch_nothing(
    tmp_path: Path, tokenizer_dir: Path, changes: dict[str, Any], expected: str
) -> None:
    write_parquet(tmp_path / "a.parquet", NASTY_TEXTS)
    content = {
        "tokenizer": str(tokenizer_dir),
        "validation_fraction": 0.3,
        "sources": [A_SOURCE],
        **changes,
    }
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(yaml.safe_dump(content))
    message = build_error(mixture, tmp_path / "out")
    assert expected in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "tokenizer: a\nsources: []\ntokenizer: b\n",
            "line 3: 'tokenizer' is there already; keep one of the two",
        ),
        ("sources:\n- {name: a, weight: 1, weight: 2}\n", "line 2: 'weight' is there already"),
        (
            "a: &a {x: 1}\nb: {<<: *a, x: 2}\n",
            "unknown key a; expected one of",
        ),  # what YAML itself lets a mapping replace
    ],
)
def test_a_key_that_stands_twice_is_named_with_its_line(
    tmp_path: Path, content: str, expected: str
) -> None:
    (tmp_path / "mixture.yaml").write_text(content)
    message = build_error(tmp_path / "mixture.yaml", tmp_path / "out")
    assert message.startswith(f"{tmp_path / 'mixture.yaml'}: ")
    assert expected in message


@pytest.mark.parametrize(
    "content", ["a: 1\npath: *.jsonl\n", "a:\n- **/x.jsonl # all\n", "a: 1\npath: *all\n"]
)
def test_a_glob_without_quotes_is_called_one(tmp_path: Path, content: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(content)
    with pytest.raises(
        UserError,
        match=r"line 2: a value that begins with \* is an alias to YAML; put it in quotes",
    ):
        load_mixture(path)


def test_files_of_two_formats_are_two_sources(
    tmp_path: Path, tokenizer_dir: Path, texts: list[str]
) -> None:
    write_parquet(tmp_path / "in.parquet", texts)
    write_jsonl(tmp_path / "in.jsonl", texts)
    mixture = write_mixture(tmp_path, tokenizer_dir, [{"name": "a", "path": "in.*", "weight": 1}])
    message = build_error(mixture, tmp_path / "out")
    assert (
        "source 'a': files of formats jsonl and parquet; make each a source of its own" in message
    )


@pytest.mark.parametrize("number", ["nan", "inf", "-5", "1e400", "0", "many"])
def test_numbers_of_training_tokens_that_are_none(
    tmp_path: Path, mixture: Path, number: str
) -> None:
    with pytest.raises(
        UserError, match=f"--train-tokens: {number}: expected a whole number of 1 or more"
    ):
        build(mixture, tmp_path / "out", "--train-tokens", number)
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
            source="s",
            name=f"{i:02d}",
            files=(),
            format="txt",
            text_field=None,
            skip_bad=False,
            start=0,
            stop=0,
            size_bytes=size,
        )
        for i, size in enumerate(sizes)
    )
    parts = assign(units, ranks)
    assert sorted(unit.name for part in parts for unit in part) == [unit.name for unit in units]
    assert all(part == sorted(part, key=lambda unit: unit.name) for part in parts)
    loads = [sum(unit.size_bytes for unit in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_text_that_encodes_to_the_end_of_document_id(
    tmp_path: Path, texts: list[str], tokenizer_dir: Path
) -> None:
    directory = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, directory)
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "e"}))
    write_parquet(tmp_path / "a.parquet", texts)
    message = build_error(write_mixture(tmp_path, directory, [A_SOURCE]), tmp_path / "out")
    assert "a.parquet: row 0: its text gives the special token 'e' (id " in message


def test_ids_beyond_the_vocabulary_stop_the_build(
    tmp_path: Path, mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(texts: Any) -> tuple[Any, Any]:
        return np.full(len(texts), VOCAB_SIZE, np.uint32), np.arange(len(texts) + 1)

    monkeypatch.setattr(proofs.Prover, "prove", lambda *_, **__: NO_LOSS)
    monkeypatch.setattr(
        unit_shards,
        "new_encoder",
        lambda *_, **__: Encoder(name="odd", encode=encode, is_reference=False),
    )
    assert f"odd gave id {VOCAB_SIZE}, beyond the vocabulary" in build_error(
        mixture, tmp_path / "out"
    )


def test_the_benchmark_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "tests" / "benchmarks")
    benchmark = importlib.import_module("data_preparation")
    benchmark.main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("median of 1:")
    routes = [
        "`build_shards`, one process",
        "`build_shards`, 2 MPI ranks",
        "gigatoken",
        "`tokenizers`",
    ]
    rows = [line for line in lines if line.startswith("| ") and line.count("|") == 7][1:]
    for route in routes if MPIEXEC else [routes[0], *routes[2:]]:
        assert rows.pop(0).startswith(f"| {route}")
    assert not rows
    assert any(line.startswith("| `verify`") for line in lines)


def test_the_shipped_mixtures_name_the_hub_s_data_sets_and_wait_for_a_tokenizer(
    tmp_path: Path,
) -> None:
    for name in ("fineweb_edu_cosmopedia", "fineweb_edu_cosmopedia_full"):
        mixture = load_mixture(mixture_path(name), tmp_path)
        hubs = [(source.hub, source.weight) for source in mixture.sources]
        assert hubs == [("HuggingFaceFW/fineweb-edu", 0.8), ("HuggingFaceTB/cosmopedia", 0.2)]
        assert all(
            re.fullmatch("[0-9a-f]{40}", source.revision or "") for source in mixture.sources
        )
        with pytest.raises(UserError, match="no --tokenizer was given"):
            load_mixture(mixture_path(name))
    with pytest.raises(
        UserError, match=r"no such mixture; give a \.yaml file or one of example, fineweb"
    ):
        mixture_path("fineweb")

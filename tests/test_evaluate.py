"""Evaluation: every token once, whatever the windows, and bits per byte by their definition."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import counting_dataset, run_command

from data_prep.errors import UserError
from data_prep.shards import ShardReader
from pretrain.checkpoint import load_for_reading, load_model
from pretrain.evaluate import evaluate, main, score


def test_figures_equal_a_plain_pass_over_the_stream(text_run: Path, text_data: Path) -> None:
    reader = ShardReader(text_data)
    checkpoint = load_for_reading(text_run)
    total, by_source = evaluate(checkpoint, reader)

    shards = reader.manifest.shards_of("validation")
    stream = torch.from_numpy(np.concatenate([reader.tokens(shard) for shard in shards]).astype(np.int64))
    model, nats, targets = load_model(checkpoint).eval(), 0.0, 0
    for start in range(0, len(stream) - 1, 32):
        ids = stream[start : start + 33]
        logits = model(ids[None, :-1]).logits[0]
        nats += F.cross_entropy(logits, ids[1:], reduction="sum").item()
        targets += len(ids) - 1

    assert targets == total["targets"] == len(stream) - 1
    assert (len(stream) - 1) % 32, "the split must end in a partial window for this test to mean something"
    assert total["loss"] == pytest.approx(nats / targets, rel=1e-6)
    assert total["perplexity"] == pytest.approx(math.exp(nats / targets), rel=1e-5)
    text_bytes = sum(shard.text_bytes for shard in shards)
    assert total["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)
    assert by_source == {"sotu": total}


def test_a_uniform_guess_over_256_ids_is_eight_bits_an_id() -> None:
    figures = score(nats=100 * math.log(256), targets=100, text_bytes=100)
    assert figures["perplexity"] == pytest.approx(256)
    assert figures["bits_per_byte"] == pytest.approx(8)


def test_the_command_prints_and_writes_the_same_figures(text_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_split_that_is_not_as_it_was_built_is_not_scored(text_run: Path, text_data: Path, tmp_path: Path) -> None:
    data = shutil.copytree(text_data, tmp_path / "data")
    shard = data / ShardReader(data).manifest.shards_of("validation")[0].path
    content = shard.read_bytes()
    shard.write_bytes(content[:-64] + bytes(64))
    with pytest.raises(UserError, match=f"{shard}: differs from its digest: .*; python -m data_prep.verify {data}"):
        main(["--run-dir", str(text_run), "--data-dir", str(data)])


@pytest.mark.parametrize("module", ["pretrain.evaluate", "pretrain.export_hf"])
def test_a_run_without_checkpoints_is_one_clear_line(module: str, text_run: Path, tmp_path: Path) -> None:
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


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(text_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(text_run, run_dir)
    fragments = next((run_dir / "checkpoints" / "step-00000020").glob("*.safetensors"))
    content = bytearray(fragments.read_bytes())
    content[-1] ^= 1
    fragments.write_bytes(content)
    result = run_command(sys.executable, "-m", "pretrain.evaluate", "--run-dir", str(run_dir))
    assert result.returncode == 0
    assert "step-00000020: " in result.stderr
    assert re.search(r"differs from its digest: \w{32}, expected \w{32}; passed over", result.stderr)
    assert "step-00000015" in result.stdout

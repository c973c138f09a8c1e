"""Samples while a run trains: what they are, what they outlive, and that they change no bit."""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.forked_ranks import arguments_of, end_of, logs_of, run_ranks, start_ranks, train_on
from support.hand_made_runs import trained_step
from support.poisoned_ranks import poisoned_run
from support.runs import (
    REPOSITORY,
    run_command,
    steps_of,
    tiny_recipe_content,
    train,
    write_recipe,
)
from support.sink_readers import Drawn, lines_of, newest
from support.waiting import wait_until

from data_prep.errors import UserError
from pretrain.config.load import build_recipe
from pretrain.config.recipe import SINKS
from pretrain.generate import main
from pretrain.metrics.metrics_file import MetricsFile, read_steps
from pretrain.metrics.step_columns import read_columns
from pretrain.metrics.step_record import Sample, SkippedStep, step_of_line
from pretrain.metrics.told import AboutRun, told

PROMPTS = ["The state of the Union", "Fellow citizens,\nwe", "Peace"]
ASKED = ["--log.prompts=" + json.dumps(PROMPTS), "--log.sample_tokens=12"]
# What a step computes, and the same in each run of it.
COMPUTED = ("step", "loss", "gradient_norm", "learning_rate", "val_loss")


def computed(run_dir: Path) -> list[list[Any]]:
    """What a run computed in each step, digit for digit."""
    return [[line.get(name) for name in COMPUTED] for line in lines_of(run_dir)]


def samples_of(run_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """The samples of each step that has some."""
    return {line["step"]: line["samples"] for line in lines_of(run_dir) if "samples" in line}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml")


@pytest.fixture(scope="module")
def whole(recipe: Path, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with samples on two ranks of the deepspeed launcher; what it said lies beside it."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    ended = train(2, recipe, text_data, run_dir, *ASKED)
    run_dir.with_suffix(".log").write_text(ended.stdout + ended.stderr)
    return run_dir


def test_each_validation_has_a_sample_for_each_prompt_in_order(whole: Path) -> None:
    samples = samples_of(whole)
    assert list(samples) == [4, 9, 14, 19] == [line["step"] for line in validated(whole)]
    for of_step in samples.values():
        assert [sample["prompt"] for sample in of_step] == PROMPTS
        assert all(sample["text"] and sample["bits_per_byte"] > 0 for sample in of_step)
    assert samples[4] != samples[19]


def validated(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in lines_of(run_dir) if "val_loss" in line]


def test_the_last_ones_are_what_the_last_checkpoint_says(whole: Path, tmp_path: Path) -> None:
    flags = [f"--prompt={prompt}" for prompt in PROMPTS]
    greedy = ["--temperature", "0", "--max-new-tokens", "12"]
    main(["--run-dir", str(whole), *flags, *greedy, "--output", str(tmp_path / "said.jsonl")])
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    for sample, own in zip(samples_of(whole)[19], said, strict=True):
        assert sample["text"] == own["text"]
        assert sample["bits_per_byte"] == pytest.approx(own["bits_per_byte"], rel=1e-5)


def test_the_log_has_a_short_line_of_each(whole: Path) -> None:
    log = whole.with_suffix(".log").read_text()
    lines = [line for line in log.splitlines() if "sample " in line and "bits/byte" in line]
    assert len(lines) == 4 * len(PROMPTS)
    assert "Fellow citizens,⏎we -> " in log


def test_two_ranks_compute_the_same_bits_with_and_without_samples(
    whole: Path, recipe: Path, text_data: Path, tmp_path: Path
) -> None:
    train_on(2, recipe, text_data, tmp_path / "run")
    assert computed(tmp_path / "run") == computed(whole)
    assert not samples_of(tmp_path / "run")


BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
MASKED = "--intra_document_masking=true"
RECOMPUTED = "--activation_checkpointing.mode=full"


@pytest.mark.parametrize(
    ("ranks", "engine", "flags"),
    [
        (1, {"zero_optimization": {"stage": 0}}, [RECOMPUTED]),
        (2, {"zero_optimization": {"stage": 1}}, [MASKED, "--model.input_embedding=learned"]),
        (2, {"zero_optimization": {"stage": 2}, **BF16}, [MASKED, RECOMPUTED]),
        (1, {"zero_optimization": {"stage": 2}, **BF16}, ["--compile=true"]),
    ],
    ids=["stage 0, recomputed", "stage 1, masked", "stage 2, bf16", "compiled"],
)
def test_no_way_to_train_computes_other_bits_for_samples(
    ranks: int,
    engine: dict[str, Any],
    flags: list[str],
    recipe: Path,
    text_data: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "engine.json").write_text(json.dumps(engine))
    short = ["--validation.every_steps=2", "--stop-at-step", "5", "--log.sample_tokens=6"]
    more = ["--deepspeed-config", str(tmp_path / "engine.json"), *short, *flags]
    train_on(ranks, recipe, text_data, tmp_path / "without", *more)
    output = train_on(ranks, recipe, text_data, tmp_path / "with", ASKED[0], *more)
    assert computed(tmp_path / "with") == computed(tmp_path / "without")
    assert list(samples_of(tmp_path / "with")) == [1, 3, 4]
    assert "compiled its blocks again" not in output


def test_a_run_killed_and_resumed_has_the_same_samples_each_drawn_once(
    whole: Path,
    recipe: Path,
    text_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_dir = tmp_path / "run"
    flags = [*ASKED, f"--log.sinks=[{','.join(SINKS)}]"]
    theirs = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    logs = logs_of(2, run_dir)
    ranks = start_ranks(arguments_of(recipe, text_data, run_dir, *flags), logs, **theirs)
    wait_until(lambda: steps_of(run_dir) >= 12, "12 steps", every_s=0.002)
    for rank in ranks:
        rank.kill()
    assert end_of(ranks, logs).exit_codes == [-signal.SIGKILL] * 2
    assert steps_of(run_dir) < 20
    ended = run_ranks(2, recipe, text_data, run_dir, *flags, **theirs)
    assert ended.exit_codes == [0, 0], ended.output
    assert "continuing from" in ended.output
    assert "warning: log.sinks" not in ended.output

    assert samples_of(run_dir) == samples_of(whole)
    for sink in SINKS:
        expect_samples_drawn_once(newest(sink, run_dir), samples_of(whole))


def expect_samples_drawn_once(drawn: Drawn, samples: dict[int, list[dict[str, Any]]]) -> None:
    """Each sample stands at its step, once, and no other does."""
    for number in range(len(PROMPTS)):
        of_prompt = {step: of_step[number] for step, of_step in samples.items()}
        shown = [
            (step, "\n".join(line.removeprefix("    ") for line in text.split("\n")))
            for step, text in drawn.texts[f"samples/{number}"]
        ]
        assert shown == [
            (step, sample["prompt"] + sample["text"]) for step, sample in of_prompt.items()
        ]
        figures = drawn.figures[f"samples/{number}_bits_per_byte"]
        assert [step for step, _ in figures] == list(of_prompt)


def test_a_skipped_step_that_is_validated_has_them_too(
    recipe: Path, text_data: Path, tmp_path: Path
) -> None:
    ended = poisoned_run(1, "4", recipe, text_data, tmp_path / "run", *ASKED, "--stop-at-step", "6")
    assert ended.exit_codes == [0], ended.output
    line = lines_of(tmp_path / "run")[4]
    assert "skipped" in line
    assert [sample["prompt"] for sample in line["samples"]] == PROMPTS


def test_prompts_may_change_when_a_run_goes_on(
    recipe: Path, text_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    train_on(1, recipe, text_data, run_dir, "--stop-at-step", "5")
    train_on(1, recipe, text_data, run_dir, "--stop-at-step", "10", "--log.prompts=Peace")
    assert {step: len(samples) for step, samples in samples_of(run_dir).items()} == {9: 1}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ('[""]', "log.prompts: prompt 1: '' gives no token"),
        (json.dumps(["a", "word " * 50]), "log.prompts: prompt 2: 'word word word"),
        ("{a: b}", "log.prompts: got {'a': 'b'}; give a list of texts"),
        ("[1984]", "log.prompts: got [1984]; give a list of texts, in quotes"),
    ],
)
def test_prompts_that_can_t_be_continued_are_refused_before_anything_is_written(
    given: str, says: str, recipe: Path, text_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    flags = arguments_of(recipe, text_data, run_dir, f"--log.prompts={given}")
    result = run_command(sys.executable, "-X", "importtime", "-m", "pretrain.train", *flags)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert says in line
    assert "torch.nn" not in result.stderr
    assert not run_dir.exists()


def test_a_data_set_without_its_tokenizer_is_refused(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    ended = run_ranks(1, recipe, tiny_data, tmp_path / "run", *ASKED)
    assert ended.exit_codes == [2]
    assert "tokenizer.json: missing" in ended.output


def test_the_readme_s_keys_are_keys_of_a_recipe() -> None:
    readme = (REPOSITORY / "pretrain" / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## Text that a model writes") :]
    block = section.split("```yaml\n", maxsplit=1)[1].split("```", maxsplit=1)[0]
    recipe = build_recipe(tiny_recipe_content(**yaml.safe_load(block)), "README")
    assert recipe.log.prompts == ("The state of the Union", "Fellow citizens, we")
    assert recipe.log.sample_tokens == 64


# Records


SAMPLES = (
    Sample(prompt="a", text="\u2028\u001b[31m é\n", bits_per_byte=1.25),
    Sample(prompt="b", text="", bits_per_byte=None),
)


def test_a_line_of_samples_reads_back_and_one_without_has_no_key(tmp_path: Path) -> None:
    trained = trained_step(0)
    skipped = SkippedStep(
        step=1, loss=None, gradient_norm=None, learning_rate=0.1, tokens=2, skipped="bad"
    )
    for record in (trained, skipped):
        assert "samples" not in record.to_line()
    records = [replace(record, samples=SAMPLES) for record in (trained, skipped)]
    assert [step_of_line(record.to_line()) for record in records] == records
    file = MetricsFile(tmp_path, 0)
    for record in records:
        file.append(record)
    file.close()
    assert read_steps(tmp_path) == records
    columns = read_columns(tmp_path)
    assert columns.column("loss")[0] == 1.0
    assert columns.skipped == (records[1],)


def test_sinks_are_told_of_samples_each_under_its_number() -> None:
    about = AboutRun(run_dir=Path(), config={}, restarts=frozenset(), bytes_per_token=None)
    shown = told(replace(trained_step(0), samples=SAMPLES), about)
    assert shown.texts == {"samples/0": "a\u2028\u001b[31m é\n", "samples/1": "b"}
    assert shown.figures["samples/0_bits_per_byte"] == 1.25
    assert "samples/1_bits_per_byte" not in shown.figures


def test_damaged_samples_are_refused_by_their_line(tmp_path: Path) -> None:
    line = trained_step(0).to_line() | {"samples": [{"prompt": "a"}]}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl: line 1: damaged"):
        read_columns(tmp_path)

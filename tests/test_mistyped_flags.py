"""A mistyped flag of any command is named, with the one that was meant."""

import sys
from pathlib import Path

import pytest
from support.runs import REPOSITORY, run_command

from data_prep.errors import UserError
from pretrain.run.command_line import build_parser

TRAIN = ["--recipe", "small", "--data-dir", "d", "--run-dir", "r"]


@pytest.mark.parametrize(
    ("command", "flags", "says"),
    [
        (
            "data_prep.build_shards",
            "--mixtrue m --output-dir o",
            "--mixtrue: unknown; did you mean --mixture?",
        ),
        (
            "data_prep.train_tokenizer",
            "--vocab-size 300 --sorce x --output-dir o",
            "--sorce: unknown; did you mean --source?",
        ),
        ("data_prep.verify", "DATASET --repiar", "--repiar: unknown; did you mean --repair?"),
        (
            "data_prep.show",
            "DATASET --train-tokesn 9",
            "--train-tokesn: unknown; did you mean --train-tokens?",
        ),
        (
            "pretrain.train",
            "--recpie small --data-dir d --run-dir r",
            "--recpie: unknown; did you mean --recipe?",
        ),
        ("pretrain.evaluate", "--rundir r", "--rundir: unknown; did you mean --run-dir?"),
        (
            "pretrain.export_hf",
            "--run-dir r --output e",
            "--output: unknown; did you mean --output-dir?",
        ),
        ("pretrain.report", "r --ouput o.html", "--ouput: unknown; did you mean --output?"),
        (
            "pretrain.plan",
            "--recipe small --devcie h100",
            "--devcie: unknown; did you mean --device?",
        ),
        (
            "pretrain.compare",
            "--recipe small --data-dir d --output-dir o --vray seed=1,2",
            "--vray: unknown; did you mean --vary?",
        ),
        (
            "pretrain.import_hf",
            "--form d --run-dir r",
            "--form: unknown; did you mean --from?",
        ),
        (
            "pretrain.generate",
            "--run-dir r --promt x",
            "--promt: unknown; did you mean --prompt?",
        ),
        (
            "pretrain.trace",
            "--run-dirr r --data-dir d --step 0 --row 0",
            "--run-dirr: unknown; did you mean --run-dir?",
        ),
    ],
)
def test_a_mistyped_flag_is_named_with_the_one_that_was_meant(
    command: str, flags: str, says: str, tmp_path: Path
) -> None:
    result = run_command(sys.executable, "-m", command, *flags.split())
    assert result.returncode == 2
    assert result.stderr == f"error: {says}\n"


def test_a_flag_of_the_script_that_starts_runs_too() -> None:
    script = str(REPOSITORY / "launch" / "pretrain.sh")
    result = run_command(script, *TRAIN, "--max-restrats", "3")
    assert result.returncode == 2
    assert "error: --max-restrats: unknown; did you mean --max-restarts?" in result.stderr


@pytest.mark.parametrize(
    ("more", "meant"),
    [
        (["--stop-at-stpe", "5"], "--stop-at-step"),
        (["--stop-at-stpe=5"], "--stop-at-step"),
        (["--qiet"], "--quiet"),
        (["--peak-learning-rat", "3e-4"], "--optimizer.peak_learning_rate=value"),
    ],
)
def test_what_is_neither_flag_nor_key_is_taken_for_the_nearest_of_both(
    more: list[str], meant: str
) -> None:
    with pytest.raises(UserError) as caught:
        build_parser().parse_known_args([*TRAIN, *more])
    name = more[0].partition("=")[0]
    assert str(caught.value) == f"{name}: unknown; did you mean {meant}?"


@pytest.mark.parametrize(
    "key", ["--compile=true", "--engine=zero2_fp32", "--data.stage_dir=x", "--sede=3", "--lr=1"]
)
def test_a_key_of_a_recipe_is_left_to_who_reads_recipes(key: str) -> None:
    _, overrides = build_parser().parse_known_args([*TRAIN, key])
    assert overrides == [key]

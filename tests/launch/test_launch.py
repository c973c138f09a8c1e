"""The launch scripts, as a user calls them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.prep_helpers import source, write_mixture, write_parquet
from support.runs import REPOSITORY, environment, losses, run_command, train, write_recipe

pytest_plugins = ("support.prep_fixtures",)

PRETRAIN = ("launch/pretrain.sh", "--recipe", "quickstart", "--data-dir", "d", "--run-dir", "r")
QUICK_START_STEPS = 128  # enough for all that the report draws: its fit takes 100 after the warm-up
SUMMARY_KEYS = {
    "vocab_size", "parameters", "trainable_input_parameters", "train_tokens", "steps",
    "tokens_per_s", "val_loss", "val_perplexity", "val_bits_per_byte", "gzip_bits_per_byte",
    "xz_bits_per_byte", "dataset_fingerprint", "hf_dir", "gpt_neox_dir", "sample",
}  # fmt: skip


def test_pretrain_prints_the_command_it_runs_and_trains(tiny_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", train_tokens=3 * 6 * 32, engine="zero2_bf16")
    flags = [
        "--recipe",
        str(recipe),
        "--data-dir",
        str(tiny_data),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    result = run_command("launch/pretrain.sh", *flags)
    assert result.returncode == 0, result.stderr
    printed = re.search(r"^\+ (deepspeed .*)$", result.stdout, re.MULTILINE)
    assert printed
    assert "--num_gpus 2" in printed[1]
    assert "--deepspeed-config zero2_fp32" in printed[1]
    train(1, recipe, tiny_data, tmp_path / "one")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_build_shards_prints_the_command_it_runs_and_builds(
    tokenizer_dir: Path, texts: list[str], tmp_path: Path
) -> None:
    write_parquet(tmp_path / "a.parquet", texts)
    mixture = write_mixture(tmp_path, tokenizer_dir, [source("a", "a.parquet")])
    flags = ["--mixture", str(mixture), "--output-dir", str(tmp_path / "out")]
    result = run_command("launch/build_shards.sh", *flags, "--ranks", "2")
    assert result.returncode == 0, result.stderr
    assert "+ mpiexec -n 2 python -m data_prep.build_shards" in result.stdout
    assert json.loads((tmp_path / "out" / "build.json").read_bytes())["ranks"] == 2
    assert "already complete" in run_command("launch/build_shards.sh", *flags).stdout
    assert run_command("launch/build_shards.sh", *flags, "--hostfile", "nowhere").returncode == 2


def test_a_missing_hostfile_is_one_clear_line() -> None:
    result = run_command(*PRETRAIN, "--hostfile", "nowhere")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --hostfile nowhere: no such file")
    assert len(result.stderr.splitlines()) == 1


def test_a_missing_launcher_is_one_clear_line(tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "nproc"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    result = run_command(
        str(REPOSITORY / "launch/build_shards.sh"),
        "--mixture",
        "m",
        "--ranks=2",
        PATH=str(tmp_path),
    )
    assert result.returncode == 2
    assert (
        result.stderr
        == "error: mpiexec: not found; activate the environment that holds the project\n"
    )


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh", "pretrain.sh", "build_shards.sh"])
def test_every_script_has_help(script: str) -> None:
    result = run_command(f"launch/{script}", "--help")
    assert result.returncode == 0
    assert f"launch/{script}" in result.stdout


def quick_start(run_dir: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The whole quick start, in the environment that runs the tests."""
    env = environment(VIRTUAL_ENV=sys.prefix, **variables)
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
        del env[name]
    command = [str(REPOSITORY / "launch" / "quickstart.sh"), str(run_dir)]
    return subprocess.run(
        command, cwd=run_dir.parent, env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quick_start_from_corpus_to_export(tmp_path: Path) -> None:
    """Every stage, in the shorter look that the script offers: more steps only make a better model.
    Begun with STEPS, the same command without it finds what is done.
    """
    first = quick_start(tmp_path / "run", STEPS=str(QUICK_START_STEPS))
    assert first.returncode == 0, first.stdout + first.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["vocab_size"] == 65_536
    assert summary["trainable_input_parameters"] == 0
    assert summary["steps"] == len(losses(tmp_path / "run")) == QUICK_START_STEPS
    assert summary["stopped_at_step"] == QUICK_START_STEPS // 2
    assert summary["sample"].startswith(summary["prompt"])
    assert (
        summary["val_bits_per_byte"] < summary["xz_bits_per_byte"] < summary["gzip_bits_per_byte"]
    )
    for key in ("hf_dir", "gpt_neox_dir"):
        assert Path(summary[key], "model.safetensors").is_file()
    report = Path(summary["report"]).read_text(encoding="utf-8")
    assert first.stdout.rstrip().endswith(summary["report"])
    assert f"{QUICK_START_STEPS} of {QUICK_START_STEPS}" in report
    assert f"went on after step {QUICK_START_STEPS // 2}" in report
    assert "continuing from" in first.stderr

    before = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    second = quick_start(tmp_path / "run")
    assert second.returncode == 0, second.stderr
    assert summary["dataset_fingerprint"] in second.stdout
    assert before == {path: os.stat(path).st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_the_benchmark_of_training_runs() -> None:
    result = run_command(sys.executable, "tests/benchmarks/training_throughput.py", "--quick")
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"engine \(DeepSpeed ZeRO-2\), chunked loss \| [\d,]+ \| \d\.\d\d", result.stdout
    )


@pytest.mark.parametrize(
    ("command", "variables", "line"),
    [
        ([*PRETRAIN, "--ranks", "abc"], {}, "error: argument --ranks: abc: expected a whole"),
        (
            [*PRETRAIN, "--ranks", "0"],
            {},
            "error: argument --ranks: 0: expected a whole number of 1 or more, such as",
        ),
        ([*PRETRAIN, "--max-restarts", "-1"], {}, "error: --max-restarts -1: expected a number, 0"),
        (
            ["launch/pretrain.sh"],
            {},
            "error: the following arguments are required: --recipe, --data-dir, --run-dir",
        ),
        ([*PRETRAIN, "--hostfile", "README.md"], {}, "error: --hostfile README.md: line 3: **Pre"),
        (["launch/quickstart.sh", "/tmp"], {"STEPS": "1"}, "error: STEPS 1: expected"),
        (["launch/quickstart.sh", "--steps", "9"], {}, "error: --steps: not a known flag"),
        (["launch/quickstart.sh", "/tmp", "20"], {}, "error: 20: not known beside the directory"),
        (
            ["launch/quickstart.sh", "/tmp", "--steps=9", "x"],
            {},
            "error: --steps=9 x: not known beside the directory",
        ),
        (
            ["python", "-m", "pretrain", "train", "--recipe"],
            {},
            "error: python -m pretrain train: it only lists the ",
        ),
        (
            ["python", "-m", "data_prep", "verfy"],
            {},
            "error: python -m data_prep verfy: it only lists the commands; did",
        ),
        (["launch/build_shards.sh"], {}, "error: no flags; launch/build_shards.sh --help"),
        (
            ["launch/build_shards.sh", "--mixture", "m", "--hostfile", "README.md"],
            {},
            "error: --hostfile README.md:",
        ),
        (
            [*PRETRAIN, "--hostfile", "README.md", "--ranks=2"],
            {},
            "error: argument --ranks: not allowed with",
        ),
        ([*PRETRAIN, "--ranks"], {}, "error: argument --ranks: expected one argument"),
        ([*PRETRAIN, "--ranks="], {}, "error: argument --ranks: : expected a whole"),
        ([*PRETRAIN, "--hostfile="], {}, "error: --hostfile .: no such file"),
        *(
            (
                ["launch/build_shards.sh", *flags],
                {},
                f"error: {flags[0].removesuffix('=')}: expected a value after it",
            )
            for flags in (["--ranks"], ["--hostfile"], ["--ranks="], ["--hostfile", "", "--seed=1"])
        ),
    ],
)
def test_bad_flags_are_one_clear_line(
    command: list[str], variables: dict[str, str], line: str
) -> None:
    result = run_command(*command, **variables)
    assert result.returncode == 2
    assert result.stderr.startswith(line)
    assert len(result.stderr.splitlines()) == 1


def run_begun_with(run_dir: Path, steps: int) -> Path:
    """A directory in which the quick start began a run of so many steps, as far as its script
    looks.
    """
    run_dir.mkdir()
    recipe = yaml.safe_load(
        (REPOSITORY / "pretrain" / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    )
    content = {**recipe, "train_tokens": steps * recipe["batch"]["global_batch_tokens"]}
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return run_dir


def test_the_quick_start_says_when_other_steps_are_asked_for_than_are_there(tmp_path: Path) -> None:
    run_dir = run_begun_with(tmp_path / "run", 20)
    result = run_command("launch/quickstart.sh", str(run_dir), STEPS="40")
    assert result.returncode == 2
    assert result.stderr == (
        f"error: STEPS=40: the run in {run_dir} has 20 steps; leave STEPS out to go on with it, "
        f"or give another directory\n"
    )
    assert [path.name for path in run_dir.iterdir()] == ["recipe.yaml"]
    (run_dir / "summary.txt").write_text("the page\n")
    for variables in ({}, {"STEPS": ""}, {"STEPS": "20"}):  # what is there is shown
        shown = run_command("launch/quickstart.sh", str(run_dir), **variables)
        assert (shown.returncode, shown.stdout) == (0, "the page\n"), shown.stderr


def test_the_quick_start_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    mixture = tmp_path / "mine" / "corpus" / "mixture.yaml"
    mixture.parent.mkdir(parents=True)
    for own in (file, mixture):
        own.write_text("my own work\n")
    for given, named in (
        (file, file),
        (file / "below", file / "below"),
        (tmp_path / "mine", mixture),
    ):
        result = run_command("launch/quickstart.sh", str(given))
        assert result.returncode == 2
        assert result.stderr.startswith(f"error: {named}: ")
        assert len(result.stderr.splitlines()) == 1
    assert file.read_text() == mixture.read_text() == "my own work\n"
    assert list(mixture.parent.iterdir()) == [mixture]


@pytest.mark.parametrize("package", ["pretrain", "data_prep"])
def test_a_package_lists_its_commands_with_a_line_each(package: str) -> None:
    result = run_command(sys.executable, "-m", package)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    listed = [line.split("  ")[0].strip() for line in lines[:-1]]
    folder = REPOSITORY / package
    main = '\nif __name__ == "__main__":\n    sys.exit('
    ours = [
        path.stem
        for path in sorted(folder.glob("*.py"))
        if main in path.read_text(encoding="utf-8")
    ]
    assert listed == [f"python -m {package}.{name}" for name in ours if name != "__main__"]
    assert len(listed) >= 4
    assert all(len(line.split("  ", 1)[1].strip()) > 10 for line in lines[:-1])
    assert lines[-1].startswith("--help")

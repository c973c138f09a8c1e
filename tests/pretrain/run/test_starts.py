"""What a run records of each start, and what it says of it."""

import json
import shutil
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked_ranks import arguments_of, end_of, logs_of, start_ranks, train_on
from support.runs import REPOSITORY, steps_of, write_recipe
from support.waiting import wait_until

from pretrain.checkpoint.reader import Checkpoint
from pretrain.distributed.world import World
from pretrain.export_hf import main as export
from pretrain.run import starts
from pretrain.run.branch import copy_branch
from pretrain.run.directory import STARTS_NAME
from pretrain.run.starts import Start, append_start, changes, for_card, of_steps, read_starts

WITNESS = REPOSITORY / "tests" / "data" / "witness" / "run"
LINE: dict[str, Any] = {
    "step": 0,
    "time": "t",
    "command": "c",
    "commit": None,
    "ranks": 2,
    "hosts": {"a": 2},
    "devices": {"cpu": 2},
    "cpu_kernels": {"AVX2": 2},
    "threads_per_rank": [1],
    "versions": {"torch": "2", "numpy": "2"},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", train_tokens=10 * 6 * 32)


@pytest.fixture(scope="module")
def run_of_two_starts(
    recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A run of two ranks to step 5, then of one to step 7; and what the second start said."""
    run_dir = tmp_path_factory.mktemp("starts") / "run"
    train_on(2, recipe, tiny_data, run_dir, "--stop-at-step=5")
    return run_dir, train_on(1, recipe, tiny_data, run_dir, "--stop-at-step=7")


def test_each_start_is_a_line_with_what_its_bits_depend_on(
    run_of_two_starts: tuple[Path, str], recipe: Path, tiny_data: Path
) -> None:
    run_dir, _ = run_of_two_starts
    first, second = [json.loads(line) for line in (run_dir / STARTS_NAME).read_text().splitlines()]
    assert (first["step"], second["step"]) == (0, 5)
    assert (first["ranks"], second["ranks"]) == (2, 1)
    assert first["devices"] == {"cpu": 2}
    assert sum(first["hosts"].values()) == 2
    assert first["threads_per_rank"] == [1]
    assert first["versions"]["torch"] == version("torch")
    assert {"python", "deepspeed", "transformers", "numpy", "tablefree"} <= first["versions"].keys()
    flags = f"--recipe {recipe} --data-dir {tiny_data} --run-dir {run_dir}"
    assert first["command"] == f"python -m pretrain.train {flags} --stop-at-step=5"
    assert second["time"] >= first["time"] > "2026"


def test_no_password_of_a_command_is_recorded() -> None:
    alone = World(rank=0, world_size=1, local_rank=0, local_world_size=1)
    of_ranks = [starts.surroundings(torch.device("cpu"))]
    start = starts.describe_start(
        0, ["--x=https://me:hunter2@example.org/a?token=abc"], alone, of_ranks
    )
    assert "hunter2" not in json.dumps(start.to_line())
    assert start.command is not None
    assert "abc" not in start.command


def test_hosts_with_other_versions_are_both_recorded() -> None:
    two = World(rank=0, world_size=2, local_rank=0, local_world_size=1)
    one = starts.surroundings(torch.device("cpu"))
    other = replace(one, host="other", versions={**one.versions, "torch": "1.0"})
    start = starts.describe_start(0, [], two, [one, other])
    assert start.to_line()["versions_by_host"] == {one.host: one.versions, "other": other.versions}
    assert "versions_by_host" not in starts.describe_start(0, [], two, [one, one]).to_line()


def test_a_resumed_run_says_what_changed_in_one_line(run_of_two_starts: tuple[Path, str]) -> None:
    _, said = run_of_two_starts
    (line,) = [line for line in said.splitlines() if "since the start before" in line]
    assert line.startswith(
        "warning: changed since the start before: ranks 2 -> 1, devices 2 x cpu -> 1 x cpu, "
    )


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("ranks", 8, "ranks 2 -> 8"),
        ("commit", "abc, changed", "commit None -> abc, changed"),
        ("threads_per_rank", [1, 4], "threads_per_rank 1 -> 1 or 4"),
        ("devices", {"NVIDIA H200": 2}, "devices 2 x cpu -> 2 x NVIDIA H200"),
        ("cpu_kernels", {"AVX512": 2}, "cpu_kernels 2 x AVX2 -> 2 x AVX512"),
        ("versions", {"torch": "3", "numpy": "2"}, "torch 2 -> 3"),
        ("versions", {"torch": "2", "numpy": "2", "cuda": "13"}, "cuda None -> 13"),
        ("hosts", {"other": 2}, None),
        ("command", "another", None),
        ("time", "later", None),
    ],
)
def test_what_may_change_the_last_digits_is_named_and_nothing_else(
    key: str, value: object, words: str | None
) -> None:
    before = Start.from_line(LINE)
    after = Start.from_line({**LINE, key: value})
    assert changes(before, after) == ([words] if words else [])


def test_a_line_of_an_earlier_version_comes_back_as_it_was() -> None:
    content = (WITNESS / STARTS_NAME).read_bytes()
    (start,) = read_starts(WITNESS)
    assert json.dumps(start.to_line()).encode() + b"\n" == content


@pytest.mark.parametrize(
    "torn", [b'{"step": 9, "ti', b"\0" * 40, b"[1]\n", b"{}\n", b"[" * 100_000 + b"\n", b"\xff\n"]
)
def test_a_torn_or_foreign_line_is_no_start_and_hides_none(torn: bytes, tmp_path: Path) -> None:
    first = Start.from_line(LINE)
    second = replace(first, step=5)
    append_start(tmp_path, first)
    with (tmp_path / STARTS_NAME).open("ab") as file:
        file.write(torn)
    append_start(tmp_path, second)
    assert read_starts(tmp_path) == [first, second]


def test_steps_come_from_the_starts_since_the_run_was_last_begun_anew(tmp_path: Path) -> None:
    steps = [Start.from_line({"step": step}) for step in (0, 0, 5, 5, 10)]
    assert of_steps(steps, 11) == steps[1:]
    assert of_steps(steps, 10) == steps[1:4]
    assert of_steps(steps, 0) == of_steps([], 5) == []


def test_a_branch_has_the_starts_of_the_steps_that_it_takes_over(
    run_of_two_starts: tuple[Path, str], tmp_path: Path
) -> None:
    run_dir, _ = run_of_two_starts
    copy_branch(Checkpoint(run_dir / "checkpoints" / "step-00000005"), tmp_path)
    assert [start.step for start in read_starts(tmp_path)] == [0]
    copy_branch(Checkpoint(run_dir / "checkpoints" / "step-00000007"), tmp_path)
    assert [start.step for start in read_starts(tmp_path)] == [0, 5]
    assert (tmp_path / STARTS_NAME).read_bytes() == (run_dir / STARTS_NAME).read_bytes()


def test_a_branch_keeps_what_a_later_version_told_of_a_start(tmp_path: Path) -> None:
    lines = b'{"step": 0, "told": "later"}\n{"step": 7}\n'
    (tmp_path / STARTS_NAME).write_bytes(lines)
    (tmp_path / "branch").mkdir()
    starts.copy_starts(tmp_path, tmp_path / "branch", 7)
    copied = (tmp_path / "branch" / STARTS_NAME).read_bytes()
    assert copied == b'{"step": 0, "told": "later"}\n'


def test_a_card_shows_the_starts_that_differ_and_no_hosts() -> None:
    one = Start.from_line({**LINE, "hosts": {"secret": 2}})
    others = [replace(one, step=5), replace(one, step=7, ranks=1), replace(one, step=9)]
    shown = for_card([one, *others], 9)
    assert [start.step for start in shown] == [0, 7]
    assert "secret" not in str(shown)
    assert shown[0].devices == "2 x cpu"
    for_card([Start.from_line({"step": 0, "versions": None})], 1)  # of one that lacks everything


def test_an_export_s_card_names_what_the_run_was_made_with(text_run: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(text_run, tmp_path / "run")
    export(["--run-dir", str(run_dir), "--output-dir", str(tmp_path / "export")])
    card = (tmp_path / "export" / "README.md").read_text()
    assert (
        f"| 1 | 1 x cpu | 1 x {torch.backends.cpu.get_cpu_capability()} | 1 | {version('torch')} |"
        in card
    )
    (run_dir / STARTS_NAME).unlink()  # as runs of old have none
    export(["--run-dir", str(run_dir), "--output-dir", str(tmp_path / "of old")])
    assert "CPU kernels" not in (tmp_path / "of old" / "README.md").read_text()


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_that_of_a_checkout_which_has_this_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(
        REPOSITORY / "pretrain", checkout / "pretrain", ignore=shutil.ignore_patterns("__pycache__")
    )
    module = checkout / "pretrain" / "run" / "starts.py"
    monkeypatch.setattr(starts, "PROJECT_DIR", checkout)
    monkeypatch.setattr(starts, "__file__", str(module))
    assert starts.commit() is None  # no checkout
    git(checkout, "init", "--quiet")
    (checkout / "other").write_text("")
    git(checkout, "add", "other")
    git(checkout, "commit", "--quiet", "--message", "somebody's")
    assert starts.commit() is None  # a checkout of something else
    git(checkout, "add", "pretrain")
    git(checkout, "commit", "--quiet", "--message", "ours")
    assert starts.commit() == git(checkout, "rev-parse", "HEAD")
    (checkout / "scratch").write_text("")
    assert starts.commit() == git(checkout, "rev-parse", "HEAD")
    module.write_text(module.read_text() + "\n")
    assert starts.commit() == git(checkout, "rev-parse", "HEAD") + ", changed"


def test_without_git_no_commit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert starts.commit() is None


def test_a_start_after_a_kill_before_the_first_save_says_that_it_begins_again(
    tiny_data: Path, tmp_path: Path
) -> None:
    saves_late = {"every_steps": 10_000}
    recipe = write_recipe(tmp_path / "r.yaml", train_tokens=10_000 * 192, checkpoints=saves_late)
    run_dir = tmp_path / "run"
    logs = logs_of(1, run_dir)
    (rank,) = start_ranks(arguments_of(recipe, tiny_data, run_dir), logs)
    wait_until(lambda: steps_of(run_dir) >= 3, "three steps")
    rank.kill()
    first = end_of([rank], logs).output
    second = train_on(1, recipe, tiny_data, run_dir, "--stop-at-step=1")
    line = f"{run_dir}: no checkpoint yet: begins again from step 0"
    assert line not in first
    assert second.splitlines().count(line) == 1
    assert steps_of(run_dir) == 1

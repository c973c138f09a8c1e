"""Exports that a run makes while it trains: beside its steps, whole or absent, kept as told."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from support.forked_ranks import (
    arguments_of,
    end_of,
    logs_of,
    run_ranks,
    start_ranks,
    train_on,
)
from support.processes import processes_of
from support.runs import losses, write_recipe
from support.waiting import wait_until

from pretrain.checkpoint.layout import saved_steps
from pretrain.config.recipe import CheckpointsRecipe
from pretrain.distributed.world import World
from pretrain.export_hf import main as export_hf
from pretrain.hf.marker import MARKER_NAME, Marker, read_marker
from pretrain.run.exports import exporter as exporter_module
from pretrain.run.exports.exporter import Exporter
from pretrain.run.exports.places import (
    clear_leftovers,
    export_place,
    exports_dir,
    prune_exports,
    steps_without_export,
)
from pretrain.run.exports.process import ExportProcess
from pretrain.run.state import read_state

ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)
EXPORTS = {"keep_last": 1, "export_every_steps": 10}


def recipe_file(home: Path, **checkpoints: Any) -> Path:
    return write_recipe(home / "recipe.yaml", checkpoints={**EXPORTS, **checkpoints})


def names_in(run_dir: Path) -> list[str]:
    """All in the directory of exports, hidden or not."""
    home = exports_dir(run_dir)
    return sorted(os.listdir(home)) if home.is_dir() else []


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# Whole runs


def test_two_ranks_export_beside_their_steps_and_lose_no_bit(
    text_data: Path, tmp_path: Path
) -> None:
    train_on(2, write_recipe(tmp_path / "plain.yaml"), text_data, tmp_path / "plain")
    run_dir = tmp_path / "run"
    said = train_on(2, recipe_file(tmp_path), text_data, run_dir)
    assert losses(run_dir) == losses(tmp_path / "plain")
    assert f"{run_dir}: waiting for the export of step 10 and step 20" in said
    assert names_in(run_dir) == ["step-00000010", "step-00000020"]
    # The checkpoint of the first was kept while it was read, and no longer.
    assert [path.name for path in saved_steps(run_dir)] == ["step-00000020"]
    output = tmp_path / "by hand"
    export_hf(["--run-dir", str(run_dir), "--output-dir", str(output)])
    assert contents(output) == contents(export_place(run_dir, 20))
    marker = read_marker(export_place(run_dir, 10))
    assert marker
    assert (marker.step, marker.architecture) == (10, "tablefree")


def test_a_kill_leaves_no_torn_export_and_the_same_command_makes_it_up(
    text_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    recipe = recipe_file(tmp_path, export_every_steps=20, export_architecture="gpt_neox")
    logs = logs_of(1, run_dir)
    (rank,) = start_ranks(arguments_of(recipe, text_data, run_dir), logs)

    def exporting() -> list[psutil.Process]:
        return processes_of(run_dir, "pretrain.export_hf")

    wait_until(lambda: any(exports_dir(run_dir).glob(".step-*/new/*")), "an export being written")
    (exports,) = exporting()
    assert exports.nice() == 19
    assert Path(f"/proc/{exports.pid}/oom_score_adj").read_text() == "1000\n"
    assert not exports.environ().keys() & {"RANK", "WORLD_SIZE", "MASTER_PORT"}
    wait_until(lambda: read_state(run_dir).status == "done", "the end of training")
    rank.kill()
    rank.join()
    wait_until(lambda: not exporting(), "the end of what the rank had started")
    (left,) = names_in(run_dir)
    assert left.startswith(".step-00000020.")
    # An export that fails is a warning, and the next start tries again.
    tokenizer = run_dir / "tokenizer" / "tokenizer.json"
    whole = tokenizer.read_bytes()
    tokenizer.write_bytes(whole + b" ")
    ended = run_ranks(1, recipe, text_data, run_dir)
    assert ended.exit_codes == [0], ended.output
    assert names_in(run_dir) == []
    (warning,) = [line for line in ended.output.splitlines() if line.startswith("warning: ")]
    assert warning.startswith(f"warning: {export_place(run_dir, 20)}: not exported: ")
    assert "tokenizer" in warning
    tokenizer.write_bytes(whole)
    assert "exported in" in train_on(1, recipe, text_data, run_dir)
    marker = read_marker(export_place(run_dir, 20))
    assert marker
    assert marker.architecture == "gpt_neox"


def test_a_signal_is_held_up_by_no_export(text_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    logs = logs_of(2, run_dir)
    ranks = start_ranks(arguments_of(recipe_file(tmp_path), text_data, run_dir), logs)

    def has_trained() -> bool:
        return logs[0].exists() and "waiting for the export" in logs[0].read_text()

    wait_until(has_trained, "the end of training")
    assert ranks[1].pid
    os.kill(ranks[1].pid, signal.SIGTERM)
    ended = end_of(ranks, logs, timeout_s=60)
    assert ended.exit_codes == [0, 0], ended.output
    assert "not exported yet; the same command does that" in ended.output
    wait_until(lambda: not processes_of(run_dir, "export_hf"), "the end of the export")
    # What it is to be made of is still there.
    assert "step-00000020" in [path.name for path in saved_steps(run_dir)]


# One at a time


class HeldUp:
    """Stands for the process of an export, and ends when it is let go."""

    made: ClassVar[list[int]] = []

    def __init__(self, _: Path, step: int, output: Path, __: CheckpointsRecipe) -> None:
        self.step = step
        self.output = output
        self.made.append(step)

    def why_it_failed(self) -> str | None:
        go_on = self.output.with_name(f"go-on-{self.step}")
        wait_until(go_on.exists, "the test to go on")
        return None

    def end(self) -> None:
        self.output.with_name(f"go-on-{self.step}").touch()


def test_exports_that_take_longer_than_their_interval_wait_one_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporter_module, "ExportProcess", HeldUp)
    HeldUp.made.clear()
    recipe = CheckpointsRecipe(every_steps=1, export_every_steps=2)
    with Exporter(tmp_path, recipe, 100, ALONE) as exporter:
        for step in range(1, 8):
            exporter.saved(step)
        assert exporter.left == [2, 6]
        assert exporter.in_use() == {"step-00000002", "step-00000006"}
        wait_until(lambda: HeldUp.made == [2], "the first export")
        (exports_dir(tmp_path) / "go-on-2").touch()
        wait_until(lambda: HeldUp.made == [2, 6], "the one that waited")
        (exports_dir(tmp_path) / "go-on-6").touch()
        assert exporter.wait(is_told_to_end=lambda: False, note_progress=lambda: None)
        exporter.saved(100)  # the last step, whatever the interval
        assert exporter.left == [100]
    said = capsys.readouterr().err
    assert f"warning: {export_place(tmp_path, 4)}: not made, since step 6 is due" in said
    assert "step 100 not exported yet; the same command does that" in said


# What is missing, and what goes


def mark(run_dir: Path, *steps: int, more: str | None = None) -> None:
    """Directories that are exports, as far as their marker tells."""
    for step in steps:
        place = export_place(run_dir, step)
        place.mkdir(parents=True)
        marker = Marker(
            fingerprint="f", recipe={}, step=step, architecture="a", dtype="d", files={}
        )
        (place / MARKER_NAME).write_bytes(marker.to_bytes())
        if more:
            (place / more).touch()


def test_the_newest_exports_stay_and_those_of_keep_every_and_what_holds_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = CheckpointsRecipe(
        every_steps=10, keep_every=30, export_every_steps=10, export_keep_last=2
    )
    mark(tmp_path, 20, 30, 40, 50, 60, 90)
    mark(tmp_path, 10, more="results.json")
    (exports_dir(tmp_path) / "notes").mkdir()
    prune_exports(export_place(tmp_path, 60), recipe)
    assert names_in(tmp_path) == [
        "notes", "step-00000010", "step-00000030", "step-00000050", "step-00000060",
        "step-00000090",
    ]  # fmt: skip
    assert "step-00000010: kept, since it holds results.json" in capsys.readouterr().err


def test_missing_are_the_exports_of_due_checkpoints_that_would_be_kept(tmp_path: Path) -> None:
    recipe = CheckpointsRecipe(every_steps=5, export_every_steps=10, export_keep_last=2)
    for step in (0, 5, 10, 20, 25, 30, 33, 40):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    mark(tmp_path, 20)
    assert steps_without_export(tmp_path, recipe, 33, 33) == [30, 33]
    assert steps_without_export(tmp_path, recipe, 33, 100) == [30]
    assert steps_without_export(tmp_path, recipe, 40, 100) == [30, 40]


def test_what_kills_left_goes_and_what_was_to_be_replaced_comes_back(tmp_path: Path) -> None:
    home = exports_dir(tmp_path)
    mark(tmp_path, 10, 20)
    shutil.copytree(export_place(tmp_path, 10), home / ".step-00000010.old.0a1b2c3d")
    export_place(tmp_path, 20).rename(home / ".step-00000020.old.0a1b2c3d")
    (home / ".step-00000030.k2j8x0q_" / "new").mkdir(parents=True)
    clear_leftovers(tmp_path)
    assert names_in(tmp_path) == ["step-00000010", "step-00000020"]


def test_an_export_that_could_not_be_started_says_why(tmp_path: Path) -> None:
    recipe = CheckpointsRecipe(every_steps=1, export_every_steps=1)
    process = ExportProcess(tmp_path / "absent", 1, tmp_path / "out", recipe)
    why = process.why_it_failed()
    assert why == f"--run-dir {tmp_path}/absent: no such directory; train first with pretrain.train"

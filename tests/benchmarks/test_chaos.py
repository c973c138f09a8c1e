"""The chaos runner in its short form, and that its checks see what they are for."""

import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from broken_runs import faults
from broken_runs.attempt import Attempt, Pace
from broken_runs.faults import kill_one
from broken_runs.leavings import STATES, line_problems, lines_of, tensor_problems
from broken_runs.leg import Leg
from safetensors.torch import load_file
from support.runs import run_command

from data_prep.files import digest_file
from pretrain.checkpoint.layout import saved_steps
from pretrain.checkpoint.manifest import sidecar_of
from pretrain.checkpoint.reader import Checkpoint, Fragment
from pretrain.checkpoint.saving import write_fragments

pytestmark = pytest.mark.slow

RUNNER = "tests/benchmarks/chaos.py"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a short run of the runner left; its output beside."""
    home = tmp_path_factory.mktemp("chaos") / "home"
    result = run_command(sys.executable, RUNNER, "--quick", "--verbose", "--directory", str(home))
    home.with_name("output").write_text(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    return home


def test_kills_flips_full_disks_and_other_world_sizes_lose_nothing_beyond_the_last_save(
    home: Path,
) -> None:
    output = home.with_name("output").read_text()
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in output.splitlines()
        if "|" in line
    ]
    counts = {
        kind: sum(int(row[2]) for row in rows if row[0] == kind)
        for kind in (row[0] for row in rows[2:])
    }
    disks = 0 if "full disks: skipped" in output else 1
    expected = {
        "whole job": 3,
        "one rank": 3,
        "flipped byte": 1,
        "full disk": disks,
        "other number of ranks": 1,
    }
    assert {kind: counts.get(kind, 0) for kind in expected} == expected
    assert counts["all"] == sum(expected.values())
    assert {row[-1] for row in rows[2:]} == {"0"}  # unreadable states
    assert int(re.findall(r"(\d+) of 6 kills .* fell within a save", output)[0]) >= 1
    assert output.count("are bitwise those of the unbroken run; 0 problems") == 1 + disks
    assert "PROBLEM" not in output


def leg_of(home: Path, tmp_path: Path) -> Leg:
    """The run that was killed, as it ended, in a directory of its own."""
    shutil.copytree(home / "kills" / "run", tmp_path / "run")
    reference = lines_of(home / "unbroken" / "run")
    leg = Leg(
        name="kills", launcher="forked", flags=[], run_dir=tmp_path / "run", logs=tmp_path, ranks=2,
        reference=reference, pace=Pace(), sample=random.Random(1), verbose=False,
    )  # fmt: skip
    leg.taken = Checkpoint(saved_steps(leg.run_dir)[0])
    return leg


class Sleepers:
    """A job whose ranks do nothing, and notice nothing."""

    has_launcher = True

    def __init__(self, number: int) -> None:
        self.processes = [subprocess.Popen(["sleep", "60"]) for _ in range(number)]

    def pids(self) -> list[int]:
        return [process.pid for process in self.processes if process.poll() is None]

    ranks = pids

    def is_running(self) -> bool:
        return bool(self.pids())

    def ended_well(self) -> bool:
        return False

    def codes(self) -> str:
        return ""

    def said(self) -> str:
        return "nothing"


def test_a_rank_that_outlives_another_is_a_problem(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faults, "SURVIVORS_S", 0.3)
    leg = leg_of(home, tmp_path)
    job = Sleepers(2)
    kill_one(leg, Attempt(lambda: job, leg.run_dir, leg.pace))
    assert [process.wait() for process in job.processes] == [-9, -9]
    (problem,) = leg.problems
    assert re.search(r"after rank \d was killed still there: \[\d+\]", problem)
    assert problem in capsys.readouterr().out


def looked_at(leg: Leg) -> list[str]:
    """What is found wrong with a run as it lies there."""
    leg.look(Attempt(lambda: Sleepers(0), leg.run_dir, leg.pace))
    return leg.problems


def test_a_run_as_it_ended_has_no_problems(home: Path, tmp_path: Path) -> None:
    leg = leg_of(home, tmp_path)
    leg.note_published()
    assert looked_at(leg) == []
    leg.conclude(Checkpoint(saved_steps(home / "unbroken" / "run")[0]))
    assert leg.problems == []


def test_a_checkpoint_that_is_gone_or_cannot_be_read_is_a_problem(
    home: Path, tmp_path: Path
) -> None:
    gone, unreadable, none = (
        leg_of(home, tmp_path / name) for name in ("gone", "unreadable", "none")
    )
    for leg in (gone, unreadable, none):
        leg.note_published()
    shutil.rmtree(saved_steps(gone.run_dir)[0])
    assert any(
        "had been saved, and the newest good checkpoint is" in problem
        for problem in looked_at(gone)
    )
    next(saved_steps(unreadable.run_dir)[0].glob("*.safetensors")).write_bytes(b"")
    assert any("newest good checkpoint" in problem for problem in looked_at(unreadable))
    shutil.rmtree(none.run_dir / "checkpoints")
    assert looked_at(none)


def test_a_kill_before_the_first_pointer_is_no_problem_and_a_pointer_lost_later_is_one(
    home: Path, tmp_path: Path
) -> None:
    first, later = (leg_of(home, tmp_path / name) for name in ("first", "later"))
    for leg in (first, later):
        (leg.run_dir / "checkpoints" / "latest").unlink()
    for older in saved_steps(first.run_dir)[1:]:
        shutil.rmtree(older)
    assert looked_at(first) == []
    assert any(
        "latest: missing (removed, or a kill came before" in problem for problem in looked_at(later)
    )


def test_a_line_that_differs_in_one_bit_is_missing_or_twice_there_is_a_problem(
    home: Path, tmp_path: Path
) -> None:
    reference = lines_of(home / "unbroken" / "run")
    assert line_problems(reference, reference) == []
    changed = [
        {**line, "loss": line["loss"] * (1 + 2**-52)} if line["step"] == 7 else line
        for line in reference
    ]
    (problem,) = line_problems(changed, reference)
    assert problem.startswith("step 7: loss ")
    assert line_problems(changed, reference, 1e-4) == []
    assert line_problems(reference[:3] + reference[4:], reference)
    assert line_problems(reference[:4] + reference[3:], reference)
    leg = leg_of(home, tmp_path)
    metrics = leg.run_dir / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in changed))
    assert "step 7: loss " in looked_at(leg)[0]


def test_a_tensor_that_differs_in_one_bit_is_a_problem(home: Path, tmp_path: Path) -> None:
    leg = leg_of(home, tmp_path)
    expected = Checkpoint(saved_steps(home / "unbroken" / "run")[0])
    path = saved_steps(leg.run_dir)[0]
    manifest = json.loads((path / "manifest.json").read_text())
    entry = manifest["files"][0]
    # not mapped
    tensors = {key: values.clone() for key, values in load_file(path / entry["name"]).items()}
    name = next(iter(entry["fragments"]))
    tensors[f"{name}/exp_avg_sq"].view(torch.int32)[-1] ^= 1
    fragments = [
        Fragment(name=n, start=first, states={state: tensors[f"{n}/{state}"] for state in STATES})
        for n, (first, _) in entry["fragments"].items()
    ]
    manifest["files"][0] = asdict(write_fragments(path / entry["name"], fragments))
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "manifest.json.xxh3_128").write_bytes(sidecar_of(path))
    assert digest_file(path / entry["name"]) != entry["xxh3_128"]
    assert tensor_problems(Checkpoint(path), expected) == [f"{path}: {name}/exp_avg_sq differs"]

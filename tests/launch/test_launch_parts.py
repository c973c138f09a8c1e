"""What the supervisor is made of: commands of a start, signals, how a run stands."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.commands import SAME_SIGNAL_S
from launch.hosts import HERE, Slots
from launch.launchers import Start, command_of
from launch.outcome import Standing, describe_failure, newest_checkpoint, standing
from launch.processes import Signals
from launch.supervise import Supervisor, parse
from pretrain.run.state import RunState

REQUIRED = ["--recipe", "r", "--data-dir", "d", "--run-dir", "runs/a"]


def start_of(slots: Slots, hostfile: Path | None = None, has_gpus: bool = False) -> Start:
    return Start(
        slots=slots, port="29500", hostfile=hostfile, has_gpus=has_gpus, trainer_flags=REQUIRED
    )


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "PDSH_SSH_ARGS_APPEND"):
        monkeypatch.delenv(name, raising=False)


def test_a_start_on_this_machine_shares_its_cores_among_the_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    words, variables = command_of(start_of({HERE: 3}))
    assert words == [
        *["deepspeed", "--quiet", "--master_port", "29500", "--num_gpus", "3"],
        *["--module", "pretrain.train", *REQUIRED],
    ]
    assert variables == {"OMP_NUM_THREADS": "2", "DS_ACCELERATOR": "cpu"}
    assert command_of(start_of({HERE: 16}, has_gpus=True)).variables == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert command_of(start_of({HERE: 3})).variables["OMP_NUM_THREADS"] == "5"


def test_a_start_on_hosts_has_a_hostfile_and_ssh_that_notices_a_silent_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = start_of({"node1": 8}, Path("hosts"))
    words, variables = command_of(start)
    assert words[:7] == [
        *["deepspeed", "--quiet", "--master_port", "29500"],
        *["--hostfile", "hosts", "--force_multi"],
    ]
    assert variables == {"PDSH_SSH_ARGS_APPEND": "-tt -o ServerAliveInterval=5 "}
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-p 2222")
    assert command_of(start).variables["PDSH_SSH_ARGS_APPEND"].endswith("=5 -p 2222")


def test_hosts_that_are_left_stand_in_a_hostfile_of_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    required = ["--recipe", "r", "--data-dir", "d", "--run-dir", str(run_dir)]
    job = Supervisor(parse([*required, "--hostfile", "hosts", "--seed=2"]))
    asked = {"node1": 2, "node2": 2}
    assert "hosts" in job.command(asked, asked).words
    assert not (run_dir / "hostfile").exists()
    words = job.command(asked, {"node2": 1}).words
    assert str(run_dir / "hostfile") in words
    assert (run_dir / "hostfile").read_text() == "node2 slots=1\n"
    assert words[-7:] == [*required, "--seed=2"]
    assert words[words.index("--master_port") + 1] == job.ports[-1]
    assert len(set(job.ports)) == 2


def test_a_signal_again_is_urgent_unless_it_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.0 + SAME_SIGNAL_S / 2, 100.0 + SAME_SIGNAL_S])
    monkeypatch.setattr("launch.processes.time.monotonic", lambda: next(clock))
    signals = Signals()
    assert not signals.first
    assert not signals.are_urgent
    signals.note(signal.SIGTERM, None)
    signals.note(signal.SIGINT, None)
    assert not signals.are_urgent
    signals.note(signal.SIGINT, None)
    assert signals.are_urgent
    assert signals.first == signal.SIGTERM


def test_how_a_run_stands_is_read_from_whatever_is_there(tmp_path: Path) -> None:
    nothing = standing(tmp_path)
    assert nothing == Standing(state=RunState())
    assert nothing.status == "unknown"
    (tmp_path / "state.json").write_text(json.dumps({"status": "running", "began": 1}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"st')
    begun = standing(tmp_path)
    assert (begun.status, begun.steps, begun.starts) == ("running", 2, 0)
    assert begun.has_begun_since(nothing)
    assert not begun.has_trained_since(nothing)
    (tmp_path / "starts.jsonl").write_text("{}\n")
    assert standing(tmp_path).has_trained_since(nothing)
    assert not standing(tmp_path).has_trained_since(begun)
    for damaged in ("[1", "7", "[" * 10**5, "\0"):
        (tmp_path / "state.json").write_text(damaged)
        assert standing(tmp_path).status == "unknown"


def test_the_newest_checkpoint_is_that_of_most_steps(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == "step 0"
    for name in (
        "step-99999999",
        "step-100000000",
        "step-00000005",
        "step-x",
        "step-200000000.tmp",
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == "step-100000000"


def test_a_failure_of_an_earlier_start_is_not_taken_for_this_one_s(tmp_path: Path) -> None:
    failed = Standing(state=RunState(status="failed", reason="a rank\nis gone", began=1))
    again = Standing(state=replace(failed.state, began=2))
    assert describe_failure(1, failed, again, tmp_path) == "a rank is gone"
    assert describe_failure(1, failed, failed, tmp_path) == (
        "it ended before training (the launcher's exit code 1)"
    )

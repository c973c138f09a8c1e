"""What a start under Slurm is made of: its command, its ranks, and whether its job is queued again.

With the real Slurm: test_pretrain_slurm.py.
"""

import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.runs import tiny_recipe_content

from data_prep.errors import UserError
from launch.hosts import Slots
from launch.launchers import Start, command_of
from launch.outcome import Standing
from launch.requeue import SlurmJob, SlurmStart, is_warned, read_start, write_start
from launch.slurm import Allocation, JobState, find_allocation, ranks_asked_for
from pretrain.config.load import build_recipe
from pretrain.run.state import RunState

ALLOCATION = Allocation(job="12", restarts=1, here="n1", ranks_of=None)
AT_WORK = JobState(state="RUNNING", restarts=1, is_preempted=False, nodes="n[1-2]")


def test_the_ranks_of_a_start_stand_node_by_node_in_the_command_of_srun() -> None:
    start = Start(
        slots={"n1": 2, "n2": 1},
        port="29500",
        hostfile=None,
        is_allocated=True,
        has_gpus=False,
        trainer_flags=["--seed=2"],
    )
    words, variables = command_of(start)
    assert words[0] == "srun"
    assert {"--nodes=2", "--ntasks=3", "--nodelist=n1,n1,n2"} < set(words)
    assert "--export=ALL,MASTER_PORT=29500" in words
    assert words[-5:] == [sys.executable, "-u", "-m", "pretrain.train", "--seed=2"]
    assert variables == {"DS_ACCELERATOR": "cpu"}
    assert "--gpu-bind=none" not in words
    with_gpus = command_of(replace(start, has_gpus=True))
    assert "--gpu-bind=none" in with_gpus.words
    assert with_gpus.variables == {}


@pytest.mark.parametrize(
    ("gpus", "windows", "slots"),
    [
        ({"n1": 8, "n2": 8}, 64, {"n1": 8, "n2": 8}),
        ({"n1": 8, "n2": 0}, 64, {"n1": 8}),  # a node whose GPUs are gone
        ({"n1": 0, "n2": 0}, 8, {"n1": 2, "n2": 2}),
        ({"n1": 0, "n2": 0}, 6, {"n1": 1, "n2": 1}),
    ],
)
def test_without_a_wish_nodes_have_as_many_ranks_as_gpus_or_as_divide_a_step(
    gpus: Slots, windows: int, slots: Slots
) -> None:
    batch = {"global_batch_tokens": windows * 32}
    content = tiny_recipe_content(batch=batch, train_tokens=10 * windows * 32)
    recipe = build_recipe(content, "a test")
    assert ALLOCATION.slots(gpus, recipe) == slots
    asked = replace(ALLOCATION, ranks_of={"n1": 3, "n2": 4})
    assert asked.slots({"n2": 0}, recipe) == {"n2": 4}


def test_only_a_number_of_tasks_that_was_asked_for_is_a_wish(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "64(x2)")  # the cores
    assert ranks_asked_for(["n1", "n2"]) is None
    monkeypatch.setenv("SLURM_NTASKS", "5")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2(x2),1")
    assert ranks_asked_for(["a", "b", "c"]) == {"a": 2, "b": 2, "c": 1}


def test_an_allocation_without_slurm_s_commands_is_one_machine_or_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert find_allocation(must_start=True) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    with pytest.raises(UserError, match=r"srun: not found, which starts ranks on n\[1-2\]"):
        find_allocation(must_start=True)
    assert find_allocation(must_start=False) is None
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert find_allocation(must_start=True) is None


def test_a_job_is_lost_once_slurm_ends_it_or_began_it_anew() -> None:
    assert not ALLOCATION.is_lost(AT_WORK)
    assert not ALLOCATION.is_lost(replace(AT_WORK, state="SIGNALING"))
    assert not ALLOCATION.is_lost(replace(AT_WORK, state=""))  # a controller that is away
    assert ALLOCATION.is_lost(replace(AT_WORK, state="PENDING"))
    assert ALLOCATION.is_lost(replace(AT_WORK, restarts=2))


def test_only_the_end_of_its_time_and_preemption_have_a_job_queued_again() -> None:
    stopped = Standing(state=RunState(status="preempted", reason="stopped, as SIGTERM asked"))
    warned = Standing(state=replace(stopped.state, reason="stopped at step 5, as SIGUSR1 asked"))
    assert is_warned(signal.SIGUSR1, stopped, AT_WORK)
    assert is_warned(0, warned, AT_WORK)  # the ranks alone were
    assert is_warned(0, stopped, replace(AT_WORK, is_preempted=True))
    assert not is_warned(0, stopped, AT_WORK)
    assert not is_warned(signal.SIGTERM, warned, AT_WORK)


def test_a_job_begun_anew_knows_the_ports_of_its_earlier_ranks_and_no_other_s(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    job = SlurmJob(allocation=ALLOCATION, run_dir=run_dir, may_requeue=True, saved_step=0)
    assert job.earlier_ports() == []
    job.note_ports(["29500", "29501"])
    assert job.earlier_ports() == ["29500", "29501"]
    write_start(run_dir, SlurmStart(job="13", ports=("1",)))
    assert job.earlier_ports() == []
    for damaged in ("", "[]", '{"job": 12, "ports": ["1|2"]}', '{"job": "12"}', "[" * 10**5):
        (run_dir / "slurm.json").write_text(damaged)
        assert read_start(run_dir) is None

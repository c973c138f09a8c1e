"""Ranks that srun starts on two nodes of the real Slurm, and commands typed in a step of it."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.forked_ranks import train_on
from support.processes import processes_of
from support.runs import losses, steps_of, train, write_recipe
from support.slurm import Slurm, slurm
from support.terminals import Screen, running_on, screen
from support.waiting import wait_until

from pretrain.run.state import read_state

STEPS = 4
TOKENS_OF_STEP = 4 * 32
WHO = (
    "import os; from pretrain.distributed.world import world_from_environment as world; "
    "from data_prep.building.ranks import connect; "
    "print(f'rank {world().rank} of {world().world_size},', end=' '); "
    "print('builds alone' if connect()[0].size == 1 else 'builds with others')"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm") / "run") as started:
        yield started


def recipe_of(path: Path, steps: int) -> Path:
    """Of steps that 4 ranks can share."""
    batch = {"global_batch_tokens": TOKENS_OF_STEP}
    return write_recipe(path, batch=batch, train_tokens=steps * TOKENS_OF_STEP)


def flags_of(recipe: Path, data: Path, run_dir: Path) -> list[str]:
    return ["--recipe", str(recipe), "--data-dir", str(data), "--run-dir", str(run_dir)]


@pytest.mark.slow
def test_two_nodes_of_one_rank_compute_what_deepspeed_s_two_ranks_do(
    cluster: Slurm, tiny_data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path / "recipe.yaml", STEPS)
    flags = flags_of(recipe, tiny_data, tmp_path / "srun")
    words = (
        "--nodes=2",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
        "python",
        "-m",
        "pretrain.train",
    )
    result = cluster.srun(*words, *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    train(2, recipe, tiny_data, tmp_path / "deepspeed")
    assert steps_of(tmp_path / "srun") == STEPS
    assert losses(tmp_path / "srun") == losses(tmp_path / "deepspeed")


@pytest.mark.slow
def test_deepspeed_s_own_launcher_for_slurm_starts_two_nodes_of_two_ranks(
    cluster: Slurm, tiny_data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path / "recipe.yaml", STEPS)
    hosts = tmp_path / "hosts"
    hosts.write_text("n1 slots=2\nn2 slots=2\n")
    launcher = ("deepspeed", "--launcher", "slurm", "--hostfile", str(hosts), "--no_ssh_check")
    meeting = ("--master_addr", "127.0.0.1", "--num_nodes", "2", "pretrain/train.py")
    result = cluster.command(*launcher, *meeting, *flags_of(recipe, tiny_data, tmp_path / "run"))
    assert result.returncode == 0, result.stdout + result.stderr
    train_on(4, recipe, tiny_data, tmp_path / "forked")
    assert losses(tmp_path / "run") == losses(tmp_path / "forked")


@pytest.mark.slow
def test_slurm_s_warning_saves_and_when_a_rank_dies_the_other_ends_and_srun_fails(
    cluster: Slurm, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    recipe = recipe_of(tmp_path / "recipe.yaml", 100_000)
    words = ("srun", "--job-name", tmp_path.name, "--nodes=2", "--ntasks=2", "--unbuffered")
    command = (*words, "python", "-m", "pretrain.train", *flags_of(recipe, tiny_data, run_dir))

    def start() -> subprocess.Popen[bytes]:
        began_at = steps_of(run_dir)
        job = cluster.start(*command, log=tmp_path / "log")
        wait_until(lambda: steps_of(run_dir) > began_at, "a step", job=job, log=tmp_path / "log")
        return job

    with start() as first:
        cluster.scancel("--signal=USR1", "--name", tmp_path.name)
        assert first.wait(60) == 0, (tmp_path / "log").read_text()
    state = read_state(run_dir)
    assert state.status == "preempted"
    assert "SIGUSR1" in str(state.reason)

    with start() as second:
        ranks = processes_of(run_dir, "^[^ ]*python")
        of_rank = {rank.environ()["SLURM_PROCID"]: rank for rank in ranks}
        of_rank["1"].send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        assert second.wait(60) not in (0, 2)
        assert time.monotonic() - killed_at < 10
    assert read_state(run_dir).status == "failed"
    assert "rank 1" in str(read_state(run_dir).reason)


# Who is a rank


@pytest.mark.parametrize(
    "command",
    [
        ["bash", "-c", 'python -c "$WHO"; true'],
        ["sh", "-c", 'set -m; timeout 60 python -c "$WHO"; true'],
        ["--mpi=pmi2", "bash", "-c", 'python -c "$WHO"; true'],
    ],
)
def test_what_a_task_s_script_starts_is_a_rank(cluster: Slurm, command: list[str]) -> None:
    who = WHO.split(" from data_prep")[0] + " print(world().rank, world().world_size)"
    result = cluster.srun("--nodes=2", "--ntasks=3", *command, WHO=who)
    assert sorted(result.stdout.split("\n")) == ["", "0 3", "1 3", "2 3"], result.stderr


def test_what_a_job_that_was_submitted_within_a_step_starts_is_alone(
    cluster: Slurm, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    script = tmp_path / "job.sh"
    script.write_text('#!/bin/sh\nenv | grep SLURM_STEP_NUM_TASKS\npython -c "$WHO"\n')
    submit = f"[ $SLURM_PROCID != 0 ] || sbatch --parsable --output {log} {script}"
    result = cluster.srun("--ntasks=2", "sh", "-c", submit, WHO=WHO)
    cluster.wait_for(result.stdout.strip(), "COMPLETED", "FAILED", log=log)
    assert log.read_text() == "SLURM_STEP_NUM_TASKS=2\nrank 0 of 1, builds alone\n"


@pytest.mark.parametrize("mpi", ["none", "pmi2"])
def test_what_is_typed_in_a_step_s_terminal_is_alone(cluster: Slurm, mpi: str) -> None:
    variables = {"SLURM_CONF": cluster.environment["SLURM_CONF"], "WHO": WHO}
    words = ["srun", "--ntasks=2", f"--mpi={mpi}", "--pty", "bash", "--norc", "-i"]
    with screen(120, 24) as there, running_on(there, words, **variables) as shell:
        there.wait_for(lambda rows: any(row.endswith(("$", "#")) for row in rows), "a prompt")
        type_in(there, 'echo "tasks: $SLURM_STEP_NUM_TASKS"; python -c "$WHO"; exit')
        there.wait_for(lambda rows: any(row.startswith("rank ") for row in rows), "an answer")
        assert "tasks: 2" in there.rows()
        assert "rank 0 of 1, builds alone" in there.rows()
        shell.wait(30)


def type_in(there: Screen, line: str) -> None:
    os.write(there.main, f"{line}\n".encode())

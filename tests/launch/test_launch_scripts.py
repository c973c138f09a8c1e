"""What `python -m launch` lists, and the shell programs of launch/shell by themselves."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from support.runs import REPOSITORY, environment, run_command

SHELL = REPOSITORY / "launch" / "shell"


def test_launch_lists_its_scripts_with_their_paths(tmp_path: Path) -> None:
    result = run_command(sys.executable, "-m", "launch", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    *lines, last = result.stdout.splitlines()
    listed = {Path(re.split(r" {2,}", line)[0].removeprefix("sbatch ")) for line in lines}
    folder = REPOSITORY / "launch"
    assert listed == {*folder.glob("*.sh"), *folder.glob("*.slurm")}
    assert all(len(re.split(r" {2,}", line)[1]) > 10 for line in lines)
    assert last.startswith("--help")


def test_what_is_no_script_is_one_clear_line() -> None:
    result = run_command(sys.executable, "-m", "launch", "pretrain")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: python -m launch pretrain: it only lists the scripts; did you mean pretrain.sh?\n"
    )


def test_the_supervisor_runs_by_path_from_any_directory(tmp_path: Path) -> None:
    env = environment()
    del env["PYTHONPATH"]
    script = str(REPOSITORY / "launch" / "supervise.py")
    result = subprocess.run(
        [sys.executable, script, "--help"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Keeps a training run going" in result.stdout


def test_what_is_guarded_ends_with_its_pipe_and_so_does_all_that_it_started(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time; subprocess.Popen(['sleep', '600']); "
        "print('up', sys.stdin.read(), flush=True); time.sleep(600)"
    )
    guarded = subprocess.Popen(
        ["sh", str(SHELL / "guarded.sh"), sys.executable, "-c", program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert guarded.stdout
    assert guarded.stdin
    assert guarded.stdout.readline() == b"up \n"  # it reads nothing of the pipe
    assert guarded.poll() is None
    guarded.stdin.close()
    assert guarded.wait(10) == -signal.SIGKILL
    assert guarded.stdout.read() == b""  # nobody holds the other end: the sleep is gone too


def signal_ranks(ports: str, number: int) -> list[int]:
    """Process ids of those who got the signal."""
    command = ["sh", str(SHELL / "signal_ranks.sh"), ports, str(number)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return [int(line) for line in result.stdout.split()]


def stand_in(*words: str, **variables: str) -> "subprocess.Popen[bytes]":
    """A process with such a command line and environment."""
    command = [sys.executable, "-c", "import time; time.sleep(600)", *words]
    return subprocess.Popen(command, env={**os.environ, **variables})


def test_only_ranks_of_a_job_are_signalled_and_launchers_of_its_nodes_killed() -> None:
    ours = {"MASTER_PORT": "1"}
    job = [stand_in("--local_rank=0", **ours), stand_in("--local_rank=1", MASTER_PORT="2")]
    of_srun = stand_in("pretrain.train", **ours)
    launcher = stand_in("--master_port=1", "pretrain.train", **ours)
    others = [
        stand_in("--local_rank=0", MASTER_PORT="11"),  # of another job
        stand_in("compile", **ours),  # a helper that a rank has started
        stand_in("--master_port=11"),
        stand_in("srun", "--export=ALL,MASTER_PORT=1", "pretrain.train"),
    ]
    started = [*job, of_srun, launcher, *others]
    try:
        assert sorted(signal_ranks("1|2", 0)) == sorted(rank.pid for rank in [*job, of_srun])
        assert all(process.poll() is None for process in started)
        assert set(signal_ranks("1", signal.SIGTERM)) == {job[0].pid, of_srun.pid}
        assert job[0].wait(10) == of_srun.wait(10) == -signal.SIGTERM
        assert launcher.poll() is None
        assert signal_ranks("1|2", signal.SIGKILL) == [job[1].pid]
        assert launcher.wait(10) == job[1].wait(10) == -signal.SIGKILL
        assert signal_ranks("1|2", 0) == []
        assert all(process.poll() is None for process in others)
    finally:
        for process in started:
            process.kill()
            process.wait()

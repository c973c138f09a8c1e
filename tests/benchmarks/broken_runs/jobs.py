"""Starting, watching and killing a run of the training command.

A job is a set of real processes: ranks forked from a process that has imported the trainer, or
launch/pretrain.sh with all that it starts.
"""

import os
import signal
import subprocess
from pathlib import Path
from typing import Protocol

import psutil
from support.forked_ranks import fork_server, start_ranks
from support.runs import REPOSITORY, environment
from support.waiting import came_true

POLL_S = 0.001  # how often is looked: saves take milliseconds, and faults are to fall into them


class Job(Protocol):
    """What the ways of starting the command have in common."""

    has_launcher: bool  # something that ends the other ranks when one has died before they met

    def pids(self) -> list[int]:
        """All processes that run."""

    def ranks(self) -> list[int]:
        """The processes of the ranks that run, rank 0 first."""

    def is_running(self) -> bool:
        """Whether the job has not come to its end."""

    def ended_well(self) -> bool:
        """Whether it came to a good end."""

    def codes(self) -> str:
        """How its processes ended."""

    def said(self) -> str:
        """All that it printed."""


class ForkedJob:
    """Ranks forked from a process that has imported the trainer; no launcher looks after them."""

    has_launcher = False

    def __init__(self, flags: list[str], ranks: int, home: Path) -> None:
        self.logs = [home / f"rank-{rank}.log" for rank in range(ranks)]
        for log in self.logs:
            log.write_text("")
        self.processes = start_ranks(flags, self.logs)

    def pids(self) -> list[int]:
        """All processes that run."""
        return [process.pid for process in self.processes if process.pid and process.is_alive()]

    ranks = pids

    def is_running(self) -> bool:
        """Whether the job has not come to its end."""
        return bool(self.pids())

    def ended_well(self) -> bool:
        """Whether it came to a good end."""
        return all(process.exitcode == 0 for process in self.processes)

    def codes(self) -> str:
        """How its processes ended."""
        return f"exit codes {[process.exitcode for process in self.processes]}"

    def said(self) -> str:
        """All that it printed."""
        return "".join(log.read_text(errors="replace") for log in self.logs)


def warm_up() -> None:
    """Have the process from which ranks are forked import all that it imports."""
    process = fork_server().Process(target=os.getpid)
    process.start()
    process.join()


class LaunchedJob:
    """launch/pretrain.sh, the deepspeed launcher and its ranks."""

    has_launcher = True

    def __init__(self, flags: list[str], ranks: int, home: Path) -> None:
        self.log = home / "launcher.log"
        command = [str(REPOSITORY / "launch" / "pretrain.sh"), *flags, "--ranks", str(ranks)]
        with self.log.open("w") as output:
            self.script = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment(),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def pids(self) -> list[int]:
        """All processes that run."""
        if self.script.poll() is not None:
            return []
        return [
            self.script.pid,
            *(child.pid for child in psutil.Process(self.script.pid).children(recursive=True)),
        ]

    def ranks(self) -> list[int]:
        """The processes of the ranks that run, rank 0 first."""
        found = {}
        for pid in self.pids():
            try:
                found[int(psutil.Process(pid).environ()["RANK"])] = pid
            except (psutil.Error, KeyError):  # it has ended meanwhile, or is none
                continue
        return [found[rank] for rank in sorted(found)]

    def is_running(self) -> bool:
        """Whether the job has not come to its end."""
        return self.script.poll() is None

    def ended_well(self) -> bool:
        """Whether it came to a good end."""
        return self.script.returncode == 0

    def codes(self) -> str:
        """How its processes ended."""
        return f"exit code {self.script.returncode}"

    def said(self) -> str:
        """All that it printed."""
        return self.log.read_text(errors="replace")


LAUNCHERS: dict[str, type[ForkedJob] | type[LaunchedJob]] = {
    "forked": ForkedJob,
    "pretrain": LaunchedJob,
}


def exists(pid: int) -> bool:
    """Whether a process runs, and is not just waiting to be reaped."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def send(pids: list[int], number: int) -> None:
    """A signal to those that still run."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def kill_job(job: Job) -> None:
    """SIGKILL for every process; stopped first, so that none starts another meanwhile."""
    stopped: list[int] = []
    while new := [pid for pid in job.pids() if pid not in stopped]:
        send(new, signal.SIGSTOP)
        stopped += new
    send(stopped, signal.SIGKILL)
    if not came_true(lambda: not any(map(exists, stopped)), 30.0, POLL_S):
        raise RuntimeError(f"killed processes that do not go: {stopped}")
    came_true(lambda: not job.is_running(), 5.0, POLL_S)

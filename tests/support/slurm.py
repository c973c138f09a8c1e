"""A Slurm of two nodes on this machine, the real one, for tests.

    with slurm(directory) as cluster:
        assert cluster.srun("--nodes=2", "hostname").returncode == 0

Controller, nodes and jobs live in a process namespace whose first process reads a pipe of the test
process: when that ends, be it killed, the kernel ends them all. Each start has ports of its own,
and takes about 3 s. The nodes n1 and n2 have 4 CPUs each, whatever there is here; file system and
network are this machine's, and their names resolve to nothing.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from support.runs import REPOSITORY, environment
from support.waiting import wait_until

CONFIGURATION = Path(__file__).with_name("slurm.conf")
BOOT = Path(__file__).with_name("slurm.sh")
NEEDED = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "unshare")
PACKAGES = "slurm-wlm slurm-wlm-basic-plugins"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NODES = ("n1", "n2")
NEW_NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def lacking() -> str:
    """What keeps this machine from running a Slurm; empty if nothing does."""
    if absent := [name for name in NEEDED if not shutil.which(name, path=SYSTEM_PATH)]:
        return f"lacks {', '.join(absent)} (Debian packages {PACKAGES})"
    probe = subprocess.run([*NEW_NAMESPACES, "true"], capture_output=True, check=False)
    return "must be root, and allowed to make namespaces" if probe.returncode else ""


def skip_without_slurm() -> None:
    """Skip a test where there is no Slurm; in continuous integration that is a failure."""
    if why := lacking():
        said = f"no Slurm in miniature: this machine {why}"
        if os.environ.get("CI"):
            pytest.fail(said)
        pytest.skip(said)


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """A running one."""

    directory: Path
    first_process: subprocess.Popen[bytes]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)  # to be ended with it

    @property
    def environment(self) -> dict[str, str]:
        """What its commands are typed in: the tests' environment, outside of any job."""
        typed = environment(SLURM_CONF=str(self.directory / "slurm.conf"))
        path = f"{typed['PATH']}{os.pathsep}{SYSTEM_PATH}"
        kept = {k: v for k, v in typed.items() if k == "SLURM_CONF" or not k.startswith("SLURM_")}
        return {**kept, "PATH": path}

    def command(
        self, *words: str, cwd: Path = REPOSITORY, changes: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Any command to its end (srun, scancel, scontrol, ...), in the environment of Slurm's
        with some changes.
        """
        return subprocess.run(
            words,
            cwd=cwd,
            env={**self.environment, **(changes or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def srun(self, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """`srun` to its end."""
        return self.command("srun", *words, changes=changes)

    def start(
        self, *words: str, log: Path, cwd: Path = REPOSITORY, **changes: str
    ) -> subprocess.Popen[bytes]:
        """A command that goes on, and prints to the log."""
        with log.open("wb") as file:
            process = subprocess.Popen(
                words,
                cwd=cwd,
                env={**self.environment, **changes},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,  # with its second process, as srun has one
            )
        self.started.append(process)
        return process

    def sbatch(self, *words: str, cwd: Path = REPOSITORY, **changes: str) -> str:
        """Submit a job: its number."""
        result = self.command("sbatch", "--parsable", *words, cwd=cwd, changes=changes)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def scontrol(self, *words: str) -> str:
        """What `scontrol` prints. It must succeed."""
        result = self.command("scontrol", *words)
        assert result.returncode == 0, f"scontrol {' '.join(words)}: {result.stderr}"
        return result.stdout

    def scancel(self, *words: str) -> None:
        """`scancel`, which must succeed."""
        result = self.command("scancel", *words)
        assert result.returncode == 0, result.stderr

    def job(self, number: str) -> dict[str, str]:
        """All that `scontrol show job` says of a job: JobState, Reason, Restarts, ExitCode, ..."""
        words = self.scontrol("--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, ..."""
        return self.job(number)["JobState"]

    def wait_for(
        self, number: str, *states: str, timeout_s: float = 120, log: Path | None = None
    ) -> None:
        """Insist that a job comes into one of these states in time."""
        what = f"job {number} to be {' or '.join(states)}"
        log = log if log is not None and log.exists() else None
        wait_until(lambda: self.state(number) in states, what, timeout_s, every_s=0.2, log=log)

    def begin_now(self, number: str) -> None:
        """Have a job that waits in the queue begin: one that was queued again is held for 2
        minutes.
        """
        # Within the second of its first end Slurm takes the new start for the old one, which it has
        # revoked ("Job credential revoked"), and the job is FAILED. On a busy machine daemons of
        # its steps outlast that second, and pmi2 of the new step, of the same name, meets them.
        wait_until(lambda: not self.step_daemons(number), f"steps of job {number} to be gone")
        time.sleep(2)

        def begins() -> bool:
            # Slurm sets the time anew once the last of the job's processes has ended; and the job
            # may begin between the question and the command, which fails then.
            if self.state(number) == "PENDING":
                self.command("scontrol", "update", f"JobId={number}", "StartTime=now")
            return self.state(number) != "PENDING"

        wait_until(begins, f"job {number} to begin", every_s=1)

    def step_daemons(self, number: str) -> list[psutil.Process]:
        """The daemons of a job's steps that run."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = " ".join(process.info["cmdline"] or [])
            if words.startswith(f"slurmstepd: [{number}."):
                found.append(process)
        return found

    def node_state(self, node: str) -> str:
        """IDLE, ALLOCATED, DOWN, ..., with what Slurm adds to it."""
        words = self.scontrol("--oneliner", "show", "node", node).split()
        (state,) = [word.split("=")[1] for word in words if word.startswith("State=")]
        return state

    def set_node_down(self, node: str) -> None:
        """As an administrator does."""
        self.scontrol("update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def resume_node(self, node: str) -> None:
        """Take a node that is down into use again."""
        self.scontrol("update", f"NodeName={node}", "State=RESUME")

    def daemon_of(self, node: str) -> psutil.Process | None:
        """The slurmd of a node, if it runs."""
        configuration = str(self.directory / "slurm.conf")
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if words[:1] == ["slurmd"] and configuration in words and words[-1] == node:
                return process
        return None

    def kill_daemon(self, node: str) -> None:
        """Kill the slurmd of a node; what its jobs started goes on."""
        daemon = self.daemon_of(node)
        assert daemon is not None, f"{node} has no slurmd"
        daemon.send_signal(signal.SIGKILL)
        # it stays as a zombie, without a command line, as long as the first process reads
        wait_until(lambda: self.daemon_of(node) is None, f"the slurmd of {node} to end")

    def start_daemon(self, node: str) -> None:
        """Start the slurmd of a node, and its ports with it."""
        assert self.first_process.stdin
        self.first_process.stdin.write(f"{node}\n".encode())
        self.first_process.stdin.flush()

    def is_up(self) -> bool:
        """Whether both nodes wait for work."""
        return all(self._is_idle(node) for node in NODES)

    def _is_idle(self, node: str) -> bool:
        answer = self.command("scontrol", "--oneliner", "show", "node", node)
        return answer.returncode == 0 and "State=IDLE " in answer.stdout


def free_ports(number: int) -> list[str]:
    """So many TCP ports that nobody listens on, no two the same: held until all are found."""
    with ExitStack() as held:
        listeners = [held.enter_context(socket.create_server(("", 0))) for _ in range(number)]
        return [str(listener.getsockname()[1]) for listener in listeners]


@contextmanager
def slurm(directory: Path) -> Iterator[Slurm]:
    """Start Slurm in a directory of its own, and wait until both nodes are idle. Skips the test
    where there is none.
    """
    skip_without_slurm()
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (directory / name).mkdir()
    values = {"HOST": socket.gethostname(), "DIRECTORY": str(directory)}
    names = ("CONTROLLER_PORT", "NODE_1_PORT", "NODE_2_PORT")
    values |= dict(zip(names, free_ports(len(names)), strict=True))
    # so that no two clusters of a machine have a job of the same number, from which ports follow
    values["FIRST_JOB"] = values["CONTROLLER_PORT"]
    text = CONFIGURATION.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    (directory / "slurm.conf").write_text(text, encoding="utf-8")
    log = directory / "daemons.log"
    with log.open("wb") as file:
        first = subprocess.Popen(
            [*NEW_NAMESPACES, "sh", str(BOOT), str(directory / "slurm.conf")],
            cwd=directory,
            env={**os.environ, "PATH": SYSTEM_PATH},
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
        )
    cluster = Slurm(directory=directory, first_process=first)
    try:
        for node in NODES:
            cluster.start_daemon(node)
        wait_until(cluster.is_up, "both nodes to be idle", 60, job=first, log=log, every_s=0.2)
        yield cluster
    finally:
        assert first.stdin
        first.stdin.close()
        first.wait(20)
        for process in cluster.started:
            if process.poll() is None:  # its test failed
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(20)

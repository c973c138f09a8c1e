"""A cluster for tests: nodes with a network of their own, on which they can be cut off.

    with cluster(nodes=2) as (node1, node2):
        node1.run("ssh node2 hostname", cwd)

They reach each other by ssh. A node has its own host name, address, processes and ssh server. The
file system is the machine's, common to all like the shared storage of a real cluster. Everything
lives in namespaces without names, and the first process of them all reads a pipe of the test
process: when that ends, be it killed, the kernel takes everything down.
"""

import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

BOOT = Path(__file__).with_name("boot.sh")
NEW_NAMESPACES = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child")
NEEDED = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh", "unshare", "nsenter")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# in the command line of a rank that DeepSpeed started, and of nothing else
RANK = r" -u -m pretrain\.train "


@functools.cache
def lacking() -> str:
    """What keeps this machine from holding a cluster; empty if nothing does."""
    if absent := [name for name in NEEDED if not shutil.which(name, path=SYSTEM_PATH)]:
        return f"lacks {', '.join(absent)} (Debian packages iproute2, openssh-server, pdsh)"
    probe = subprocess.run(
        [*NEW_NAMESPACES, "ip", "link", "add", "type", "veth"], capture_output=True, check=False
    )
    return "must be root, and allowed to make namespaces" if probe.returncode else ""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine of a cluster."""

    name: str
    first_process: int  # its ssh server, as this machine numbers processes
    switch: int  # the process in whose network the other ends of all cables are

    def run(
        self, command: str, cwd: Path, timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """A shell command to its end, typed here with the tests' Python environment active."""
        typed, env = self._typed(command, cwd)
        return subprocess.run(
            typed, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def start(self, command: str, cwd: Path, log: Path) -> subprocess.Popen[bytes]:
        """A shell command that goes on, until the node ends at the latest; it prints to the log."""
        typed, env = self._typed(command, cwd)
        with log.open("wb") as file:
            return subprocess.Popen(
                typed, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )

    def _typed(self, command: str, cwd: Path) -> tuple[list[str], dict[str, str]]:
        enter = [
            "nsenter",
            f"--target={self.first_process}",
            "--net",
            "--mount",
            "--uts",
            "--ipc",
            "--pid",
        ]
        env = {
            "HOME": str(Path.home()),
            "PATH": f"{Path(sys.executable).parent}:{SYSTEM_PATH}",
            # for an environment where the project is not installed
            "PYTHONPATH": str(BOOT.parents[3]),
        }
        return [*enter, "env", f"--chdir={cwd}", "bash", "-c", command], env

    def processes(self, pattern: str = "") -> list[psutil.Process]:
        """All that runs here with a matching command line, but for the node's ssh server."""
        inside = os.readlink(f"/proc/{self.first_process}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):  # it ended while we looked
                here = (
                    os.readlink(f"/proc/{process.pid}/ns/pid") == inside
                    and process.pid != self.first_process
                )
                if here and re.search(pattern, shlex.join(process.cmdline())):
                    found.append(process)
        return found

    def kill(self, pattern: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to all that runs here with a matching command line, which must be
        something.
        """
        matching = self.processes(pattern)
        assert matching, f"{self.name}: nothing that runs there matches {pattern!r}"
        for process in matching:
            process.send_signal(number)

    def link_down(self) -> None:
        """Pull the network cable."""
        self._set_port("down")

    def link_up(self) -> None:
        """Plug it in again."""
        self._set_port("up")

    def _set_port(self, state: str) -> None:
        enter = ["nsenter", f"--target={self.switch}", "--net"]
        subprocess.run([*enter, "ip", "link", "set", self.name, state], check=True)


@contextmanager
def cluster(nodes: int = 2) -> Iterator[list[Node]]:
    """Nodes node1, node2, ... at 10.0.0.1, 10.0.0.2, ..., where root may ssh from each to each."""
    boot = [*NEW_NAMESPACES, "bash", str(BOOT), "switch", str(nodes)]
    with subprocess.Popen(
        boot, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as unshared:
        assert unshared.stdout
        assert unshared.stdout.readline() == "up\n", (
            "the cluster did not boot; standard error says why"
        )
        [switch] = psutil.Process(unshared.pid).children()
        parents = sorted(switch.children(), key=lambda parent: int(parent.cmdline()[-1]))
        yield [
            Node(name=f"node{number}", first_process=parent.children()[0].pid, switch=switch.pid)
            for number, parent in enumerate(parents, 1)
        ]
    # Leaving closes the pipe that the switch reads and waits until all is gone.

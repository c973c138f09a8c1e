"""The processes of a job: a launcher that nothing outlives, and signals to ranks wherever they are.

The launcher is the first process of a session of its own. In it sits a shell that waits for the end
of a pipe from here and then kills them all (shell/guarded.sh): so nothing outlives this process,
however it ends. Ranks on other hosts have terminals of ssh, and end with them.
"""

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from data_prep.commands import SAME_SIGNAL_S
from launch.hosts import RunOn, run_on
from launch.launchers import Command

SHELL = Path(__file__).with_name("shell")
GUARDED = SHELL / "guarded.sh"
# As text, and read at once: it goes to other hosts, and ranks can be ended without a disk, which
# may be what they wait for.
SIGNAL_RANKS = (SHELL / "signal_ranks.sh").read_text(encoding="utf-8")
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_S = 0.1


@dataclass
class Signals:
    """Those that ask this process to end."""

    first: int = 0  # its number; 0 as long as none came
    first_at: float = 0.0  # seconds of the monotonic clock
    last_at: float = 0.0

    def listen(self) -> None:
        """Note these signals from now on; they end nothing by themselves."""
        for number in ENDING:
            signal.signal(number, self.note)

    def note(self, number: int, _: FrameType | None) -> None:
        """Take a signal that came."""
        now = time.monotonic()
        self.last_at = now
        if not self.first:
            self.first_at = now
            self.first = number

    @property
    def are_urgent(self) -> bool:
        """Whether somebody asked a second time, later, and wants the end at once."""
        return self.last_at - self.first_at >= SAME_SIGNAL_S


@dataclass(frozen=True)
class Ranks:
    """The ranks of a job: the hosts that may have some, and the ports that each start met at.

    They are found by their ports, on whichever host and of whichever start: a launcher may be gone
    before its ranks, and a host that was cut off may come back with some.
    """

    hosts: list[str]
    ports: list[str]
    run_on: RunOn = run_on  # how a command comes to the hosts

    def signal(self, number: int) -> bool:
        """Send a signal to all ranks, of 0 none; whether there were any. Raises UserError where a
        host does not answer.
        """
        ports = "|".join(self.ports)
        answer = self.run_on(
            self.hosts, "sh", "-c", SIGNAL_RANKS, "signal_ranks", ports, str(int(number))
        )
        return bool(answer.stdout)

    def end(self, launcher: subprocess.Popen[bytes], signals: Signals) -> None:
        """Have the ranks end after their step, and wait for that, unless one more signal comes.

        The launcher may be gone before them: who ends a whole job signals each of its processes.
        """
        self.signal(signals.first)
        while launcher.poll() is None or self.signal(0):
            time.sleep(POLL_S)
            if signals.are_urgent:
                break


def start_guarded(command: Command) -> subprocess.Popen[bytes]:
    """Start a launcher that is killed, with all that it started, when its pipe is closed: by
    leaving the `with` of what is returned, or with this process.
    """
    return subprocess.Popen(
        ["sh", str(GUARDED), *command.words],
        stdin=subprocess.PIPE,
        env={**os.environ, **command.variables},
        start_new_session=True,
    )

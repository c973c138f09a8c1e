"""Commands on a real pseudo-terminal, read as pyte's terminal shows them."""

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator, Sequence

import pyte

from support.runs import REPOSITORY, environment
from support.waiting import wait_until

BARS = "━─"
DIM = b"\x1b[2m"
GREY = b"\x1b[90m"  # for dim, which pyte does not know


class Screen:
    """A pseudo-terminal of some size, and what stands on it."""

    def __init__(self, columns: int, lines: int) -> None:
        self.terminal = pyte.HistoryScreen(columns, lines, history=1000)
        self._stream = pyte.ByteStream(self.terminal)
        self._lock = threading.Lock()
        self.main, self.side = pty.openpty()
        self._set_size(columns, lines)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.side, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # all who could write have gone
            while content := os.read(self.main, 65536):
                with self._lock:
                    self._stream.feed(content.replace(DIM, GREY))

    def resize(self, columns: int, lines: int) -> None:
        """As a user who pulls at the window's corner."""
        with self._lock:
            self.terminal.resize(lines, columns)
            self._set_size(columns, lines)

    def rows(self) -> list[str]:
        """What stands on the screen, without blanks at the right and empty rows below."""
        with self._lock:
            rows = [row.rstrip() for row in self.terminal.display]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def history(self) -> list[str]:
        """What has left the screen at its top."""
        with self._lock:
            past = list(self.terminal.history.top)
            width = self.terminal.columns
        return ["".join(row[x].data for x in range(width)).rstrip() for row in past]

    def wait_for(self, condition: Callable[[list[str]], bool], what: str) -> None:
        """Until the rows are so."""

        def is_so() -> bool:
            return condition(self.rows())

        try:
            wait_until(is_so, what, timeout_s=100)
        except AssertionError as error:
            raise AssertionError(f"{error}\n" + "\n".join(self.rows())) from None

    def close(self) -> None:
        """Hang up."""
        os.close(self.side)
        self._reader.join(timeout=5)
        os.close(self.main)


@contextlib.contextmanager
def screen(columns: int, lines: int) -> Iterator[Screen]:
    """A pseudo-terminal."""
    made = Screen(columns, lines)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def running_on(
    there: Screen, command: Sequence[str], **variables: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A command whose output goes to the terminal, until it ends or the block is left."""
    job = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment(TERM="xterm-256color", **variables),
        stdin=there.side,
        stdout=there.side,
        stderr=there.side,
        start_new_session=True,
    )
    try:
        yield job
    finally:
        if job.poll() is None:
            job.kill()
        job.wait()


def bars_on(rows: Sequence[str]) -> int:
    """How many blocks stand there: each has one bar."""
    return sum(bool(row) and not row.strip(BARS) for row in rows)

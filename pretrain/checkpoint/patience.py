"""Trying again where a disk or a file server failed: once in a run of weeks is no reason to end it.

NFS answers ESTALE, EIO or ETIMEDOUT while a server fails over, and the next attempt succeeds. What
is no such error (a full disk, a missing file, a permission) is raised at once: it does not pass by
itself.
"""

import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from data_prep.commands import unheard
from data_prep.errors import is_passing, naming, os_error_line

T = TypeVar("T")
# Before the second, third and fourth attempt; a stalled run is one of 300 s.
WAITS_S = (1.0, 5.0, 25.0)


def patiently(action: Callable[[], T]) -> T:
    """What an action gives, which is tried again where the disk failed; each time is said.

    The action must be one that can start over, whatever its last attempt left. Raises what the last
    attempt raised.
    """
    for wait in WAITS_S:
        try:
            return action()
        except OSError as error:
            if not is_passing(error):
                raise
            with unheard():
                line = os_error_line(error)
                print(
                    f"{socket.gethostname()}: {line}; trying again in {wait:g} s",
                    file=sys.stderr,
                    flush=True,
                )
        time.sleep(wait)
    return action()


def read_patiently(path: Path) -> bytes:
    """The content of a file. Raises OSError that names it."""

    def read() -> bytes:
        with naming(path):
            return path.read_bytes()

    return patiently(read)

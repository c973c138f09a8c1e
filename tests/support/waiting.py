"""Waiting for what other processes bring about."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def came_true(condition: Callable[[], bool], within_s: float, every_s: float = 0.02) -> bool:
    """Whether a condition, looked at every so often, came true in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True


def wait_until(
    condition: Callable[[], bool],
    what: str,
    timeout_s: float = 120.0,
    *,
    every_s: float = 0.05,
    job: subprocess.Popen[bytes] | None = None,
    log: Path | None = None,
) -> None:
    """Insist that a condition comes true in time, before the job ends that is to bring it about.

    A failure says what was waited for, and all that the log holds.
    """

    def is_over() -> bool:
        return condition() or (job is not None and job.poll() is not None)

    in_time = came_true(is_over, timeout_s, every_s)
    said = "" if log is None else f"\n{log.read_text()}"
    assert in_time, f"waited {timeout_s} s for {what}{said}"
    assert condition(), f"the job ended before {what}{said}"

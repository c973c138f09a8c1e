"""What a job of Slurm has to know when it is queued again: `slurm.json` in the run's directory.

It names the job and the ports that the ranks of its newest process met at, by which that job, begun
anew, finds those that a lost node still runs.
"""

import json
import signal
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from data_prep.files import write_durably
from launch.outcome import Standing
from launch.slurm import JobState

SLURM_NAME = "slurm.json"


class SlurmStart(NamedTuple):
    """Who starts ranks in a run's directory."""

    job: str  # Slurm's number of it
    ports: tuple[str, ...]  # that the ranks of its starts met at


def write_start(run_dir: Path, start: SlurmStart) -> None:
    """Note who starts ranks there, before they are started."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_durably(run_dir / SLURM_NAME, json.dumps(start._asdict()).encode())


def read_start(run_dir: Path) -> SlurmStart | None:
    """Who started ranks there last; None where that is not told."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        content = json.loads((run_dir / SLURM_NAME).read_bytes())
        ports = tuple(str(int(port)) for port in content["ports"])
        return SlurmStart(str(content["job"]), ports)
    return None


def is_warned(number: int, now: Standing, job: JobState) -> bool:
    """Whether a job ends because its time is up, and not because somebody ended it.

    Slurm warns this process with SIGUSR1 (--signal=B:USR1) or the ranks (--signal=USR1); of a
    preempted job it ends the ranks alone, and leaves it a while. `number` is the signal that came
    here; 0: none did.
    """
    if job.is_preempted or number == signal.SIGUSR1:
        return True
    return number == 0 and signal.SIGUSR1.name in str(now.state.reason)

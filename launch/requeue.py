"""A run in a job of Slurm that is queued again: when it is, and what its next process has to know.

`slurm.json` in the run's directory names the job and the ports that ranks of its newest process met
at: by them that job, begun anew, finds those that a lost node still runs.
"""

import json
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.commands import unheard
from data_prep.files import write_durably
from launch.outcome import Standing
from launch.slurm import Allocation, JobState

SLURM_NAME = "slurm.json"
ASK_AGAIN_S = 5.0  # a controller may be changing over to its stand-in
ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True)
class SlurmStart:
    """Who starts ranks in a run's directory."""

    job: str  # Slurm's number of it
    ports: tuple[str, ...]  # that the ranks of its starts met at


def write_start(run_dir: Path, start: SlurmStart) -> None:
    """Note who starts ranks there, before they are started."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_durably(run_dir / SLURM_NAME, json.dumps(asdict(start)).encode())


def read_start(run_dir: Path) -> SlurmStart | None:
    """Who started ranks there last; None where that is not told."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        content = json.loads((run_dir / SLURM_NAME).read_bytes())
        ports = tuple(str(int(port)) for port in content["ports"])
        return SlurmStart(job=str(content["job"]), ports=ports)
    return None


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """The job of Slurm that a run is in, as long as this process is."""

    allocation: Allocation
    run_dir: Path
    may_requeue: bool  # or what follows is whoever's who submitted it
    saved_step: int  # when this process began

    def earlier_ports(self) -> list[str]:
        """The ports at which ranks of this job met that an earlier process of it started here."""
        earlier = read_start(self.run_dir)
        if earlier is None or earlier.job != self.allocation.job:
            return []
        return list(earlier.ports)

    def note_ports(self, ports: list[str]) -> None:
        """Note where the ranks of this process meet, before they are started."""
        write_start(self.run_dir, SlurmStart(job=self.allocation.job, ports=tuple(ports)))

    def leave_if_slurm_goes_on(self, number: int, now: Standing, *, is_preempted: bool) -> None:
        """Have Slurm queue the job again and leave, where its time is up; leave too where Slurm has
        done so by itself.

        `number` is the signal that came to this process, 0 if none did; `is_preempted` whether the
        run was ended well.
        """
        is_ended = bool(number) or is_preempted
        job = self.allocation.state()
        if self.allocation.is_lost(job):
            if is_ended:
                return
            sys.exit(
                f"error: {self.run_dir}: Slurm has taken job {self.allocation.job} from this node; "
                "what was not saved is trained again"
            )
        if self.may_requeue and is_ended and is_warned(number, now, job):
            self.requeue(now)

    def requeue(self, now: Standing) -> None:
        """Have Slurm queue the job again, and leave. It must have saved a step, or it would be
        queued for ever.
        """
        if (now.state.saved_step or 0) <= self.saved_step:
            sys.exit(
                f"error: {self.run_dir}: its time is up and it saved no step in it, so it is not "
                "queued again; give it more (--time), or have it warned later, as "
                "sbatch --signal=B:USR1@60"
            )
        for _ in range(ATTEMPTS):
            problem = self.allocation.requeue()
            if not problem:
                with unheard():
                    print(f"{self.run_dir}: saved; Slurm queues the job again", file=sys.stderr)
                sys.exit(0)
            time.sleep(ASK_AGAIN_S)
        sys.exit(
            f"error: {self.run_dir}: saved, but Slurm does not queue job {self.allocation.job} "
            f"again: {problem}; submit the same command to continue"
        )


def is_warned(number: int, now: Standing, job: JobState) -> bool:
    """Whether a job ends because its time is up, and not because somebody ended it.

    Slurm warns this process with SIGUSR1 (--signal=B:USR1) or the ranks (--signal=USR1); of a
    preempted job it ends the ranks alone, and leaves it a while. `number` is the signal that came
    here; 0: none did.
    """
    if job.is_preempted or number == signal.SIGUSR1:
        return True
    return number == 0 and signal.SIGUSR1.name in str(now.state.reason)

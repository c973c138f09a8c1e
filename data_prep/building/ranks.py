"""One process or many: what `build_shards` needs of MPI. mpi4py is imported only under a
launcher.
"""

import functools
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from tqdm import tqdm

from data_prep.errors import USER_ERROR_EXIT_CODE, UserError, explained, os_error_line

RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")
SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
POLL_SECONDS = 0.02


class Communicator:
    """The few calls of an MPI communicator that are used; as it stands, that of a process alone."""

    rank = 0
    size = 1

    def bcast(self, value: Any, root: int = 0) -> Any:
        return value

    def allgather(self, value: Any) -> list[Any]:
        return [value]


def connect() -> tuple[Communicator, int]:
    """The communicator, and how many cores this rank may use: its share of what the ranks of its
    machine have.

    Raises UserError if the launcher started another number of ranks than MPI sees: every rank would
    then believe to be alone and write the same files.
    """
    cores = os.sched_getaffinity(0)
    if not any(name in os.environ for name in RANK_VARIABLES):
        if (tasks := int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))) > 1:
            advice = "add --mpi=pmi2 or --mpi=pmix (srun --mpi=list)"
            _refuse(
                f"srun started {tasks} tasks without MPI; {advice}",
                int(os.environ.get("SLURM_PROCID", "0")),
            )
        return Communicator(), len(cores)
    unusable = "started by an MPI launcher, but mpi4py can't be used"
    with (
        explained((ImportError, RuntimeError), unusable, "see data_prep/README.md"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of another MPI's launcher: the check below says it better
        from mpi4py import MPI
    world: Any = MPI.COMM_WORLD
    sys.excepthook = functools.partial(_abort, world)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the launcher says it, and ends the other ranks
    expected = _environment(SIZE_VARIABLES, world.size)
    if world.size != expected:
        problem = (
            f"the launcher started {expected} ranks, but mpi4py sees {world.size}: they belong to "
            "different MPIs"
        )
        advice = (
            "use the mpiexec of the MPI that mpi4py was built with (pip install mpich brings one)"
        )
        _refuse(f"{problem}; {advice}", _environment(RANK_VARIABLES, 0))
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    # those of one rank, if the launcher binds each to its own
    all_cores = set().union(*local.allgather(cores))
    return world, max(1, min(len(cores), len(all_cores) // local.size))


def _abort(world: Any, *defect: Any) -> None:
    """An exception that nobody expects must not leave the other ranks waiting for ever."""
    sys.__excepthook__(*defect)
    sys.stderr.flush()
    # launchers end the job at once, and what they have not read by then is lost
    time.sleep(POLL_SECONDS)
    world.Abort(1)


def _environment(names: Sequence[str], default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


def _refuse(message: str, rank: int) -> NoReturn:
    """An error that every rank meets, and one tells."""
    if rank > 0:
        sys.exit(USER_ERROR_EXIT_CODE)
    raise UserError(message)


def together(comm: Communicator, work: Callable[[], Any]) -> Any:
    """Do this rank's part; if any rank meets an error of use, the first is raised on rank 0 and
    all stop with it.
    """
    result, error = None, None
    try:
        result = work()
    except (UserError, OSError) as raised:
        error = os_error_line(raised)
    if errors := [message for message in comm.allgather(error) if message is not None]:
        more = f" ({len(errors) - 1} more ranks met errors)" if len(errors) > 1 else ""
        _refuse(errors[0] + more, comm.rank)
    return result


class Progress:
    """One bar for the whole job, on rank 0: part of the input done, MB/s of it, time left."""

    def __init__(self, comm: Communicator, total_bytes: int) -> None:
        self.comm = comm
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(
            total=max(total_bytes, 1),
            desc="building",
            unit="B",
            unit_scale=True,
            disable=comm.rank > 0,
            mininterval=interval,
            delay=interval,
        )

    def report(self, state: str, done_bytes: int = 0) -> set[str]:
        """Show what all ranks did since; how this one stands (working, done, failed), and how
        all do. All call it.
        """
        states, of_ranks = zip(*self.comm.allgather((state, done_bytes)), strict=True)
        self.bar.update(sum(of_ranks))
        return set(states)

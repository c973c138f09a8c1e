"""One process or many: what `build_shards` needs of MPI.

mpi4py is imported only under a launcher: where there is none, it need not even be installed.
"""

import functools
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from data_prep.errors import USER_ERROR_EXIT_CODE, UserError, explained, os_error_line
from data_prep.slurm.step import Step, came_as_task, read_step

RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")
SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
# Of these srun sets none: whose ranks have one were started by an mpiexec, maybe within a step.
MPIEXECS_VARIABLES = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
INSTALL_MPI = "pip install mpi4py mpich brings an MPI that works, to be started by its own mpiexec"
POLL_SECONDS = 0.02
BAR_SECONDS = 0.5  # between two states of the bar on a terminal
LOG_SECONDS = 30.0  # and in a log, which keeps each of them

Result = TypeVar("Result")


class Communicator:
    """The few calls of an MPI communicator that are used; as it stands, that of a process alone."""

    rank = 0
    size = 1

    def bcast(self, value: Any, root: int = 0) -> Any:
        """The value of one rank, on all."""
        return value

    def allgather(self, value: Any) -> list[Any]:
        """The values of all ranks, on all."""
        return [value]


def connect() -> tuple[Communicator, int]:
    """The communicator, and how many cores this rank may use.

    That is its share of what the ranks of its machine have. Raises UserError if the launcher
    started another number of ranks than MPI sees: every rank would then believe to be alone and
    write the same files.
    """
    cores = os.sched_getaffinity(0)
    step = read_step()
    is_of_step = step is not None and not any(name in os.environ for name in MPIEXECS_VARIABLES)
    if step is not None and is_of_step and not came_as_task(step):
        return Communicator(), len(cores)  # what srun --mpi set is for the task above this process
    if not any(name in os.environ for name in RANK_VARIABLES):
        _refuse_tasks_without_mpi(step)
        return Communicator(), len(cores)
    mpi = _import_mpi()
    world = mpi.COMM_WORLD
    sys.excepthook = functools.partial(_abort, world)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the launcher says it, and ends the other ranks
    expected = _environment(SIZE_VARIABLES, world.size)
    if world.size != expected:
        started = f"the launcher started {expected} ranks, but mpi4py sees {world.size}"
        advice = (
            "use the mpiexec of the MPI that mpi4py was built with (pip install mpich brings one)"
        )
        _refuse(
            f"{started}: they belong to different MPIs; {advice}", _environment(RANK_VARIABLES, 0)
        )
    local = world.Split_type(mpi.COMM_TYPE_SHARED)
    # A launcher may bind each rank to cores of its own, or all of them to the same ones.
    cores_of_all: set[int] = set().union(*local.allgather(cores))
    share = len(cores_of_all) // local.size
    return world, max(1, min(len(cores), share))


def _refuse_tasks_without_mpi(step: Step | None) -> None:
    """Raise UserError if srun started several tasks that don't see each other."""
    if step is not None:
        advice = "add --mpi=pmi2 or --mpi=pmix (srun --mpi=list)"
        _refuse(f"srun started {step.tasks} tasks without MPI; {advice}", step.task)


def _import_mpi() -> Any:
    """mpi4py's MPI, which begins with its import."""
    unusable = "started by an MPI launcher, but mpi4py can't be used"
    with (
        explained((ImportError, RuntimeError), unusable, INSTALL_MPI),
        warnings.catch_warnings(),
    ):
        # It warns of another MPI's launcher, which `connect` says better.
        warnings.simplefilter("ignore")
        from mpi4py import MPI
    return MPI


def _abort(world: Any, *defect: Any) -> None:
    """An exception that nobody expects must not leave the other ranks waiting for ever."""
    sys.__excepthook__(*defect)
    sys.stderr.flush()
    # Launchers end the job at once, and what they have not read by then is lost.
    time.sleep(POLL_SECONDS)
    world.Abort(1)


def _environment(names: Sequence[str], default: int) -> int:
    """The number in the first of some variables that is set."""
    for name in names:
        if name in os.environ:
            return int(os.environ[name])
    return default


def _refuse(message: str, rank: int) -> NoReturn:
    """An error that every rank meets, and one tells."""
    if rank > 0:
        sys.exit(USER_ERROR_EXIT_CODE)
    raise UserError(message)


def together(comm: Communicator, work: Callable[[], Result]) -> Result:
    """Do this rank's part; every rank calls this.

    If any rank meets an error of use, the first is raised on rank 0 and all stop with it.
    """
    result: Any = None
    error = None
    try:
        result = work()
    except (UserError, OSError) as raised:
        error = os_error_line(raised)
    errors = [message for message in comm.allgather(error) if message is not None]
    if errors:
        first = errors[0]
        if len(errors) > 1:
            first += f" ({len(errors) - 1} more ranks met errors)"
        _refuse(first, comm.rank)
    return result  # type: ignore[no-any-return]


def on_first(comm: Communicator, work: Callable[[], Result]) -> Result | None:
    """Work that rank 0 does for all; None on the others. Every rank calls this."""

    def own_part() -> Result | None:
        return work() if comm.rank == 0 else None

    return together(comm, own_part)


class Progress:
    """One bar for the whole job, on rank 0: part of the input done, MB/s of it, time left."""

    def __init__(self, comm: Communicator, total_bytes: int) -> None:
        self.comm = comm
        interval = BAR_SECONDS if sys.stderr.isatty() else LOG_SECONDS
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
        """Show what all ranks did since; all ranks call it.

        Takes how this one stands (working, done, failed), gives back how any of them do.
        """
        reports = self.comm.allgather((state, done_bytes))
        self.bar.update(sum(done for _, done in reports))
        return {state for state, _ in reports}

"""One process or many: what `build_shards` needs of MPI. mpi4py is imported only under a launcher."""

import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

from tqdm import tqdm

from data_prep.errors import USER_ERROR_EXIT_CODE, UserError, one_line, os_error_line

RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")
SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
PROGRESS_TAG, STOP_TAG = 1, 2
POLL_SECONDS = 0.02
BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}"


class Communicator(Protocol):
    """The few calls of an MPI communicator that are used."""

    rank: int
    size: int

    def bcast(self, value: Any, root: int = 0) -> Any: ...
    def allgather(self, value: Any) -> list[Any]: ...


class SingleProcess:
    """A world of one."""

    rank = 0
    size = 1

    def bcast(self, value: Any, root: int = 0) -> Any:
        return value

    def allgather(self, value: Any) -> list[Any]:
        return [value]


def connect() -> tuple[Communicator, int]:
    """The communicator, and how many cores this rank may use: its share of what the ranks of its machine have.

    Raises UserError if the launcher started another number of ranks than MPI sees: every rank would
    then believe to be alone and write the same files.
    """
    cores = os.sched_getaffinity(0)
    if not any(name in os.environ for name in RANK_VARIABLES):
        if (tasks := int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))) > 1:
            advice = "add --mpi=pmi2 or --mpi=pmix (srun --mpi=list)"
            _refuse(f"srun started {tasks} tasks without MPI; {advice}", int(os.environ.get("SLURM_PROCID", "0")))
        return SingleProcess(), len(cores)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another MPI's launcher: the check below says it better
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        problem = f"started by an MPI launcher, but mpi4py can't be used ({error})"
        raise UserError(f"{problem}; see data_prep/README.md") from None
    world = MPI.COMM_WORLD
    expected = _environment(SIZE_VARIABLES, world.size)
    if world.size != expected:
        problem = f"the launcher started {expected} ranks, but mpi4py sees {world.size}: they belong to different MPIs"
        advice = "use the mpiexec of the MPI that mpi4py was built with (pip install mpich brings one)"
        _refuse(f"{problem}; {advice}", _environment(RANK_VARIABLES, 0))
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    all_cores = set().union(*local.allgather(cores))  # those of one rank, if the launcher binds each to its own
    return world, max(1, min(len(cores), len(all_cores) // local.size))


def _environment(names: Sequence[str], default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


def _refuse(message: str, rank: int) -> NoReturn:
    """An error that every rank meets, and one tells."""
    if rank > 0:
        sys.exit(USER_ERROR_EXIT_CODE)
    raise UserError(message)


def together(comm: Communicator, work: Callable[[], Any]) -> Any:
    """Do this rank's part; if any rank meets an error of use, the first is raised on rank 0 and all stop with it."""
    result, error = None, None
    try:
        result = work()
    except UserError as raised:
        error = one_line(raised)
    except OSError as raised:
        error = os_error_line(raised)
    errors = [message for message in comm.allgather(error) if message is not None]
    if errors:
        more = f" ({len(errors) - 1} more ranks met errors)" if len(errors) > 1 else ""
        _refuse(errors[0] + more, comm.rank)
    return result


@contextmanager
def abort_on_defect(comm: Communicator) -> Iterator[None]:
    """An exception that nobody expects must not leave the other ranks waiting for ever."""
    try:
        yield
    except (UserError, SystemExit):
        raise
    except BaseException as error:
        if comm.size > 1:
            if not isinstance(error, KeyboardInterrupt):
                print(traceback.format_exc(), file=sys.stderr, flush=True)
                time.sleep(POLL_SECONDS)  # launchers end the job at once, and what they have not read by then is lost
            comm.Abort(1)  # type: ignore[attr-defined]
        raise


class Progress:
    """One bar for the whole job, on rank 0: part of the input done, text per second, time left.

    `add` may be called from any thread; `report` and `finish` from the main one, which alone talks MPI.
    """

    def __init__(self, comm: Communicator, total_bytes: int) -> None:
        self.comm: Any = comm
        self.running = comm.size - 1
        self.text_bytes = 0
        self.started = time.perf_counter()
        self._lock = threading.Lock()
        self._done = (0, 0)
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(
            total=max(total_bytes, 1), desc="building", bar_format=BAR, disable=comm.rank > 0, mininterval=interval,
            delay=interval,
        )  # fmt: skip

    def add(self, input_bytes: int, text_bytes: int) -> None:
        """Count work done."""
        with self._lock:
            self._done = (self._done[0] + input_bytes, self._done[1] + text_bytes)

    def report(self) -> bool:
        """Show what was done since, by all ranks; True if another rank has met an error."""
        with self._lock:
            done, self._done = self._done, (0, 0)
        if self.comm.rank == 0:
            self._show(*done)
            self._collect()
        elif any(done):
            self.comm.send(done, dest=0, tag=PROGRESS_TAG)
        return self.comm.size > 1 and bool(self.comm.iprobe(tag=STOP_TAG))

    def stop_others(self) -> None:
        """Tell all other ranks to give up."""
        for rank in set(range(self.comm.size)) - {self.comm.rank}:
            self.comm.isend(None, dest=rank, tag=STOP_TAG)

    def finish(self) -> None:
        """Rank 0 shows the others' work until all of them are done."""
        self.report()
        if self.comm.rank > 0:
            self.comm.send(None, dest=0, tag=PROGRESS_TAG)
        while self.comm.rank == 0 and self.running:
            self._collect()
            time.sleep(POLL_SECONDS)
        self.bar.close()

    def _collect(self) -> None:
        while self.running and self.comm.iprobe(tag=PROGRESS_TAG):
            message = self.comm.recv(tag=PROGRESS_TAG)
            if message is None:
                self.running -= 1
            else:
                self._show(*message)

    def _show(self, input_bytes: int, text_bytes: int) -> None:
        self.text_bytes += text_bytes
        rate = self.text_bytes / 1e6 / max(time.perf_counter() - self.started, 1e-9)
        self.bar.set_postfix_str(f"{rate:.1f} MB/s", refresh=False)
        self.bar.update(input_bytes)

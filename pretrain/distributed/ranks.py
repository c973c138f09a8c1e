"""How ranks share a machine, meet, and agree on an error.

Works the same under `deepspeed`, `torchrun`, `mpiexec` and as one plain process. Everything here
that runs before the process group exists needs only the environment that the launcher set.
"""

import contextlib
import ctypes
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from tqdm import tqdm

from data_prep.commands import unheard
from data_prep.errors import (
    USER_ERROR_EXIT_CODE,
    UserError,
    exit_code_of,
    explained,
    one_line,
    os_error_line,
    printable,
)
from pretrain.distributed.world import LET_RANK_0_SPEAK_S, World

T = TypeVar("T")
Group = dist.ProcessGroup | None  # None: all ranks, as training has them


def set_up_rank(world: World) -> None:
    """Give this process its part of the machine: a GPU, or cores unless the launcher set
    OMP_NUM_THREADS.

    Raises UserError where others of the machine leave no GPU for it.
    """
    memory_of_rank(world)
    keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_world_size))


def keep_freed_memory() -> None:
    """On a CPU, have the C library keep the memory of freed tensors.

    glibc returns every block above 32 MB to the system and fetches it anew, page by page: at V =
    65,536 that was a quarter of the loss head's time and a third of an evaluation's. Without glibc
    this does nothing.
    """
    library = ctypes.CDLL(None)
    if torch.accelerator.is_available() or not hasattr(library, "mallopt"):
        return
    mmap_max, trim_threshold = -4, -1  # as malloc.h numbers them
    library.mallopt(mmap_max, 0)
    library.mallopt(trim_threshold, 2**31 - 1)


def memory_of_rank(world: World) -> tuple[str, float]:
    """Kind of this rank's device, cuda or cpu, and the bytes that it may take: all, or its part of
    the machine's.

    Raises UserError where the machine has fewer GPUs than ranks.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus <= world.local_rank:
        raise UserError(
            f"{world.local_world_size} ranks were started on a machine of {gpus} GPUs; start one "
            "for each"
        )
    if gpus:
        return "cuda", float(torch.cuda.get_device_properties(world.local_rank).total_memory)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return "cpu", min(physical, *cgroup_limits()) / world.local_world_size


def check_kernels(device_type: str, *, is_bf16: bool) -> None:
    """Raise UserError where the kernels that ATEN_CPU_CAPABILITY asks for can't attend in bf16 on
    this CPU.

    On processors with AMX, torch 2.13's bf16 attention over 64 tokens or more needs kernels of
    AVX-512 ("default" and "avx2" are below it) and raises "pack_vnni2 is only supported when avx512
    is supported". So it is tried.
    """
    wanted = os.environ.get("ATEN_CPU_CAPABILITY")
    if not wanted or device_type != "cpu" or not is_bf16:
        return
    query_BHTC = torch.zeros(1, 1, 64, 32, dtype=torch.bfloat16)
    advice = "unset it, or train in fp32 (--deepspeed-config zero2_fp32)"
    with explained(
        RuntimeError,
        f"ATEN_CPU_CAPABILITY={wanted}: bf16 attention fails with it on this CPU",
        advice,
    ):
        torch.nn.functional.scaled_dot_product_attention(
            query_BHTC, query_BHTC, query_BHTC, is_causal=True
        )


def cgroup_limits() -> list[float]:
    """Bytes that a container or Slurm allows this process, as cgroups (v2, v1) say; infinity
    where they say none.
    """
    own = Path("/proc/self/cgroup")
    group = own.read_text().rpartition("::")[2].strip("/\n") if own.is_file() else ""
    names = (f"{group}/memory.max", "memory.max", "memory/memory.limit_in_bytes")
    files = [path for path in (Path("/sys/fs/cgroup") / name for name in names) if path.is_file()]
    return [math.inf, *(float(path.read_text().replace("max", "inf")) for path in files)]


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def own_address(seen_by: str = "10.255.255.255") -> str:
    """This machine's address as another machine sees it (its name may resolve to loopback)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((seen_by, 1))  # sends nothing; only chooses the interface
        return str(probe.getsockname()[0])


def interface_towards(host: str) -> str:
    """The network interface through which this machine reaches a host."""
    own = own_address(host)
    interfaces = psutil.net_if_addrs().items()
    return next(
        name for name, addresses in interfaces if own in {each.address for each in addresses}
    )


def set_rendezvous(world: World) -> None:
    """Complete the environment that torch.distributed reads: an address and port that all ranks
    share.
    """
    address = (
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        int(os.environ.get("MASTER_PORT", 0)) or free_port(),
    )
    if world.launched_by_mpi:
        from mpi4py import MPI  # only under mpiexec: importing it starts MPI

        if MPI.COMM_WORLD.Get_size() != world.world_size:
            raise UserError(
                f"mpiexec started {world.world_size} ranks but mpi4py sees a world of "
                f"{MPI.COMM_WORLD.Get_size()}: its MPI library is another than mpiexec's; use the "
                "mpiexec that belongs to it"
            )
        if world.world_size > world.local_world_size and "MASTER_ADDR" not in os.environ:
            address = (own_address(), address[1])
        address = MPI.COMM_WORLD.bcast(address, root=0)
    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.world_size),
        LOCAL_RANK=str(world.local_rank),
        LOCAL_WORLD_SIZE=str(world.local_world_size),
        MASTER_ADDR=address[0],
        MASTER_PORT=str(address[1]),
    )
    # gloo would ask for the address of this machine's name
    if world.world_size > world.local_world_size:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_towards(address[0]))


def gather(value: Any, group: Group = None) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def barrier() -> None:
    """Wait for every rank."""
    gather(None)


class SharedError(UserError):
    """What one rank met, raised on all; with the exit code that it has there."""

    def __init__(self, message: str, exit_code: int = USER_ERROR_EXIT_CODE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class LoneError(SharedError):
    """What one rank met amid a step, where the others wait for it: its watch tells them, and
    they end.
    """


@contextlib.contextmanager
def met_alone() -> Iterator[None]:
    """Input that turns out to be bad inside does so on this rank alone."""
    try:
        yield
    except UserError as error:
        raise LoneError(str(error)) from None


def together(action: Callable[[], T], group: Group = None) -> T:
    """Run an action on every rank; if it fails on any of them, raise the first failure on all."""
    result, message, code, host = None, None, 0, socket.gethostname()
    try:
        result = action()
    except (UserError, OSError) as error:
        message = os_error_line(error)
        code = exit_code_of(error)
    answers = gather((message, code, host), group)
    first_host = answers[0][2]
    for failure, exit_code, where in answers:
        if failure is not None:
            raise SharedError(
                failure if where == first_host else f"on {where}: {failure}", exit_code
            )
    return result  # type: ignore[return-value]


def exit_with(error: UserError, world: World) -> int:
    """Rank 0 prints the one line; the others let it, since launchers end the job at the first exit.

    A rank that is still there after that, and met an error that rank 0 did not, prints its own.
    """
    if not world.is_main:
        time.sleep(LET_RANK_0_SPEAK_S)
    if world.is_main or not isinstance(error, SharedError):
        where = "" if world.is_main else f" on rank {world.rank} ({socket.gethostname()})"
        with unheard():
            print(f"error{where}: {printable(one_line(error))}", file=sys.stderr, flush=True)
    # threads of a process group abort, now and then, a process that ends as usual
    if world.world_size > 1:
        os._exit(error.exit_code)
    return error.exit_code


def say(world: World, text: str) -> None:
    """One line of the log, from rank 0."""
    if world.is_main:
        with unheard():
            tqdm.write(text, file=sys.stderr)

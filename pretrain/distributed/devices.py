"""This rank's part of the machine: a GPU or cores, its memory, and whether its kernels work."""

import ctypes
import math
import os
from pathlib import Path

import torch

from data_prep.errors import (
    UserError,
    explained,
)
from pretrain.distributed.world import World

# Parameters of mallopt as malloc.h numbers them.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def set_up_rank(world: World) -> None:
    """Give this process its part of the machine: a GPU, or some of the cores.

    The launcher's OMP_NUM_THREADS, where it is set, says how many cores instead. Raises UserError
    where others of the machine leave no GPU for it.
    """
    memory_of_rank(world)
    keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_of_rank(world))


def threads_of_rank(world: World) -> int:
    """How many cores this rank may use: its share of those that it sees, or all of them where srun
    has bound each task to cores of its own.
    """
    cores = len(os.sched_getaffinity(0))
    if world.step is not None and cores * world.local_world_size <= world.step.local_cpus:
        return cores
    return max(1, cores // world.local_world_size)


def keep_freed_memory() -> None:
    """On a CPU, have the C library keep the memory of freed tensors.

    glibc returns every block above 32 MB to the system and fetches it anew, page by page: at V =
    65,536 that was a quarter of the loss head's time and a third of an evaluation's. Without glibc
    this does nothing.
    """
    library = ctypes.CDLL(None)
    if torch.accelerator.is_available() or not hasattr(library, "mallopt"):
        return
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def memory_of_rank(world: World) -> tuple[str, float]:
    """Kind of this rank's device, cuda or cpu, and the bytes that it may take.

    They are all of a GPU's, or its part of the machine's. Raises UserError where the machine has
    fewer GPUs than ranks.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus <= world.local_rank and world.step is not None:
        raise UserError(
            f"{world.local_world_size} ranks were started on a node, and this one sees "
            f"{gpus} of its GPUs; give srun --gpus-per-node={world.local_world_size}, and neither "
            "--gpus-per-task nor --gpu-bind, so that each rank sees all and takes its own"
        )
    if 0 < gpus <= world.local_rank:
        raise UserError(
            f"{world.local_world_size} ranks were started on a machine of {gpus} GPUs; start one "
            "for each"
        )
    if gpus:
        properties = torch.cuda.get_device_properties(world.local_rank)
        return "cuda", float(properties.total_memory)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed = min(physical, *cgroup_limits())
    return "cpu", allowed / world.local_world_size


def check_kernels(device_type: str, *, is_bf16: bool) -> None:
    """Raise UserError where the kernels that ATEN_CPU_CAPABILITY asks for can't attend in bf16.

    On processors with AMX, torch 2.13's bf16 attention over 64 tokens or more needs kernels of
    AVX-512 ("default" and "avx2" are below it) and raises "pack_vnni2 is only supported when avx512
    is supported". So it is tried.
    """
    wanted = os.environ.get("ATEN_CPU_CAPABILITY")
    if not wanted or device_type != "cpu" or not is_bf16:
        return
    query_BHTC = torch.zeros(1, 1, 64, 32, dtype=torch.bfloat16)
    problem = f"ATEN_CPU_CAPABILITY={wanted}: bf16 attention fails with it on this CPU"
    advice = "unset it, or train in fp32 (--deepspeed-config zero2_fp32)"
    with explained(RuntimeError, problem, advice):
        torch.nn.functional.scaled_dot_product_attention(
            query_BHTC, query_BHTC, query_BHTC, is_causal=True
        )


def cgroup_limits() -> list[float]:
    """Bytes that a container or Slurm allows this process, as cgroups (v2, v1) say.

    The first is infinity, for where they say nothing.
    """
    group = ""
    own = Path("/proc/self/cgroup")
    if own.is_file():
        group = own.read_text().rpartition("::")[2].strip("/\n")
    limits = [math.inf]
    for name in (f"{group}/memory.max", "memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup") / name
        if path.is_file():
            limit = path.read_text().replace("max", "inf")
            limits.append(float(limit))
    return limits

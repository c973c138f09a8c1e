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

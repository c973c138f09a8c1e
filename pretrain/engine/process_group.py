"""Joining the other ranks of a run, and leaving them."""

import logging
import socket
import warnings

import torch
import torch.distributed as dist

from data_prep.errors import one_line
from pretrain.distributed.agree import barrier
from pretrain.distributed.rendezvous import set_rendezvous
from pretrain.distributed.world import World
from pretrain.engine.deepspeed_library import deepspeed, get_accelerator, import_muon_uncompiled


def start_process_group(world: World) -> torch.device:
    """Join the other ranks, unless that is done; returns this rank's device."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's calls into torch.distributed are older than torch.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # DeepSpeed would ask a compiler about each of its extensions, for a second, and compile one on
    # a CPU, for a minute, or hang on the lock of a killed build. None is needed.
    deepspeed.ops.__compatible_ops__ = {}
    import_muon_uncompiled()
    if not dist.is_initialized():
        set_rendezvous(world)
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(world.local_rank)
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    except dist.DistError as error:  # after DEEPSPEED_TIMEOUT minutes, 10 unless set
        why = (
            f"another rank failed before all had met, or cannot reach this one ({one_line(error)})"
        )
        raise SystemExit(f"error: rank {world.rank} ({socket.gethostname()}): {why}") from None
    return torch.device(accelerator.current_device_name())


def leave_process_group() -> None:
    """Leave the other ranks, once all have come so far."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()

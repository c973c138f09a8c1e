"""Where the ranks of a launch meet: addresses, ports, and what torch.distributed is told.

It needs only the environment that the launcher set, and no process group.
"""

import os
import socket

from data_prep.errors import UserError
from data_prep.slurm.step import Step
from pretrain.distributed.addresses import interface_towards, own_address
from pretrain.distributed.slurm import check_port_is_free, meeting_host, meeting_port
from pretrain.distributed.world import World


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def set_rendezvous(world: World) -> None:
    """Complete the environment that torch.distributed reads.

    All ranks then share an address and a port. Raises UserError where MPI sees other ranks than its
    launcher started, and where Slurm's ranks can have no address or port.
    """
    if world.step is not None:
        choose_for_step(world.step)
    # What a launcher has set stands; mpiexec sets none of it, a plain process needs no more.
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("MASTER_PORT", 0)) or free_port()
    spans_machines = world.world_size > world.local_world_size
    # Under mpiexec each rank has chosen a port of its own by now: rank 0's counts.
    if world.launched_by_mpi:
        if spans_machines and "MASTER_ADDR" not in os.environ:
            host = own_address()
        host, port = of_rank_0(host, port, world.world_size)
    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.world_size),
        LOCAL_RANK=str(world.local_rank),
        LOCAL_WORLD_SIZE=str(world.local_world_size),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )
    if spans_machines:
        # Gloo would ask for the address of this machine's name, which may be the loopback's.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_towards(host))


def choose_for_step(step: Step) -> None:
    """Set what srun does not: where the ranks of its step meet. What a user has set stands.

    Raises UserError where there is no address, or the port is in use.
    """
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = meeting_host(step)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(meeting_port(step))
    check_port_is_free(step, int(os.environ["MASTER_PORT"]))


def of_rank_0(host: str, port: int, world_size: int) -> tuple[str, int]:
    """The address and port of rank 0, told through MPI."""
    from mpi4py import MPI  # only under mpiexec: importing it starts MPI

    seen = MPI.COMM_WORLD.Get_size()
    if seen != world_size:
        raise UserError(
            f"mpiexec started {world_size} ranks but mpi4py sees a world of {seen}: its MPI "
            "library is another than mpiexec's; use the mpiexec that belongs to it"
        )
    host, port = MPI.COMM_WORLD.bcast((host, port), root=0)
    return host, port

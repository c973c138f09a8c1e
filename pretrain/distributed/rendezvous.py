"""Where the ranks of a launch meet: addresses, ports, and the environment that torch.distributed reads."""

import os
import socket

import psutil

from data_prep.errors import (
    UserError,
)
from pretrain.distributed.world import World


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

"""Where the ranks of a step of Slurm meet: an address and a port that each finds for itself."""

import errno
import os
import re
import shutil
import socket
import subprocess

from data_prep.errors import UserError
from data_prep.slurm.step import Step
from pretrain.distributed.addresses import is_loopback, own_address

LOOPBACK = "127.0.0.1"
# Ports below those that Linux gives to connections (32768 and more), so that none is taken by
# chance, and above those of most services.
FIRST_PORT = 20_000
PORTS = 12_000
# Steps of a job and jobs that follow one another get ports of their own.
PORTS_OF_JOB = 16
FIRST_NAME = re.compile(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)")
SCONTROL_TIMEOUT_S = 30


def first_node(nodes: str) -> str:
    """The first name in a list as Slurm writes it: of n[01-03,7],m1 it is n01.

    Raises UserError.
    """
    name = FIRST_NAME.match(nodes)
    if name is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes}: no name of a node in it")
    return "".join(part or "" for part in name.groups())


def meeting_port(step: Step) -> int:
    """The port that all ranks of a step derive alike."""
    return FIRST_PORT + (step.job * PORTS_OF_JOB + step.number) % PORTS


def meeting_host(step: Step) -> str:
    """The address of rank 0's node, for a rank on any node. SLURM_LAUNCH_NODE_IPADDR is no such
    one: srun may be typed on a login node.

    Raises UserError where there is none.
    """
    if step.local_tasks == step.tasks:
        return LOOPBACK
    if step.task == 0 and step.node != 0:
        # srun --distribution=arbitrary, or plane
        raise UserError(
            f"rank 0 is not on the first node of {step.nodes}, where all look for it; type "
            f"MASTER_ADDR={os.environ.get('SLURMD_NODENAME', socket.gethostname())} before srun"
        )
    node = first_node(step.nodes)
    resolved = _address_of(node)
    if resolved and not is_loopback(resolved):
        return resolved
    # Its administrator may have given Slurm an address instead of names that resolve.
    told = _address_that_slurm_uses(node)
    if told and told != node and (address := _address_of(told)):
        return address
    if resolved and step.node == 0:  # its own name is loopback's, as Debian's installer has it
        return own_address()
    raise UserError(
        f"no address of {node}, where rank 0 is: {socket.gethostname()} can't resolve that name, "
        "and Slurm's scontrol tells no other; type MASTER_ADDR=ADDRESS before srun"
    )


def check_port_is_free(step: Step, port: int) -> None:
    """Raise UserError on rank 0 where somebody listens at the port."""
    if step.task != 0:
        return
    with socket.socket() as probe:
        # as torch's own listener: connections that ended a moment ago are no hindrance
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise UserError(
                f"port {port} of {socket.gethostname()}, where the ranks of Slurm's step "
                f"{step.job}.{step.number} meet, is in use; type MASTER_PORT=NUMBER of a free one "
                "before srun"
            ) from None


def _address_of(name: str) -> str:
    """What a name resolves to here; empty if to nothing."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return ""
    return str(found[0][4][0])


def _address_that_slurm_uses(node: str) -> str:
    """NodeAddr of a node in Slurm's configuration; empty where Slurm can't be asked."""
    if shutil.which("scontrol") is None:
        return ""
    command = ["scontrol", "--oneliner", "show", "node", node]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=SCONTROL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return ""
    told = re.search(r"\bNodeAddr=(\S+)", answer.stdout)
    return told[1] if told else ""

"""The exact command of a start, for each launcher: what a user could type as well."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from launch.hosts import HERE, Slots

TRAINER = ("--module", "pretrain.train")
# Of srun, however the cluster or the job have set them: ranks see all cores and GPUs of their node,
# as under DeepSpeed; a failed one does not have the others killed at once, which would hide exit
# code 2 behind that of a signal, as srun tells the highest. They end by themselves, or after 120 s.
SRUN = (
    *("srun", "--overlap", "--mpi=none", "--cpu-bind=none", "--input=none"),
    *("--kill-on-bad-exit=0", "--wait=120", "--distribution=arbitrary"),
)


@dataclass(frozen=True, kw_only=True)
class Start:
    """What is to be started, and where."""

    slots: Slots
    port: str  # that the ranks meet at
    hostfile: Path | None  # which says the same as the slots; None: this machine alone, or Slurm
    is_allocated: bool = False  # the slots are of nodes that Slurm gave
    has_gpus: bool
    trainer_flags: list[str]


class Command(NamedTuple):
    """A command line, and the variables that it needs beside those of this process."""

    words: list[str]
    variables: dict[str, str]


def command_of(start: Start) -> Command:
    """How srun, or DeepSpeed's launcher, is called for a start."""
    if start.is_allocated:
        return srun_command(start)
    launcher = ["deepspeed", "--quiet", "--master_port", start.port]
    if start.hostfile is None:
        flags = ["--num_gpus", str(start.slots[HERE])]
        variables = variables_of_this_machine(start)
    else:
        # Or a single host is taken for this machine.
        flags = ["--hostfile", str(start.hostfile), "--force_multi"]
        variables = variables_of_ssh()
    return Command([*launcher, *flags, *TRAINER, *start.trainer_flags], variables)


def srun_command(start: Start) -> Command:
    """How srun is called: a node stands in its list once for each of its ranks.

    The port is a variable of the ranks alone, by which they are found: srun itself has it not.
    """
    layout = [node for node, ranks in start.slots.items() for _ in range(ranks)]
    words = [*SRUN, f"--export=ALL,MASTER_PORT={start.port}"]
    words += [f"--nodes={len(start.slots)}", f"--ntasks={len(layout)}"]
    words += [f"--nodelist={','.join(layout)}"]
    if start.has_gpus:
        words += ["--gpu-bind=none"]
    words += [sys.executable, "-u", "-m", "pretrain.train", *start.trainer_flags]
    return Command(words, {} if start.has_gpus else {"DS_ACCELERATOR": "cpu"})


def variables_of_this_machine(start: Start) -> dict[str, str]:
    """Each rank takes its share of the cores, unless OMP_NUM_THREADS is set already."""
    cores = len(os.sched_getaffinity(0))
    share = max(1, cores // start.slots[HERE])
    variables = {"OMP_NUM_THREADS": os.getenv("OMP_NUM_THREADS", str(share))}
    if not start.has_gpus:
        variables["DS_ACCELERATOR"] = "cpu"
    return variables


def variables_of_ssh() -> dict[str, str]:
    """Ranks get a terminal, so that they end when ssh does; and ssh ends, by itself, 15 s after
    its node fell silent: three questions, 5 s apart, without an answer.
    """
    flags = f"-tt -o ServerAliveInterval=5 {os.getenv('PDSH_SSH_ARGS_APPEND', '')}"
    return {"PDSH_SSH_ARGS_APPEND": flags}

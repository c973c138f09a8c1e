"""The exact command of a start, for each launcher: what a user could type as well."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from launch.hosts import HERE, Slots

TRAINER = ("--module", "pretrain.train")


@dataclass(frozen=True, kw_only=True)
class Start:
    """What is to be started, and where."""

    slots: Slots
    port: str  # that the ranks meet at
    hostfile: Path | None  # which says the same as the slots; None: this machine alone
    has_gpus: bool
    trainer_flags: list[str]


class Command(NamedTuple):
    """A command line, and the variables that it needs beside those of this process."""

    words: list[str]
    variables: dict[str, str]


def command_of(start: Start) -> Command:
    """How DeepSpeed's launcher is called for a start."""
    launcher = ["deepspeed", "--quiet", "--master_port", start.port]
    if start.hostfile is None:
        flags = ["--num_gpus", str(start.slots[HERE])]
        variables = variables_of_this_machine(start)
    else:
        # Or a single host is taken for this machine.
        flags = ["--hostfile", str(start.hostfile), "--force_multi"]
        variables = variables_of_ssh()
    return Command([*launcher, *flags, *TRAINER, *start.trainer_flags], variables)


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

"""Is this process one of several tasks that srun started, or was it started beside them?

srun gives its variables to each task, and a task hands them on to all that it starts: the shell of
`srun --ntasks 4 --pty bash` has them, as each command typed there, and so has a batch job that was
submitted from within a step. Those are alone. Meanings: the OUTPUT ENVIRONMENT VARIABLES of srun's
manual.
"""

import os
import re
from contextlib import suppress
from dataclasses import dataclass

import psutil

from data_prep.errors import UserError

TASKS = "SLURM_STEP_NUM_TASKS"
PLACES = re.compile(r"(\d+)(?:\(x(\d+)\))?")
# What Slurm calls the processes that start a task, but a job's script or its first shell.
STARTS_NO_RANKS = re.compile(r"slurmstepd: \[.*\.(batch|interactive|extern)\]")


@dataclass(frozen=True, kw_only=True)
class Step:
    """This task among those of its step."""

    job: int
    number: int  # of the step within its job
    tasks: int
    task: int  # its number, from 0, which is its rank
    local_tasks: int  # on this node
    local_task: int
    local_cpus: int  # of the step on this node; 0 where Slurm does not say
    node: int  # its number, from 0
    nodes: str  # as Slurm writes them: n[1-2]


def read_step() -> Step | None:
    """The step of several tasks whose variables this process has; None without one.

    Raises UserError where only some of the variables are there.
    """
    tasks = _number(TASKS) if TASKS in os.environ else 1
    if tasks == 1:
        return None
    node = _number("SLURM_NODEID")
    places = tasks_of_nodes(_text("SLURM_STEP_TASKS_PER_NODE"))
    if node >= len(places):
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE={_text('SLURM_STEP_TASKS_PER_NODE')} says nothing of the "
            f"node of SLURM_NODEID={node}; they are of different steps"
        )
    return Step(
        job=_number("SLURM_JOB_ID"),
        number=_number("SLURM_STEP_ID"),
        tasks=tasks,
        task=_number("SLURM_PROCID"),
        local_tasks=places[node],
        local_task=_number("SLURM_LOCALID"),
        local_cpus=_number("SLURM_CPUS_ON_NODE") if "SLURM_CPUS_ON_NODE" in os.environ else 0,
        node=node,
        nodes=_text("SLURM_STEP_NODELIST"),
    )


def tasks_of_nodes(text: str) -> list[int]:
    """The tasks of each node, of a list as Slurm writes it: 2(x2),1 is 2, 2, 1.

    Raises UserError.
    """
    tasks = []
    for part in text.split(","):
        place = PLACES.fullmatch(part)
        if place is None:
            raise UserError(f"{text!r}: expected tasks of nodes as Slurm writes them, as 2(x2),1")
        tasks += [int(place[1])] * int(place[2] or 1)
    return tasks


def came_as_task(step: Step) -> bool:
    """Whether this process is a task of the step, or what a task's program or script started, and
    not a command typed at a terminal, nor of a job submitted from within the step.

    Raises UserError where that can't be known.
    """
    if _starter_starts_no_ranks():
        return False
    if not _has_terminal():
        return True
    # An interactive shell gives each command typed a process group of its own; a script does not.
    try:
        return os.getpgrp() == os.getpgid(_number("SLURM_TASK_PID"))
    except OSError:  # the task can't be seen from here, as in some containers
        raise UserError(
            f"{TASKS}={step.tasks}, but it can't be seen whether this is one of these tasks or was "
            f"typed at a terminal of one; to run alone, type env -u {TASKS} before the command; "
            "for ranks, leave out --pty of srun"
        ) from None


def _starter_starts_no_ranks() -> bool:
    """Whether Slurm's process above this one runs a job's script, or its first shell."""
    with suppress(psutil.Error):  # where Slurm's processes are hidden, variables are believed
        for parent in psutil.Process().parents():
            if STARTS_NO_RANKS.match(" ".join(parent.cmdline())):
                return True
    return False


def _has_terminal() -> bool:
    """Whether this process belongs to a terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _text(name: str) -> str:
    """A variable of the step. Raises UserError where it is missing."""
    if name not in os.environ:
        raise UserError(
            f"{TASKS}={os.environ[TASKS]} says that this is one of several ranks, but {name} is "
            f"not set; start it by srun, with all of its variables, or type env -u {TASKS} before "
            "the command to run alone"
        )
    return os.environ[name]


def _number(name: str) -> int:
    """A variable of the step that holds a number. Raises UserError."""
    text = _text(name)
    if not text.isdecimal():
        raise UserError(f"{name}={text}: expected a number, as Slurm sets it")
    return int(text)

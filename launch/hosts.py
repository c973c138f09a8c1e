"""The machines of a job: what a hostfile says, which hosts answer, and what runs on them."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from data_prep.errors import UserError
from data_prep.files import write_durably

if TYPE_CHECKING:  # which takes half a second, and the doctor asks hosts without one
    from pretrain.config.recipe import Recipe

Slots = dict[str, int]  # ranks by host, in the hostfile's order
HERE = ""  # this machine, among hosts
# Runs a command on hosts, all at the same time, as `run_on` does.
RunOn = Callable[..., subprocess.CompletedProcess[str]]
# A comment, an empty line, or a host with at most 999,999 ranks.
HOST_LINE = re.compile(r"\s*(?:#.*|(\S+)\s+slots=([1-9]\d{0,5})\s*)?")
ANSWER_S = 90.0  # of a command on a machine
# Seconds that ssh has for a connection, and a command for its end; hosts asked at the same time.
PDSH = ("pdsh", "-t", "10", "-u", "45", "-f", "1024")
COUNT_GPUS = (sys.executable, str(Path(__file__).with_name("count_gpus.py")))


class Found(NamedTuple):
    """Ranks that were asked for, and those of them that machines and GPUs are there for now."""

    asked: Slots
    left: Slots


class Answers(NamedTuple):
    """What hosts said when they were asked whether they see what this machine sees."""

    left: Slots  # of those that do
    missing: list[str]  # the others
    why: str  # what the first of the others said


def read_hostfile(path: Path) -> Slots:
    """A DeepSpeed hostfile. Raises UserError for the first line that isn't one of its."""
    if not path.is_file():
        raise UserError(f"--hostfile {path}: no such file; it holds a line for each host")
    slots: Slots = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = HOST_LINE.fullmatch(line)
        if not match or match[1] in slots:
            raise UserError(
                f"--hostfile {path}: line {number}: {line}: expected one for each host, as node1 "
                "slots=8"
            )
        if match[1]:
            slots[match[1]] = int(match[2])
    if not slots:
        raise UserError(
            f"--hostfile {path}: names no host; it holds a line for each, as node1 slots=8"
        )
    return slots


def write_hostfile(path: Path, slots: Slots) -> None:
    """Write a DeepSpeed hostfile of these hosts."""
    lines = [f"{host} slots={ranks}\n" for host, ranks in slots.items()]
    write_durably(path, "".join(lines).encode())


def run_on(hosts: list[str], *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command on this machine, or on hosts by ssh, on all at the same time.

    Raises UserError where no answer came in ANSWER_S seconds. The command's exit code and what it
    printed are the caller's to read; from hosts, each line begins with the host's name.
    """
    if HERE not in hosts:
        command = (*PDSH, "-w", ",".join(hosts), shlex.join(command))
    variables = {
        "PDSH_RCMD_TYPE": "ssh",
        # Nobody is there to type a password.
        "PDSH_SSH_ARGS_APPEND": f"-oBatchMode=yes {os.getenv('PDSH_SSH_ARGS_APPEND', '')}",
    }
    return answer_of(command, variables)


def answer_of(
    command: Sequence[str], variables: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    """What a command of this machine said, whose end Ctrl-C does not bring about.

    `variables` come beside those of this process. Raises UserError where it did not end in ANSWER_S
    seconds.
    """
    try:
        return subprocess.run(
            command,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            process_group=0,  # so that Ctrl-C, which this process waits for, does not end it
            timeout=ANSWER_S,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{shlex.join(command)[:80]} ...: no answer in {ANSWER_S:.0f} s; see why"
        ) from None


def ask_hosts(asked: Slots) -> Answers:
    """Ask each host, by ssh, whether it sees this directory and this Python. Raises UserError."""
    seen_here = shlex.join(["ls", "-d", os.getcwd(), sys.executable])
    # pdsh puts the host's name into %h
    answer = run_on(list(asked), "sh", "-c", f"{seen_here} > /dev/null && echo sees %h")
    left = {host: ranks for host, ranks in asked.items() if f"sees {host}\n" in answer.stdout}
    missing = sorted(asked.keys() - left.keys())
    why = "no answer"
    for line in answer.stderr.splitlines():
        if line.partition(":")[0] in missing:
            why = line
            break
    return Answers(left, missing, why)


def count_gpus() -> int:
    """GPUs of this machine. Raises UserError where its torch or driver can't tell."""
    answer = run_on([HERE], *COUNT_GPUS)
    if not answer.stdout.strip().isdecimal():
        raise UserError(
            f"GPUs cannot be counted: {answer.stderr[-200:]}; mend the driver, or torch here"
        )
    return int(answer.stdout)


def trim(slots: Slots, recipe: "Recipe") -> Slots:
    """As many of the ranks as divide a step, those of the first hosts; all if no number does."""
    left = most_that_divide_a_step(sum(slots.values()), recipe)
    kept: Slots = {}
    for host, ranks in slots.items():
        of_host = min(ranks, left)
        if of_host > 0:
            kept[host] = of_host
        left -= of_host
    return kept


def most_that_divide_a_step(ranks: int, recipe: "Recipe") -> int:
    """The most ranks, of so many, over which a step divides; so many if it divides over none."""
    for fewer in range(ranks, 0, -1):
        if recipe.global_batch_size % (fewer * recipe.batch.micro_batch_size) == 0:
            return fewer
    return ranks

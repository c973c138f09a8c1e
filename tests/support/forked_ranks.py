"""Ranks of the training command, forked from a process that has imported it.

So a run takes a second or two, not ten. The ranks are real processes that run the real `main` in
the environment torchrun would give them; only the launcher is missing. The tests of the launchers
themselves are in tests/pretrain/test_train.py.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from support.runs import REPOSITORY, environment, free_port

TIMEOUT_S = 300


class Ended(NamedTuple):
    """How the ranks of a run ended."""

    exit_codes: list[int | None]
    output: str


@cache
def fork_server() -> ForkServerContext:
    """A process, with the tests' environment, that has imported the training command."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.preloaded"])
    before = dict(os.environ)
    # what it imports by
    fixed = environment(PYTHONPATH=f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}")
    os.environ.update(fixed)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def variables_of(ranks: int) -> list[dict[str, str]]:
    """What a launcher tells each of so many ranks, on a port of their own."""
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def become_a_rank(variables: dict[str, str], log: Path) -> None:
    """The begin of a forked rank's body: a launcher's variables, and output to a file."""
    assert "support.preloaded" in sys.modules  # an import that fails there is not said

    from pretrain.distributed import agree

    # no launcher ends the other ranks here: they would just wait
    agree.LET_RANK_0_SPEAK_S = 0.5
    os.environ.update(variables)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def be_a_rank(arguments: list[str], variables: dict[str, str], log: Path) -> None:
    """Body of a forked rank that runs the training command."""
    become_a_rank(variables, log)
    from pretrain.train import main

    sys.exit(main(arguments))


def start_ranks(
    arguments: list[str],
    logs: list[Path],
    body: Callable[..., None] = be_a_rank,
    **more_variables: str,
) -> list[BaseProcess]:
    """Start the training command on as many ranks as there are files for their output."""
    processes = []
    for variables, log in zip(variables_of(len(logs)), logs, strict=True):
        own = (arguments, {**variables, **more_variables}, log)
        processes.append(fork_server().Process(target=body, args=own))
        processes[-1].start()
    return processes


def end_of(processes: list[BaseProcess], logs: list[Path], timeout_s: float = TIMEOUT_S) -> Ended:
    """Wait for ranks; those that are still there then are killed, which their exit codes show."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return Ended(
        [process.exitcode for process in processes], "".join(log.read_text() for log in logs)
    )


def arguments_of(recipe: Path, data: Path, run_dir: Path, *more: str) -> list[str]:
    """The flags of a run."""
    return ["--recipe", str(recipe), "--data-dir", str(data), "--run-dir", str(run_dir), *more]


def logs_of(ranks: int, run_dir: Path) -> list[Path]:
    """Where the ranks of a run print."""
    return [run_dir.with_name(f"{run_dir.name}.rank-{rank}.log") for rank in range(ranks)]


def run_ranks(
    ranks: int,
    recipe: Path,
    data: Path,
    run_dir: Path,
    *more: str,
    body: Callable[..., None] = be_a_rank,
    **env: str,
) -> Ended:
    """Run the training command on so many ranks; their exit codes and all they printed."""
    logs = logs_of(ranks, run_dir)
    return end_of(start_ranks(arguments_of(recipe, data, run_dir, *more), logs, body, **env), logs)


def train_on(ranks: int, recipe: Path, data: Path, run_dir: Path, *more: str) -> str:
    """Run the training command on so many ranks and insist on success; what it printed."""
    ended = run_ranks(ranks, recipe, data, run_dir, *more)
    assert ended.exit_codes == [0] * ranks, ended.output
    return ended.output

"""Ranks of the training command, forked from a process that has imported it: seconds a run, not ten of them.

The ranks are real processes that run the real `main` in the environment torchrun would give them; only the
launcher is missing. The tests of the launchers themselves are in test_train.py.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import NamedTuple

from conftest import environment, free_port

TIMEOUT_S = 300


class Ended(NamedTuple):
    """How the ranks of a run ended."""

    exit_codes: list[int | None]
    output: str


@cache
def fork_server() -> ForkServerContext:
    """A process with the tests' environment that has imported the training command and waits to be forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pretrain.train"])
    before, fixed = dict(os.environ), environment()
    os.environ.update(fixed)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def be_a_rank(arguments: list[str], variables: dict[str, str], log: Path) -> None:
    """Body of a forked rank: a launcher's variables, output to a file, then the command."""
    os.environ.update(variables)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from pretrain.train import main

    sys.exit(main(arguments))


def start_ranks(
    ranks: int,
    recipe: Path,
    data: Path,
    run_dir: Path,
    *more: str,
    body: Callable[..., None] = be_a_rank,
    **environment: str,
) -> tuple[list[ForkServerProcess], list[Path]]:
    """The training command on so many ranks: their processes, and the files that hold what they print."""
    logs = [run_dir.with_name(f"{run_dir.name}.rank-{rank}.log") for rank in range(ranks)]
    arguments = ["--recipe", str(recipe), "--data-dir", str(data), "--run-dir", str(run_dir), *more]
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
    processes = []
    for rank, log in enumerate(logs):
        variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(fork_server().Process(target=body, args=(arguments, variables, log)))
        processes[-1].start()
    return processes, logs


def end_of(processes: list[ForkServerProcess], logs: list[Path], timeout_s: float = TIMEOUT_S) -> Ended:
    """Wait for ranks; those that are still there then are killed, which their exit codes show."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return Ended([process.exitcode for process in processes], "".join(log.read_text() for log in logs))


def run_ranks(
    ranks: int, recipe: Path, data: Path, run_dir: Path, *more: str, body: Callable[..., None] = be_a_rank, **env: str
) -> Ended:
    """Run the training command on so many ranks; their exit codes and all they printed."""
    return end_of(*start_ranks(ranks, recipe, data, run_dir, *more, body=body, **env))


def train_on(ranks: int, recipe: Path, data: Path, run_dir: Path, *more: str) -> str:
    """Run the training command on so many ranks and insist on success; what it printed."""
    ended = run_ranks(ranks, recipe, data, run_dir, *more)
    assert ended.exit_codes == [0] * ranks, ended.output
    return ended.output

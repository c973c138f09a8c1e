"""How ranks agree: on values, on an error, and on who says it.

Works the same under `deepspeed`, `torchrun`, `mpiexec` and as one plain process; before there is a
process group, a rank agrees with itself.
"""

import contextlib
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch.distributed as dist
from tqdm import tqdm

from data_prep.commands import unheard
from data_prep.errors import (
    USER_ERROR_EXIT_CODE,
    UserError,
    exit_code_of,
    one_line,
    os_error_line,
    printable,
)
from pretrain.distributed.world import LET_RANK_0_SPEAK_S, World

T = TypeVar("T")
WARNING = "warning: "  # what a line of the log that warns begins with
MOST_WARNINGS = 8  # that are kept, for whoever shows them once more
Group = dist.ProcessGroup | None  # None: all ranks, as training has them


def gather(value: Any, group: Group = None) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if not dist.is_initialized():  # alone, or before the ranks have met
        return [value]
    # By pickle, which is safe here: the ranks of a run trust one another.
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def barrier() -> None:
    """Wait for every rank."""
    gather(None)


class SharedError(UserError):
    """What one rank met, raised on all; with the exit code that it has there."""

    def __init__(self, message: str, exit_code: int = USER_ERROR_EXIT_CODE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class LoneError(SharedError):
    """What one rank met amid a step, where the others wait for it.

    Its watch tells them, and they end.
    """


@contextlib.contextmanager
def met_alone() -> Iterator[None]:
    """Input that turns out to be bad inside does so on this rank alone."""
    try:
        yield
    except UserError as error:
        raise LoneError(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How an action went on one rank."""

    host: str
    failure: str | None = None
    exit_code: int = 0


def together(action: Callable[[], T], group: Group = None) -> T:
    """Run an action on every rank; if it fails on any of them, raise the first failure on all."""
    answer = Answer(host=socket.gethostname())
    result: T | None = None
    # Any other exception is a fault of ours: it ends its rank with a traceback, and the watch the
    # others.
    try:
        result = action()
    except (UserError, OSError) as error:
        answer = replace(answer, failure=os_error_line(error), exit_code=exit_code_of(error))
    answers: list[Answer] = gather(answer, group)
    for each in answers:
        if each.failure is None:
            continue
        # Rank 0 says it: of its own machine a path needs no name.
        if each.host == answers[0].host:
            raise SharedError(each.failure, each.exit_code)
        raise SharedError(f"on {each.host}: {each.failure}", each.exit_code)
    return cast(T, result)


def exit_with(error: UserError, world: World) -> int:
    """Rank 0 prints the one line; the others let it, since launchers end a job at the first exit.

    A rank that is still there after that, and met an error that rank 0 did not, prints its own.
    """
    if not world.is_main:
        time.sleep(LET_RANK_0_SPEAK_S)
    if world.is_main or not isinstance(error, SharedError):
        where = "" if world.is_main else f" on rank {world.rank} ({socket.gethostname()})"
        with unheard():
            print(f"error{where}: {printable(one_line(error))}", file=sys.stderr, flush=True)
    # Threads of a process group abort, now and then, a process that ends as usual.
    if world.world_size > 1:
        os._exit(error.exit_code)
    return error.exit_code


@dataclass
class Log:
    """How much this process says, and what it warned of last."""

    is_quiet: bool = False  # only what asks for somebody's attention
    warnings: deque[str] = field(default_factory=lambda: deque(maxlen=MOST_WARNINGS))


LOG = Log()


def inform(world: World, text: str) -> None:
    """Lines of the log, from rank 0: a quiet run leaves out what is no warning."""
    for line in text.splitlines():
        if line.startswith(WARNING) or not LOG.is_quiet:
            say(world, line)


def say(world: World, text: str) -> None:
    """One line of the log, from rank 0, that asks for somebody's attention."""
    if world.is_main:
        if text.startswith(WARNING):
            LOG.warnings.append(text)
        with unheard():
            tqdm.write(text, file=sys.stderr)

"""SIGTERM, SIGINT and SIGUSR1 (Slurm's warning) end a run after its step, saved.

A second one, SAME_SIGNAL_S later, ends it at once.
"""

import os
import signal
import time
from contextlib import suppress
from typing import Any

from data_prep.commands import SAME_SIGNAL_S, signal_name
from pretrain.distributed.world import World
from pretrain.engine.engine import Engine
from pretrain.view.terminal import WRITTEN_BELOW

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def say_at_once(line: str) -> None:
    """On stderr, past Python's own buffers: a print would fail where the signal interrupts one."""
    WRITTEN_BELOW.append(line)
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())


def end_on_signals(engine: Engine, world: World) -> None:
    """Have a signal to any rank end the run on all of them, which learn of it in the exchange of
    a step.
    """
    first_at: list[float] = []

    def handle(number: int, _: Any) -> None:
        if first_at and time.monotonic() - first_at[0] > SAME_SIGNAL_S:
            os._exit(128 + number)  # what was saved before stays
        if not first_at:
            first_at.append(time.monotonic())
            engine.wants_end = number
            if world.is_main:
                say_at_once(
                    f"{signal_name(number)}: ending after this step; one more, after 2 s, ends it "
                    "at once"
                )

    for number in ENDING:
        signal.signal(number, handle)

"""Where a step's time and memory go, measured without making the device wait.

On a GPU the marks are events on its stream, read at the one place in a step where host and device
meet anyway: where loss and gradient norm are read, just before the update. So a step is timed from
one such place to the next, and the optimizer's seconds in it are those of the update before.
"""

import itertools
import resource
import sys
import time
from typing import Any, NamedTuple, Self

import torch

PHASES = ("data", "forward", "backward", "optimizer", "other")
PAUSE = "pause"  # validation and saving: between steps, part of none


class Mark(NamedTuple):
    """The end of a phase."""

    phase: str
    at_s: float = 0.0
    event: torch.cuda.Event | None = None  # on a GPU, instead of the host's seconds

    def seconds_since(self, earlier: Self) -> float:
        """Between an earlier mark and this one."""
        if self.event is None or earlier.event is None:
            return self.at_s - earlier.at_s
        milliseconds = earlier.event.elapsed_time(self.event)
        return float(milliseconds) / 1e3


class StepClock:
    """Seconds of each phase of a step.

    The time between two marks belongs to the phase that the second one names.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self._marks: list[Mark] = []
        self._steps = 0
        self._blocks = 0
        self.mark(PAUSE)

    def mark(self, phase: str) -> None:
        """End a phase here."""
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(Mark(phase, event=event))
        else:
            self._marks.append(Mark(phase, at_s=time.perf_counter()))

    def split(self) -> dict[str, float]:
        """Seconds of each of PHASES since the last call.

        The device must have reached the last mark.
        """
        seconds = dict.fromkeys(PHASES, 0.0)
        for start, end in itertools.pairwise(self._marks):
            if end.phase != PAUSE:
                seconds[end.phase] += end.seconds_since(start)
        self._marks = self._marks[-1:]
        self._steps += 1
        return seconds

    def note_progress(self) -> None:
        """Count a block of a checkpoint that was written, or a file of data that was checked.

        Any thread may call it.
        """
        self._blocks += 1

    def place(self) -> list[Any]:
        """How far this rank is: steps, marks in the step, the last one's phase, blocks written."""
        return [self._steps, len(self._marks), self._marks[-1].phase, self._blocks]


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held: the device's, or on a CPU the process's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return most
    return most * 1024  # Linux counts in KiB

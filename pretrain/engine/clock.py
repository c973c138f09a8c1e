"""Where a step's time and memory go, measured without making the device wait.

On a GPU the marks are events on its stream, read at the one place in a step where host and device
meet anyway: where loss and gradient norm are read, just before the update. So a step is timed from
one such place to the next, and the optimizer's seconds in it are those of the update before.
"""

import resource
import sys
import time
from typing import Any

import torch

PHASES = ("data", "forward", "backward", "optimizer", "other")
PAUSE = "pause"  # validation and saving: between steps, part of none


class StepClock:
    """Seconds of each phase of a step. The time between two marks belongs to the phase that the
    second one names.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._steps = 0
        self._blocks = 0
        self.mark(PAUSE)

    def mark(self, phase: str) -> None:
        """End a phase here."""
        now: float | torch.cuda.Event = time.perf_counter()
        if self.on_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((phase, now))

    def split(self) -> dict[str, float]:
        """Seconds of each of PHASES since the last call. The device must have reached the last
        mark.
        """
        seconds = dict.fromkeys((*PHASES, PAUSE), 0.0)
        for (_, start), (phase, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[phase] += start.elapsed_time(end) / 1e3 if self.on_cuda else end - start  # type: ignore
        self._marks = self._marks[-1:]
        self._steps += 1
        del seconds[PAUSE]
        return seconds

    def saved_block(self) -> None:
        """Count a block of a checkpoint that was written, or a file of data checked, from
        whichever thread did so.
        """
        self._blocks += 1

    def place(self) -> list[Any]:
        """How far this rank is: steps, marks in the step, the last one's phase, and blocks
        written.
        """
        return [self._steps, len(self._marks), self._marks[-1][0], self._blocks]


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held: the device's, or on a CPU the process's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )

"""Profiles some steps of a run."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

TRACE_NAME, TABLE_NAME = "trace.json", "table.txt"


class StepProfiler:
    """Profiles some steps, if any: a trace for Perfetto or chrome://tracing, and a table of the
    ten largest costs.
    """

    SKIPPED_STEPS = 2  # the first steps compile, allocate and fill caches

    def __init__(self, steps: int, of: range, output_dir: Path, say: Callable[[str], None]) -> None:
        self.first = (
            max(of.start, min(of.start + self.SKIPPED_STEPS, of.stop - steps)) if steps else -1
        )
        self.last = min(self.first + steps, of.stop) - 1 if steps else -1
        self.output_dir = output_dir
        self.say = say
        activities = [
            ProfilerActivity.CPU,
            *([ProfilerActivity.CUDA] if torch.cuda.is_available() else []),
        ]
        self.profile = profile(activities=activities)

    def before(self, step: int) -> None:
        """Start before the first profiled step."""
        if step == self.first:
            self.profile.start()

    def after(self, step: int) -> None:
        """Stop after the last one; write and show what was found."""
        if step == self.last:
            self.profile.stop()
            self.write()

    def write(self) -> None:
        """Trace and table, as files and on the log."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.profile.export_chrome_trace(str(self.output_dir / TRACE_NAME))
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self.profile.key_averages().table(
            sort_by=key, row_limit=10, max_name_column_width=50
        )
        (self.output_dir / TABLE_NAME).write_text(table, encoding="utf-8")
        self.say(
            f"{table}\nsteps {self.first} to {self.last}; trace: {self.output_dir / TRACE_NAME}"
        )

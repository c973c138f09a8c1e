"""How long a sink that is named late takes to draw a long run, and how much memory that needs.

    python tests/benchmarks/late_sinks.py [--steps 50000,200000]

For every sink and number of steps a process of its own begins with a hand-made metrics.jsonl of
that many steps, as a start does that goes on after the last of them, and ends when the sink has
drawn all. CPU time is that of the process, all threads; peak memory is beyond that of a sink that
has nothing to draw. Four times the steps that take more than four times the time, or more memory,
show in the rows. W&B is offline, and its own process is not counted.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from support.hand_made_runs import trained_step

from pretrain.config.recipe import SINKS
from pretrain.metrics.metrics_file import MetricsFile
from pretrain.metrics.sinks import Sinks
from pretrain.metrics.told import AboutRun

PATIENCE_S = 3600.0
MEGABYTE = 1e6


def write_metrics(run_dir: Path, steps: int) -> None:
    """The metrics.jsonl of so many steps."""
    run_dir.mkdir()
    file = MetricsFile(run_dir, 0)
    for step in range(steps):
        file.append(trained_step(step))
    file.close()


def draw(sink: str, run_dir: Path, steps: int) -> None:
    """Have a sink draw what there is, in this process; prints seconds, CPU seconds and bytes."""
    about = AboutRun(run_dir=run_dir, config={}, restarts=frozenset(), bytes_per_token=4.0)
    began = time.monotonic()
    cpu_began = time.process_time()
    sinks = Sinks([sink], about, steps, print)
    sinks.close(steps, PATIENCE_S)
    cpu_s = time.process_time() - cpu_began
    if sinks.feeds[0].next_step != steps:
        sys.exit(f"{sink}: drew {sinks.feeds[0].next_step} of {steps} steps")
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("DRAWN", time.monotonic() - began, cpu_s, peak_bytes)


def drawn(sink: str, run_dir: Path, steps: int) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak bytes of a process that has a sink draw a run."""
    command = [sys.executable, __file__, "--draw", sink, str(run_dir), str(steps)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("DRAWN")]
    if not lines:
        sys.exit(result.stdout + result.stderr)
    seconds, cpu_s, peak_bytes = lines[0][1:]
    return float(seconds), float(cpu_s), float(peak_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", default="50000,200000")
    parser.add_argument("--draw", nargs=3, metavar=("SINK", "RUN_DIR", "STEPS"))
    flags = parser.parse_args()
    if flags.draw:
        sink, run_dir, steps = flags.draw
        draw(sink, Path(run_dir), int(steps))
        return
    print("| sink | steps | CPU time | until drawn | peak memory beyond none |")
    print("|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": folder}
        for sink in SINKS:
            (Path(folder) / f"{sink}-0").mkdir()
            *_, nothing = drawn(sink, Path(folder) / f"{sink}-0", 0)
            for steps in map(int, flags.steps.split(",")):
                run_dir = Path(folder) / f"{sink}-{steps}"
                write_metrics(run_dir, steps)
                seconds, cpu_s, peak = drawn(sink, run_dir, steps)
                more = (peak - nothing) / MEGABYTE
                figures = f"{cpu_s:.1f} s | {seconds:.1f} s | {more:.0f} MB"
                print(f"| `{sink}` | {steps:,} | {figures} |", flush=True)


if __name__ == "__main__":
    main()

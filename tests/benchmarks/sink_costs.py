"""What sinks cost a run: CPU time of a step's record, for training and for each sink's thread.

    python tests/benchmarks/sink_costs.py [--steps 5000] [--step-s 0.48]

Records of steps are handed on, as `Trainer._record` does it, to one sink at a time, with a pause
after each, so that no queue fills. The CPU time of this process, less that of the same without a
sink, is divided by the steps. W&B is offline, and its own process, which takes another core, is not
counted; trackio keeps its project in a temporary folder. `--step-s` is the time of a step that the
share is of: by default that of the quick start's shape on two shared CPU cores.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from support.hand_made_runs import trained_step

from pretrain.config.recipe import SINKS
from pretrain.metrics.sinks import Sinks
from pretrain.metrics.told import AboutRun

PAUSE_S = 0.0005


def cpu_seconds(names: list[str], steps: int, home: Path) -> tuple[float, float]:
    """CPU time of the process a step, and of that what the training thread had, both in seconds."""
    run_dir = home / "-".join(["run", *names])
    run_dir.mkdir()
    about = AboutRun(run_dir=run_dir, config={}, restarts=frozenset(), bytes_per_token=4.0)
    sinks = Sinks(names, about, 0, print)
    sinks.add(trained_step(0))
    while sinks.feeds and not sinks.feeds[0].next_step:  # imports and the begin are paid once
        time.sleep(0.1)
    in_training = 0.0
    began = time.process_time()
    for step in range(1, steps + 1):
        record = trained_step(step)
        before = time.thread_time()
        sinks.add(record)
        in_training += time.thread_time() - before
        time.sleep(PAUSE_S)
    used = time.process_time() - began
    sinks.close(0, 60.0)
    return used / steps, in_training / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--step-s", type=float, default=0.48)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": folder}
        alone, _ = cpu_seconds([], flags.steps, Path(folder))
        print("| sink | in the training thread | in all threads | of a step |")
        print("|---|---:|---:|---:|")
        for name in SINKS:
            used, in_training = cpu_seconds([name], flags.steps, Path(folder))
            whole = used - alone
            share = whole / flags.step_s
            print(f"| `{name}` | {in_training * 1e6:.1f} us | {whole * 1e6:.0f} us | {share:.3%} |")


if __name__ == "__main__":
    main()

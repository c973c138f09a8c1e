"""What all that observes a run costs a step: metrics.jsonl, sinks, lines of the log, the block.

    python tests/benchmarks/observer_costs.py [--steps 30] [--step-s 0.48]

Records of steps come at the pace of a run's, as `Trainer._show` and `Trainer._record` hand them on,
first to nobody, then to each observer, then to all together: the block on a pseudo-terminal that
another process reads, lines of the log into a file. CPU time is that of the training thread and of
all threads, less that of the pause alone; other processes may use the cores meanwhile. W&B is
offline and its own process is not counted. `--step-s` is by default the time of a step of the quick
start's shape on two shared cores.
"""

import argparse
import os
import pty
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from support.hand_made_runs import trained_step

from pretrain.config.load import load_recipe
from pretrain.config.recipe import SINKS
from pretrain.distributed.world import World
from pretrain.metrics.metrics_file import MetricsFile
from pretrain.metrics.sinks import Sinks
from pretrain.metrics.told import AboutRun
from pretrain.view.log_lines import LogLines
from pretrain.view.progress import LiveBlock, Nothing, View

ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)
LEFT_S = 100.0  # of the run, as far as the display is told


@dataclass(frozen=True, kw_only=True)
class Observers:
    """Who looks at a run."""

    keeps_metrics: bool = False
    sinks: tuple[str, ...] = ()
    display: str = ""  # block, log lines, or none


@dataclass(frozen=True, kw_only=True)
class Cost:
    """CPU seconds a step."""

    in_training: float
    in_all: float


def open_view(display: str, steps: int) -> View:
    """What is shown of a run on stderr."""
    recipe = load_recipe("quickstart")
    if display == "block":
        from pretrain.view.block import About

        return LiveBlock(About(name="run"), steps)
    if display == "log lines":
        return LogLines(ALONE, replace(recipe.log, every_steps=1), steps)
    return Nothing()


def cost_of(observers: Observers, steps: int, step_s: float, run_dir: Path) -> Cost:
    """What observers use up in this process while so many steps pass."""
    run_dir.mkdir()
    about = AboutRun(run_dir=run_dir, config={}, restarts=frozenset(), bytes_per_token=4.0)
    metrics = MetricsFile(run_dir, 0) if observers.keeps_metrics or observers.sinks else None
    sinks = Sinks(observers.sinks, about, 0, print)
    view = open_view(observers.display, steps + 1)
    sinks.add(trained_step(0))
    while not all(feed.next_step for feed in sinks.feeds):  # imports and the begin are paid once
        time.sleep(0.1)
    in_training = 0.0
    began = time.process_time()
    for step in range(1, steps + 1):
        record = trained_step(step)
        before = time.thread_time()
        view.show(record, LEFT_S)
        if metrics:
            metrics.append(record)
        sinks.add(record)
        in_training += time.thread_time() - before
        time.sleep(step_s)
    used = time.process_time() - began
    view.close()
    sinks.close(0, 60.0)
    return Cost(in_training=in_training / steps, in_all=used / steps)


def on_a_terminal() -> subprocess.Popen[bytes]:
    """Make stderr a terminal; the process that reads it."""
    main_end, side = pty.openpty()
    reader = subprocess.Popen(["cat"], stdin=main_end, stdout=subprocess.DEVNULL)
    os.dup2(side, 2)
    return reader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--step-s", type=float, default=0.48)
    flags = parser.parse_args()
    rows = {
        "`metrics.jsonl`": Observers(keeps_metrics=True),
        "a line of the log each step": Observers(display="log lines"),
        "the block on a terminal": Observers(display="block"),
        "all three sinks": Observers(keeps_metrics=True, sinks=SINKS),
        "all, with the block": Observers(keeps_metrics=True, sinks=SINKS, display="block"),
    }
    reader = on_a_terminal()
    print("| observed by | in the training thread | in all threads | of a step |")
    print("|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": folder}
        nobody = cost_of(Observers(), flags.steps, flags.step_s, Path(folder) / "nobody")
        for number, (name, observers) in enumerate(rows.items()):
            run_dir = Path(folder) / f"run-{number}"
            cost = cost_of(observers, flags.steps, flags.step_s, run_dir)
            whole = cost.in_all - nobody.in_all
            own = f"{cost.in_training * 1e6:.0f} us | {whole * 1e6:.0f} us"
            print(f"| {name} | {own} | {whole / flags.step_s:.2%} |", flush=True)
    reader.terminate()
    reader.wait()


if __name__ == "__main__":
    main()

"""From the command to the first step's record: srun beside deepspeed, two ranks on one node each.

    python tests/benchmarks/launch_speed.py [--rounds 3]

Both train the same tiny recipe, in turn, each round the other one first; the first round is not
kept (files come into the page cache). srun's is that of the Slurm in tests/support/slurm.py. What
counts is the ratio: seconds depend on what else the machine does.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from support.runs import counting_dataset, launch_training, write_recipe
from support.slurm import Slurm, slurm
from support.waiting import wait_until

SRUN = ("srun", "--nodes=1", "--ntasks=2", "--kill-on-bad-exit=1")


def seconds_to_first_step(cluster: Slurm, command: list[str], run_dir: Path) -> float:
    """How long a command takes until its first step is on disk; it runs to its end."""
    metrics = run_dir / "metrics.jsonl"
    log = run_dir.with_suffix(".log")
    began = time.monotonic()
    job = cluster.start(*command, log=log)

    def has_a_step() -> bool:
        return metrics.exists() and b"\n" in metrics.read_bytes()

    wait_until(has_a_step, "the first step", job=job, log=log, every_s=0.005)
    seconds = time.monotonic() - began
    if job.wait(120) != 0:
        raise subprocess.CalledProcessError(job.returncode, command, log.read_text())
    return seconds


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="to keep (%(default)s)")
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {"deepspeed": [], "srun": []}
    with tempfile.TemporaryDirectory(prefix="launch-speed-") as home:
        base = Path(home)
        data = counting_dataset(base / "data")
        recipe = write_recipe(base / "recipe.yaml", train_tokens=2 * 6 * 32)
        with slurm(base / "slurm") as cluster:
            for number in range(rounds + 1):
                order = ["deepspeed", "srun"]
                if number % 2:
                    order.reverse()
                for launcher in order:
                    run_dir = base / f"{launcher}-{number}"
                    command = launch_training(2, recipe, data, run_dir)
                    if launcher == "srun":
                        flags = command[command.index("--recipe") :]
                        command = [*SRUN, sys.executable, "-m", "pretrain.train", *flags]
                    seconds[launcher].append(seconds_to_first_step(cluster, command, run_dir))
    medians = {launcher: statistics.median(kept[1:]) for launcher, kept in seconds.items()}
    for launcher, median in medians.items():
        print(f"{launcher:10} {median:6.2f} s")
    print(f"srun / deepspeed: {medians['srun'] / medians['deepspeed']:.2f}")


if __name__ == "__main__":
    main()

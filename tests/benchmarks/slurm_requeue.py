"""How soon a job of Slurm that was queued again trains again, beside launch/pretrain.sh without it.

    python tests/benchmarks/slurm_requeue.py --rounds 3

Starts a Slurm of two nodes on this machine, as root, and trains a tiny run of two ranks in it. In
each round the job is warned, saves, is queued again and begins at once; taken is the time from the
moment that Slurm calls the job running to the first step behind the saved ones. The same run, on
one machine and with DeepSpeed's launcher, takes turns with it: from the command to that step.
"""

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from support.runs import REPOSITORY, counting_dataset, environment, steps_of, write_recipe
from support.slurm import Slurm, slurm
from support.waiting import wait_until


def wait_for_a_step(run_dir: Path) -> float:
    """Seconds until a run has one more step than now."""
    steps = steps_of(run_dir)
    begun = time.monotonic()
    wait_until(lambda: steps_of(run_dir) > steps, "a step", 300, every_s=0.02)
    return time.monotonic() - begun


def requeued(cluster: Slurm, job: str, run_dir: Path) -> float:
    """Seconds of a job that is warned and queued again, from its start to its first step."""
    cluster.scancel("--signal=USR1", "--batch", job)
    cluster.wait_for(job, "PENDING")
    cluster.begin_now(job)
    cluster.wait_for(job, "RUNNING")
    return wait_for_a_step(run_dir)


def typed_again(flags: list[str], run_dir: Path) -> float:
    """Seconds from the command that continues a run on this machine to its first step."""
    with subprocess.Popen(
        ["launch/pretrain.sh", "--ranks=2", *flags, "--run-dir", str(run_dir)],
        cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
    ) as job:  # fmt: skip
        taken = wait_for_a_step(run_dir)
        job.send_signal(signal.SIGTERM)
    return taken


def main() -> None:
    """Print the medians, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    home = Path(tempfile.mkdtemp(prefix="slurm-requeue-"))
    recipe = write_recipe(home / "tiny.yaml", train_tokens=10**5 * 6 * 32)
    flags = ["--recipe", str(recipe), "--data-dir", str(counting_dataset(home / "data"))]
    with slurm(home / "slurm") as cluster:
        in_slurm = home / "in-slurm"
        words = ["--nodes=2", f"--output={home / 'log'}", "launch/pretrain.slurm", *flags]
        job = cluster.sbatch(*words, "--run-dir", str(in_slurm))
        wait_for_a_step(in_slurm)
        alone = home / "alone"
        typed_again(flags, alone)
        taken: dict[str, list[float]] = {"requeued job": [], "pretrain.sh": []}
        for _ in range(rounds):
            taken["requeued job"].append(requeued(cluster, job, in_slurm))
            cluster.scontrol("suspend", job)
            taken["pretrain.sh"].append(typed_again(flags, alone))
            cluster.scontrol("resume", job)
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    for name, seconds in taken.items():
        print(f"{name:14} {medians[name]:5.1f} s   {' '.join(f'{each:.1f}' for each in seconds)}")
    print(f"ratio          {medians['requeued job'] / medians['pretrain.sh']:5.2f}")


if __name__ == "__main__":
    main()

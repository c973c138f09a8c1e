"""Cells an hour of a comparison: some at once, against one after another with all cores.

    python tests/benchmarks/compare_at_once.py [--at-once 2] [--seeds 2] [--steps 60] [--rounds 3]

The recipe compare_small on a synthetic data set of 4,096 ids, two inputs over some seeds, started
by the command itself: what is counted goes from the command to the page, so the start of each run
and its evaluation are in it. Both ways take turns at going first; the ratio is the median over
rounds. Meant for a machine with nothing else on it.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "tests"))

from support.runs import counting_dataset

VOCAB_SIZE = 4096
TOKENS_A_STEP = 4096  # of compare_small
INPUTS = 2
SECONDS_OF_AN_HOUR = 3600
GOAL = 1.6


def seconds_of(data_dir: Path, output_dir: Path, at_once: int, flags: argparse.Namespace) -> float:
    """One whole comparison."""
    seeds = ",".join(map(str, range(1, flags.seeds + 1)))
    command = [sys.executable, "-m", "pretrain.compare", "--recipe", "compare_small"]
    command += ["--data-dir", str(data_dir), "--output-dir", str(output_dir)]
    command += ["--vary", "model.input_embedding=binary_code,learned", "--vary", f"seed={seeds}"]
    command += ["--baseline", "model.input_embedding=learned", "--at-once", str(at_once)]
    command += [f"--train_tokens={flags.steps * TOKENS_A_STEP}"]
    began = time.perf_counter()
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(result.stdout + result.stderr)
    return time.perf_counter() - began


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    cells = INPUTS * flags.seeds
    ways = (1, flags.at_once)
    rates: dict[int, list[float]] = {at_once: [] for at_once in ways}
    with tempfile.TemporaryDirectory() as home:
        data_dir = counting_dataset(Path(home) / "dataset", VOCAB_SIZE, times=40)
        for number in range(flags.rounds):
            in_turn = ways if number % 2 == 0 else ways[::-1]
            for at_once in in_turn:
                output_dir = Path(home) / f"round-{number}-{at_once}"
                seconds = seconds_of(data_dir, output_dir, at_once, flags)
                rates[at_once].append(cells * SECONDS_OF_AN_HOUR / seconds)
                print(f"round {number}, {at_once} at once: {rates[at_once][-1]:.1f} cells/h")
    ratios = [many / one for one, many in zip(*rates.values(), strict=True)]
    print(f"\n| {cells} cells of {flags.steps} steps | cells/h (median) |\n|---|---:|")
    for at_once in ways:
        print(f"| {at_once} at once | {statistics.median(rates[at_once]):.1f} |")
    print(f"\nratio {statistics.median(ratios):.2f} (goal {GOAL}), of {sorted(ratios)}")


if __name__ == "__main__":
    main()

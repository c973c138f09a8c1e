"""What a run leaves on the disk: its lines and its tensors, held against those of another."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.checkpoint.reader import Checkpoint

TIMINGS = (
    "tokens_per_s",
    "tokens_per_s_per_rank",
    "step_s",
    "seconds",
    "peak_memory_bytes",
    "slowest",
    "mfu_of_matmul",
)
STATES = ("master", "exp_avg", "exp_avg_sq")
LAST_BYTES = 8192  # of metrics.jsonl: they hold its last line

Line = dict[str, Any]


class Stamp(NamedTuple):
    """What changes whenever a file is written; zeros where there is none."""

    inode: int
    mtime_ns: int


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file or directory."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return Stamp(0, 0)
    return Stamp(status.st_ino, status.st_mtime_ns)


def lines_of(run_dir: Path) -> list[Line]:
    """The whole lines of metrics.jsonl, without what a clock measured."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = text.split("\n")[:-1]  # what follows the last line's end is torn
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMINGS}
        for line in whole
    ]


def last_step(path: Path) -> int:
    """The step of the last whole line of metrics.jsonl; -1 if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            whole = file.read().split(b"\n")[:-1]
        return int(json.loads(whole[-1])["step"]) if whole else -1
    except (FileNotFoundError, ValueError):
        return -1


def is_near(found: float | None, expected: float, relative: float) -> bool:
    """Whether a figure is the expected one, or as near to it as the order of sums may be."""
    if found == expected:
        return True
    if not relative or found is None:
        return False
    return abs(found - expected) <= relative * abs(expected)


def line_problems(lines: list[Line], reference: list[Line], relative: float = 0.0) -> list[str]:
    """What is wrong with lines of a run that a kill may have cut short."""
    steps = [line["step"] for line in lines]
    if steps != list(range(len(lines))):
        return [f"metrics.jsonl holds steps {steps}, expected one line for each"]
    problems = []
    for line, expected in zip(lines, reference, strict=False):
        for key, value in expected.items():
            found = line.get(key)
            if is_near(found, value, relative):
                continue
            if relative and key == "gradient_norm":  # the order of its sums shows more
                continue
            problems.append(f"step {line['step']}: {key} {found!r}, unbroken {value!r}")
    return problems


def tensor_problems(found: Checkpoint, expected: Checkpoint) -> list[str]:
    """Where the tensors of two checkpoints are not bitwise equal."""
    ours = (found.step, found.manifest.optimizer_step, found.shapes)
    theirs = (expected.step, expected.manifest.optimizer_step, expected.shapes)
    if ours != theirs:
        return [f"{found.path}: step {found.step}, expected {expected.step}, or other parameters"]
    return [
        f"{found.path}: {name}/{state} differs"
        for name in found.shapes
        for state in STATES
        if bytes_of(found, name, state) != bytes_of(expected, name, state)
    ]


def bytes_of(checkpoint: Checkpoint, name: str, state: str) -> bytes:
    """A parameter's state, as it lies in memory."""
    content: bytes = checkpoint.parameter(name, state).numpy().tobytes()
    return content

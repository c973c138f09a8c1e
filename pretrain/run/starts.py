"""What each start of a run ran on: the record of all that its last bits depend on beside recipe and
data.

    RUN_DIR/starts.jsonl     a line for each start that got as far as training, in order

A line holds the step it went on from, the time, the command, versions, the commit of this project
(where it runs from a git checkout), and how many ranks there were, on which hosts, devices and CPU
kernels, with how many threads. The script that starts runs again after failures counts these lines,
too: a start without one has not trained.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.files import write_durably
from data_prep.inputs.urls import without_credentials
from pretrain.distributed.world import World
from pretrain.run.directory import STARTS_NAME

if TYPE_CHECKING:
    import torch

PROJECT_DIR = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("tablefree", "torch", "deepspeed", "transformers", "safetensors", "numpy")
GIT_S = 10.0  # a checkout on a slow disk is not worth waiting for
# What the bits of a step may depend on. Hosts of the same kind and another command line are none of
# it.
MATTERS = ("versions", "commit", "ranks", "devices", "cpu_kernels", "threads_per_rank")

Start = dict[str, Any]  # a line of starts.jsonl


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What one rank runs on."""

    host: str
    device: str  # a GPU's name, or cpu
    cpu_kernels: str  # which instructions torch's kernels use, as AVX2
    threads: int
    versions: dict[str, str]


def version_of(package: str) -> str:
    """The version of an installed package; of ours it may be missing, where it runs from a plain
    directory.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def surroundings(device: "torch.device") -> Surroundings:
    """What this rank runs on."""
    import torch  # which takes seconds, and who only reads the record needs none of it

    versions = {
        "python": platform.python_version(),
        **{package: version_of(package) for package in PACKAGES},
    }
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return Surroundings(
        host=socket.gethostname(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        cpu_kernels=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        versions=versions,
    )


def git(*arguments: str) -> str | None:
    """What git says about the directory of this project, or None where it can't."""
    command = ["git", "--no-optional-locks", "-C", str(PROJECT_DIR), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=GIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def commit() -> str | None:
    """The commit of this project, and whether files of it differ; None unless it runs from a
    checkout that has it.

    A package installed below somebody's repository is no file of that.
    """
    if git("ls-files", "--error-unmatch", str(Path(__file__).resolve())) is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{git('rev-parse', 'HEAD')}{', changed' if changed else ''}"


def counted(values: Iterable[str]) -> dict[str, int]:
    """How often each value occurs, in order of name."""
    return dict(sorted(Counter(values).items()))


def describe_start(
    step: int, command: list[str], world: World, of_ranks: list[Surroundings]
) -> Start:
    """The line of a start that goes on from a step."""
    start = {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": without_credentials(shlex.join(["python", "-m", "pretrain.train", *command])),
        "commit": commit(),
        "ranks": world.world_size,
        "hosts": counted(each.host for each in of_ranks),
        "devices": counted(each.device for each in of_ranks),
        "cpu_kernels": counted(each.cpu_kernels for each in of_ranks),
        "threads_per_rank": sorted({each.threads for each in of_ranks}),
        "versions": of_ranks[0].versions,
    }
    # One rank for each set of versions; hosts that have the same are not told apart.
    differing = {json.dumps(each.versions): each for each in of_ranks}
    if len(differing) > 1:
        start["versions_by_host"] = {each.host: each.versions for each in differing.values()}
    return start


def read_starts(run_dir: Path) -> list[Start]:
    """The starts of a run, oldest first. What is no such line is left out: a record is nothing
    to end a run for.
    """
    path = run_dir / STARTS_NAME
    content = path.read_bytes() if path.is_file() else b""
    starts = []
    for line in content.splitlines():
        try:
            start = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(start, dict) and isinstance(start.get("step"), int):
            starts.append(start)
    return starts


def of_steps(starts: list[Start], steps: int) -> list[Start]:
    """The starts that the first so many steps of a run come from: none of a run that was begun
    anew.
    """
    begun = 0
    for number, start in enumerate(starts):
        if start["step"] == 0:
            begun = number
    return [start for start in starts[begun:] if start["step"] < steps]


def changes(before: Start, now: Start) -> list[str]:
    """What may change the last bits of a step, in words."""
    found = []
    for key in MATTERS:
        old = before.get(key)
        new = now.get(key)
        if isinstance(old, dict) and isinstance(new, dict) and key == "versions":
            for name in sorted({*old, *new}):
                if old.get(name) != new.get(name):
                    found.append(f"{name} {old.get(name)} -> {new.get(name)}")
        elif old != new:
            found.append(f"{key} {in_words(old)} -> {in_words(new)}")
    return found


def in_words(value: Any) -> str:
    """A value of a line, shortly."""
    if isinstance(value, dict):
        return " + ".join(f"{count} x {name}" for name, count in value.items())
    if isinstance(value, list):
        return " or ".join(map(str, value))
    return str(value)


def append_start(run_dir: Path, start: Start) -> None:
    """Add a line, on the disk when this returns; a line that a kill tore is ended first."""
    with (run_dir / STARTS_NAME).open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if size > 0 and file.read(1) != b"\n":
            file.write(b"\n")
        file.write(json.dumps(start).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def record_start(
    run_dir: Path, step: int, command: list[str], world: World, device: "torch.device"
) -> list[str]:
    """On all ranks: have rank 0 add the line of this start; the warnings that follow from it, on
    rank 0.
    """
    from pretrain.distributed.agree import gather

    of_ranks = gather(surroundings(device))
    if not world.is_main:
        return []
    before = of_steps(read_starts(run_dir), step)
    start = describe_start(step, command, world, of_ranks)
    append_start(run_dir, start)
    warnings = []
    changed = changes(before[-1], start) if step and before else []
    if changed:
        warnings.append(
            f"warning: changed since the start before: {', '.join(changed)}; last digits may differ"
        )
    if "versions_by_host" in start:
        differing = words_on_hosts(start["versions_by_host"])
        warnings.append(f"warning: hosts differ: {differing}; install the same versions on all")
    return warnings


def words_on_hosts(versions_by_host: dict[str, dict[str, str]]) -> str:
    """In which packages the first two of several hosts differ."""
    (host, own), (other, theirs), *_ = versions_by_host.items()
    unequal = [name for name in own if own[name] != theirs.get(name)]
    return ", ".join(
        f"{name} {own[name]} on {host}, {theirs.get(name)} on {other}" for name in unequal
    )


def copy_starts(origin_run_dir: Path, run_dir: Path, steps: int) -> None:
    """Make the starts that a branch's first steps come from the branch's own."""
    lines = [json.dumps(start) + "\n" for start in of_steps(read_starts(origin_run_dir), steps)]
    if lines:
        write_durably(run_dir / STARTS_NAME, "".join(lines).encode())


def for_sinks(start: Start) -> Start:
    """What a start ran on as metric sinks show it, some of them to others: no hosts, no command
    line.
    """
    named = ("step", "time", "commit", "ranks", "devices", "cpu_kernels", "threads_per_rank")
    return {name: start.get(name) for name in (*named, "versions")}


def for_card(starts: list[Start], steps: int) -> list[Start]:
    """The starts behind a checkpoint as a model card shows them: those that differ from the one
    before. No hosts.
    """
    shown: list[Start] = []
    for start in of_steps(starts, steps):
        if not shown or changes(shown[-1], start):
            shown.append(start)
    named = ("time", "ranks", "devices", "cpu_kernels", "threads_per_rank", "commit")
    return [
        {"step": start["step"], "versions": dict(start.get("versions") or {})}
        | {name: in_words(start.get(name)) for name in named}
        for start in shown
    ]

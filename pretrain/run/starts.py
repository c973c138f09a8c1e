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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
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

Line = dict[str, Any]
Counts = dict[str, int]  # of each name, how many
Versions = dict[str, str]  # of each package


@dataclass(frozen=True, kw_only=True)
class Start:
    """A line of starts.jsonl; None is what a line does not tell."""

    step: int  # that it went on from
    time: str | None  # UTC, as 2026-01-31T12:00:00Z
    command: str | None  # without credentials
    commit: str | None  # of this project, where it ran from a checkout
    ranks: int | None
    hosts: Counts | None  # how many ranks each had
    devices: Counts | None
    cpu_kernels: Counts | None
    threads_per_rank: list[int] | None
    versions: Versions | None  # of rank 0
    versions_by_host: dict[str, Versions] | None = None  # where hosts differ

    def to_line(self) -> Line:
        """The line of starts.jsonl."""
        line = asdict(self)
        if self.versions_by_host is None:
            del line["versions_by_host"]
        return line

    @classmethod
    def from_line(cls, line: object) -> "Start":
        """The record behind a line. Raises ValueError for what is no line of a start."""
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError("a line without a step")

        def of_kind(name: str, kind: type) -> Any:
            return line[name] if isinstance(line.get(name), kind) else None

        return cls(
            step=line["step"],
            time=of_kind("time", str),
            command=of_kind("command", str),
            commit=of_kind("commit", str),
            ranks=of_kind("ranks", int),
            hosts=of_kind("hosts", dict),
            devices=of_kind("devices", dict),
            cpu_kernels=of_kind("cpu_kernels", dict),
            threads_per_rank=of_kind("threads_per_rank", list),
            versions=of_kind("versions", dict),
            versions_by_host=of_kind("versions_by_host", dict),
        )


@dataclass(frozen=True, kw_only=True)
class StartOnCard:
    """A start as a model card shows it, in words but for step and versions."""

    step: int
    time: str
    ranks: str
    devices: str
    cpu_kernels: str
    threads_per_rank: str
    commit: str
    versions: Versions


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What one rank runs on."""

    host: str
    device: str  # a GPU's name, or cpu
    cpu_kernels: str  # which instructions torch's kernels use, as AVX2
    threads: int
    versions: Versions


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


def counted(values: Iterable[str]) -> Counts:
    """How often each value occurs, in order of name."""
    return dict(sorted(Counter(values).items()))


def describe_start(
    step: int, command: list[str], world: World, of_ranks: list[Surroundings]
) -> Start:
    """The line of a start that goes on from a step."""
    # One rank for each set of versions; hosts that have the same are not told apart.
    differing = {json.dumps(each.versions): each for each in of_ranks}
    versions_by_host = None
    if len(differing) > 1:
        versions_by_host = {each.host: each.versions for each in differing.values()}
    return Start(
        step=step,
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=without_credentials(shlex.join(["python", "-m", "pretrain.train", *command])),
        commit=commit(),
        ranks=world.world_size,
        hosts=counted(each.host for each in of_ranks),
        devices=counted(each.device for each in of_ranks),
        cpu_kernels=counted(each.cpu_kernels for each in of_ranks),
        threads_per_rank=sorted({each.threads for each in of_ranks}),
        versions=of_ranks[0].versions,
        versions_by_host=versions_by_host,
    )


def read_lines(run_dir: Path) -> list[tuple[Start, bytes]]:
    """The starts of a run, oldest first, each with its line. What is no such line is left out: a
    record is nothing to end a run for.
    """
    path = run_dir / STARTS_NAME
    content = path.read_bytes() if path.is_file() else b""
    found = []
    for line in content.splitlines():
        try:
            found.append((Start.from_line(json.loads(line)), line))
        except (ValueError, RecursionError):
            continue
    return found


def read_starts(run_dir: Path) -> list[Start]:
    """The starts of a run, oldest first."""
    return [start for start, _ in read_lines(run_dir)]


def unread_lines(run_dir: Path) -> int:
    """How many lines of the record of starts can't be read."""
    path = run_dir / STARTS_NAME
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return len(lines) - len(read_lines(run_dir))


def of_steps(starts: Sequence[Start], steps: int) -> list[Start]:
    """The starts that the first so many steps of a run come from: none of a run that was begun
    anew.
    """
    begun = last_beginning(starts)
    return [start for start in starts[begun:] if start.step < steps]


def last_beginning(starts: Sequence[Start]) -> int:
    """The place of the last start that began with the first step; 0 where none did."""
    return max((place for place, start in enumerate(starts) if start.step == 0), default=0)


def changes(before: Start, now: Start) -> list[str]:
    """What may change the last bits of a step, in words."""
    found = []
    for key in MATTERS:
        old = getattr(before, key)
        new = getattr(now, key)
        if key == "versions" and old and new:
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
        file.write(json.dumps(start.to_line()).encode() + b"\n")
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
    if start.versions_by_host:
        differing = words_on_hosts(start.versions_by_host)
        warnings.append(f"warning: hosts differ: {differing}; install the same versions on all")
    return warnings


def words_on_hosts(versions_by_host: dict[str, Versions]) -> str:
    """In which packages the first two of several hosts differ."""
    (host, own), (other, theirs), *_ = versions_by_host.items()
    unequal = [name for name in own if own[name] != theirs.get(name)]
    return ", ".join(
        f"{name} {own[name]} on {host}, {theirs.get(name)} on {other}" for name in unequal
    )


def copy_starts(origin_run_dir: Path, run_dir: Path, steps: int) -> None:
    """Make the starts that a branch's first steps come from the branch's own: their lines, with
    what other versions of this project may have told there.
    """
    found = read_lines(origin_run_dir)
    begun = last_beginning([start for start, _ in found])
    lines = [line + b"\n" for start, line in found[begun:] if start.step < steps]
    if lines:
        write_durably(run_dir / STARTS_NAME, b"".join(lines))


def for_sinks(start: Start) -> Line:
    """What a start ran on as metric sinks show it, some of them to others: no hosts, no command
    line.
    """
    named = ("step", "time", "commit", "ranks", "devices", "cpu_kernels", "threads_per_rank")
    return {name: getattr(start, name) for name in (*named, "versions")}


def for_card(starts: Sequence[Start], steps: int) -> list[StartOnCard]:
    """The starts behind a checkpoint as a model card shows them: those that differ from the one
    before. No hosts.
    """
    shown: list[Start] = []
    for start in of_steps(starts, steps):
        if not shown or changes(shown[-1], start):
            shown.append(start)
    return [
        StartOnCard(
            step=start.step,
            time=in_words(start.time),
            ranks=in_words(start.ranks),
            devices=in_words(start.devices),
            cpu_kernels=in_words(start.cpu_kernels),
            threads_per_rank=in_words(start.threads_per_rank),
            commit=in_words(start.commit),
            versions=start.versions or {},
        )
        for start in shown
    ]

"""A run under SIGKILLs, full disks, flipped bytes and changes of world size, held against the same
run unbroken.

    python tests/benchmarks/chaos.py [--kills 40] [--flips 4] [--full-disks 3] [--changes 6]
        [--seed 1] [--ranks 2] [--launcher forked|pretrain] [--recipe R] [--data-dir D] [--verbose]
        [--quick]

The run is trained once unbroken; then the same command is killed at random moments (in a step, in a
save, while it loads), whole or one rank alone, and started again until it is done. Two further legs
go the first part of the same way: one on a small disk that fills up during saves, one on another
number of ranks after each kill.

After every fault the newest checkpoint must be readable and no older than the last one published,
metrics.jsonl must hold one line for each step, and every line's loss, gradient norm and validation
figures must be bitwise those of the unbroken run, however often the step was trained. At the end so
must every tensor of the last checkpoint (in the leg of other world sizes losses are compared,
within 1e-4 relative). After the kill of one rank the others must end by themselves within 15 s.
Only where ranks die before they have met does the runner, in the place of a launcher that the
forked ranks lack, end the others; these are counted.

With --recipe the model is the recipe's; its steps are as many as the faults need, of as few windows
as divide over the ranks, with a save every 5. Flags such as --checkpoints.every_steps=10 say
otherwise. A checkpoint has 12 bytes a parameter; the disk that fills up, in memory, holds four of
them.

Prints a table; exit code 1 if anything was lost beyond the last save, differs or was left over. A
fault counts as one in a save if it left an unfinished staging directory behind. Unknown flags go to
the training command.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from chaos_jobs import LAUNCHERS, POLL_S, Job, exists, kill_job, send, warm_up
from support.runs import counting_dataset, write_recipe
from support.waiting import came_true

from data_prep.commands import exit_code
from data_prep.errors import UserError
from pretrain.checkpoint.find import newest_good
from pretrain.checkpoint.layout import POINTER_NAME, checkpoints_dir, saved_steps
from pretrain.checkpoint.reader import Checkpoint
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.costs.flops import count_parameters

TIMINGS = (
    "tokens_per_s",
    "tokens_per_s_per_rank",
    "step_s",
    "seconds",
    "peak_memory_bytes",
    "slowest",
)
STATES = ("master", "exp_avg", "exp_avg_sq")
SURVIVORS_S = 15.0
PATIENCE_S = 300.0
RELATIVE = 1e-4
SAVES_SHARE = 0.45  # of the kills are to fall within saves, as long as fewer did
EVERY_STEPS = 5
DISK_BYTES = 400 << 20  # at least; of larger checkpoints it holds CHECKPOINTS_ON_DISK
CHECKPOINTS_ON_DISK = 4
TOKENS_OF_DATA = 8_000  # of the small data set
WHOLE, ONE, FLIP, DISK, RANKS = (
    "whole job",
    "one rank",
    "flipped byte",
    "full disk",
    "other number of ranks",
)
LOADING, STEP, SAVE = "while loading", "in a step", "in a save"
Line = dict[str, Any]


# What a run leaves


def lines_of(run_dir: Path) -> list[Line]:
    """The whole lines of metrics.jsonl, without what a clock measured."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    # what follows the last line's end is torn
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def line_problems(lines: list[Line], reference: list[Line], relative: float = 0.0) -> list[str]:
    """What is wrong with lines of a run that a kill may have cut short."""
    steps = [line["step"] for line in lines]
    if steps != list(range(len(lines))):
        return [f"metrics.jsonl holds steps {steps}, expected one line for each"]
    problems = []
    for line, expected in zip(lines, reference, strict=False):
        for key, value in expected.items():
            found = line.get(key)
            if found == value or (
                relative and found is not None and abs(found - value) <= relative * abs(value)
            ):
                continue
            if relative and key == "gradient_norm":  # the order of its sums shows more
                continue
            problems.append(f"step {line['step']}: {key} {found!r}, unbroken {value!r}")
    return problems


def tensor_problems(found: Checkpoint, expected: Checkpoint) -> list[str]:
    """Where the tensors of two checkpoints are not bitwise equal."""
    if (found.step, found.manifest.optimizer_step, found.shapes) != (
        expected.step,
        expected.manifest.optimizer_step,
        expected.shapes,
    ):
        return [f"{found.path}: step {found.step}, expected {expected.step}, or other parameters"]
    return [
        f"{found.path}: {name}/{state} differs"
        for name in found.shapes
        for state in STATES
        if found.parameter(name, state).numpy().tobytes()
        != expected.parameter(name, state).numpy().tobytes()
    ]


def fingerprint_of(path: Path) -> tuple[int, int]:
    """What changes whenever a file is written."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_ino, status.st_mtime_ns


def last_step(path: Path) -> int:
    """The step of the last whole line of metrics.jsonl; -1 if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            whole = file.read().split(b"\n")[:-1]
        return int(json.loads(whole[-1])["step"]) if whole else -1
    except (FileNotFoundError, ValueError):
        return -1


# One start of the command


@dataclass(kw_only=True)
class Pace:
    """How long things take, seconds; moments are drawn by it."""

    load: float = 2.0
    step: float = 0.05
    save: float = 0.05


class Attempt:
    """One start of the command, up to its end or to the fault that strikes it."""

    def __init__(self, start: Callable[[], Job], run_dir: Path, pace: Pace) -> None:
        self.run_dir, self.pace = run_dir, pace
        self.metrics, self.state = run_dir / "metrics.jsonl", run_dir / "state.json"
        self.starts = run_dir / "starts.jsonl"
        self.before = fingerprint_of(self.starts), fingerprint_of(self.state)
        self.began = time.time()
        self.job = start()

    def has_met(self) -> bool:
        """Whether its ranks have met: rank 0 says so in state.json after they did."""
        return fingerprint_of(self.state) != self.before[1]

    def has_loaded(self) -> bool:
        """Whether training has begun: metrics.jsonl is cut back, then a start recorded."""
        return fingerprint_of(self.starts) != self.before[0]

    def staging(self) -> list[Path]:
        """What this attempt has begun to save, or to remove, and has not finished."""
        found = []
        for path in checkpoints_dir(self.run_dir).glob(".step-*.tmp"):
            try:
                changed = path.stat().st_ctime
            except FileNotFoundError:
                continue
            if changed > self.began:
                found.append(path)
        return found

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for it; False if the job came to its end before. Raises RuntimeError if the job
        stands still.
        """
        while not condition() and self.job.is_running():
            before = fingerprint_of(self.metrics)

            def is_news(before: tuple[int, int] = before) -> bool:
                ended = condition() or not self.job.is_running()
                return ended or fingerprint_of(self.metrics) != before

            if not came_true(is_news, PATIENCE_S, POLL_S):
                raise RuntimeError(
                    f"nothing happened for {PATIENCE_S:.0f} s:\n{self.job.said()[-3000:]}"
                )
        return self.job.is_running()

    def until_step(self, step: int) -> bool:
        """Wait until it has trained a step."""
        if not self.until(self.has_loaded):
            return False
        self.pace.load = time.time() - self.began
        return self.until(lambda: last_step(self.metrics) >= step)

    def until_moment(self, moment: str, step: int, sample: random.Random) -> bool:
        """Wait for a random moment of this kind, after a step; False if the job came to its end
        before.
        """
        if moment == LOADING:
            time.sleep(sample.uniform(0, self.pace.load))
            return self.job.is_running()
        if not self.until_step(step):
            return False
        if moment == SAVE and not self.until(lambda: bool(self.staging())):
            return False
        time.sleep(sample.uniform(0, self.pace.save if moment == SAVE else self.pace.step))
        return self.job.is_running()

    def measure(self) -> None:
        """Watch it to its end, to learn its pace."""
        if self.until(self.has_loaded):
            self.pace.load = time.time() - self.began
        saves = []
        while self.until(lambda: bool(self.staging())):
            began = time.monotonic()
            self.until(lambda: not self.staging())
            saves.append(time.monotonic() - began)
        self.pace.save = statistics.median(saves) if saves else self.pace.save
        text = self.metrics.read_text() if self.metrics.exists() else ""
        steps = [line["step_s"] for line in map(json.loads, text.splitlines()) if "step_s" in line]
        if not steps:
            said = [line for line in self.job.said().splitlines() if "error" in line] or [
                "it said nothing"
            ]
            raise UserError(f"the unbroken run trained no step: {said[0].removeprefix('error: ')}")
        self.pace.step = statistics.median(steps)


# Faults and what they left


@dataclass(frozen=True, kw_only=True)
class Record:
    """A fault, and what it left."""

    kind: str
    moment: str
    step: int  # how many steps had their lines
    checkpoint: int  # the step of the newest good checkpoint after it
    unreadable: bool
    seconds: float  # until all had ended
    ended_by_launcher: bool = False
    note: str = ""

    @property
    def lost(self) -> int:
        """Steps to be trained again."""
        return self.step - self.checkpoint


@dataclass(kw_only=True)
class Leg:
    """A run that is broken again and again, and what is known of it."""

    name: str
    launcher: str
    flags: list[str]
    run_dir: Path
    logs: Path
    ranks: int
    reference: list[Line]
    pace: Pace
    sample: random.Random
    verbose: bool
    relative: float = 0.0
    records: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    # flipped checkpoints: name and inode
    damaged: set[tuple[str, int]] = field(default_factory=set)
    seen: dict[int, Line] = field(default_factory=dict)  # each step's line, as it was first
    replayed: int = 0
    starts: int = 0
    taken: Checkpoint | None = None  # what the next start is to continue from
    attempt: Attempt | None = None  # the newest
    # the step of the last checkpoint that was there before a fault, and was not flipped
    published: int = 0
    worst: float = 0.0  # relative difference of a loss

    def problem(self, text: str) -> None:
        """Note what must not be."""
        self.problems.append(f"{self.name}, start {self.starts}: {text}")
        print(f"PROBLEM {self.problems[-1]}", flush=True)

    def start(self) -> Attempt:
        """The same command once more."""
        self.starts += 1
        launcher = LAUNCHERS[self.launcher]
        self.attempt = Attempt(
            lambda: launcher(self.flags, self.ranks, self.logs), self.run_dir, self.pace
        )
        return self.attempt

    def good_checkpoints(self) -> list[Path]:
        """Those that were not flipped, newest first."""
        # the oldest may go meanwhile
        found = {path: fingerprint_of(path)[0] for path in saved_steps(self.run_dir)}
        return [
            path
            for path, inode in found.items()
            if inode and (path.name, inode) not in self.damaged
        ]

    def note_published(self) -> None:
        """Note how far the run is saved, just before a fault: nothing of that may be lost."""
        self.published = max(
            [self.published, *(int(path.name[-8:]) for path in self.good_checkpoints()[:1])]
        )

    def look(self, attempt: Attempt) -> tuple[int, bool]:
        """Check what a fault or the end left; the steps that have lines, and whether nothing
        readable was there.
        """
        if attempt.has_loaded():
            continued = re.findall(r"continuing from (\S+)", attempt.job.said())
            expected = [str(self.taken.path)] if self.taken else []
            if continued != expected:
                self.problem(f"continued from {continued}, expected {expected}")
        try:
            lines = lines_of(self.run_dir)
        except ValueError as error:
            self.problem(f"metrics.jsonl: {error}")
            return 0, True
        self.look_at_lines(lines, attempt)
        good = self.good_checkpoints()
        try:
            self.taken, said = newest_good(self.run_dir)
        except Exception as error:
            self.problem(f"the newest checkpoint: {type(error).__name__}: {error}")
            return len(lines), True
        passed_over = [
            line for line in said if not any(f"/{name}: " in line for name, _ in self.damaged)
        ]
        if len(good) == 1 and not (pointer := good[0].with_name(POINTER_NAME)).exists():
            # killed just before it
            passed_over = [line for line in passed_over if f"{pointer}: missing" not in line]
        path = self.taken.path if self.taken else None
        if passed_over or path != (good[0] if good else None):
            self.problem(f"newest good checkpoint {path} of {[p.name for p in good]}; {said}")
        if (self.taken.step if self.taken else 0) < self.published:
            self.problem(
                f"step {self.published} had been saved, and the newest good checkpoint is {path}"
            )
        if self.taken and len(lines) < self.taken.step:
            self.problem(
                f"{len(lines)} lines of metrics.jsonl, and a checkpoint of step {self.taken.step}"
            )
        return len(lines), bool(passed_over) or path != (good[0] if good else None)

    def look_at_lines(self, lines: list[Line], attempt: Attempt) -> None:
        """Check every line against the unbroken run and against what it was before."""
        for text in line_problems(lines, self.reference, self.relative)[:5]:
            self.problem(text)
        taken = self.taken.step if self.taken else 0
        for line in lines[taken:] if attempt.has_loaded() else []:
            first = self.seen.setdefault(line["step"], line)
            self.replayed += first is not line
            if not self.relative and first != line:
                self.problem(f"step {line['step']}, trained again: {line}, before {first}")
        for line, expected in zip(lines, self.reference, strict=False):
            self.worst = max(self.worst, abs(line["loss"] / expected["loss"] - 1))

    def record(
        self, attempt: Attempt, kind: str, moment: str, seconds: float, **more: Any
    ) -> Record:
        """Look at what a fault left, and note it."""
        step, unreadable = self.look(attempt)
        checkpoint = self.taken.step if self.taken else 0
        record = Record(
            kind=kind,
            moment=moment,
            step=step,
            checkpoint=checkpoint,
            unreadable=unreadable,
            seconds=seconds,
            **more,
        )
        self.records.append(record)
        if self.verbose:
            print(
                f"{len(self.records):4d} {kind}, {moment}: at step {record.step}, checkpoint "
                f"{checkpoint}, {record.lost} steps lost, ended after {seconds:.2f} s "
                f"{record.note}",
                flush=True,
            )
        return record

    def end(self, attempt: Attempt) -> bool:
        """Wait for the job's own end; whether it was a good one."""
        attempt.until(lambda: False)
        if not attempt.job.ended_well():
            self.problem(f"ended by itself, and badly:\n{attempt.job.said()[-3000:]}")
        self.look(attempt)
        return attempt.job.ended_well()

    def conclude(self, expected: Checkpoint) -> None:
        """Check what the finished run left against the unbroken one."""
        if len(lines_of(self.run_dir)) != expected.step:
            self.problem(f"{len(lines_of(self.run_dir))} lines, expected {expected.step}")
        if self.taken is None or self.taken.step != expected.step:
            self.problem(
                f"ended with checkpoint {self.taken and self.taken.path}, expected step "
                f"{expected.step}"
            )
        elif not self.relative:
            for text in tensor_problems(self.taken, expected):
                self.problem(text)


def kill_whole(leg: Leg, attempt: Attempt, kind: str = WHOLE, note: str = "") -> Record:
    """SIGKILL for launcher and ranks; then the flip, if it is one."""
    leg.note_published()
    loaded, began = attempt.has_loaded(), time.monotonic()
    kill_job(attempt.job)
    seconds = time.monotonic() - began
    if kind == FLIP:
        flip_newest(leg)
    moment = SAVE if attempt.staging() else STEP if loaded else LOADING
    return leg.record(attempt, kind, moment, seconds, note=note)


def kill_one(leg: Leg, attempt: Attempt) -> Record | None:
    """SIGKILL for one rank; the others are to end."""
    everyone, ranks = attempt.job.pids(), attempt.job.ranks()
    if not ranks:
        return None  # the launcher has not come to start them
    leg.note_published()
    met, loaded = attempt.has_met(), attempt.has_loaded()
    rank, began = leg.sample.randrange(len(ranks)), time.monotonic()
    os.kill(ranks[rank], signal.SIGKILL)
    helped = not met and not attempt.job.has_launcher
    if helped:
        send([pid for pid in everyone if pid != ranks[rank]], signal.SIGTERM)
    if not came_true(lambda: not any(map(exists, everyone)), SURVIVORS_S, POLL_S):
        left = [pid for pid in everyone if exists(pid)]
        leg.problem(
            f"{SURVIVORS_S:.0f} s after rank {rank} was killed still there: "
            f"{left}\n{attempt.job.said()[-3000:]}"
        )
        send(everyone, signal.SIGKILL)
        came_true(lambda: not any(map(exists, everyone)), SURVIVORS_S, POLL_S)
    seconds = time.monotonic() - began
    came_true(lambda: not attempt.job.is_running(), SURVIVORS_S, POLL_S)
    moment = SAVE if attempt.staging() else STEP if loaded else LOADING
    if attempt.job.ended_well():
        leg.problem(f"rank {rank} was killed, and the job ended well")
    return leg.record(
        attempt,
        ONE,
        moment,
        seconds,
        ended_by_launcher=helped,
        note=f"(rank {rank}; {attempt.job.codes()})",
    )


def flip_newest(leg: Leg) -> None:
    """Flip a bit in a file of the newest checkpoint, where another is left."""
    newest, *older = leg.good_checkpoints()
    assert older
    file = leg.sample.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    content[leg.sample.randrange(len(content))] ^= 1 << leg.sample.randrange(8)
    file.write_bytes(content)
    leg.damaged.add((newest.name, newest.stat().st_ino))
    leg.published = int(older[0].name[-8:])
    taken, said = newest_good(leg.run_dir)
    if taken is None or taken.path != older[0] or not any(file.name in line for line in said):
        leg.problem(f"{file} was flipped, and {taken and taken.path} is taken: {said}")


def next_moment(leg: Leg) -> str:
    """A kind of moment: more in saves as long as too few fell there."""
    kills = [record for record in leg.records if record.kind in (WHOLE, ONE)]
    within = sum(record.moment == SAVE for record in kills)
    if within < SAVES_SHARE * (len(kills) + 1):
        return SAVE
    return leg.sample.choice([STEP, STEP, LOADING])


def next_step(leg: Leg, left: int, every: int) -> int:
    """Up to which step the next start may go before it is struck: so that what is left finds
    place.
    """
    done = leg.taken.step if leg.taken else 0
    room = len(leg.reference) - 2 * every - 1 - done
    return done + max(0, min(room, int(leg.sample.uniform(0, 2 * room / (left + 1)))))


def leg_of_kills(leg: Leg, kills: int, flips: int, every: int) -> None:
    """The run with all its kills and flips, to its end."""
    faults = [WHOLE if i % 2 == 0 else ONE for i in range(kills)] + [FLIP] * flips
    leg.sample.shuffle(faults)
    while faults:
        kind = faults[-1]
        attempt = leg.start()
        moment = STEP if kind == FLIP else next_moment(leg)
        step = next_step(leg, len(faults), every)
        if kind == FLIP:
            attempt.until(lambda: len(leg.good_checkpoints()) > 1)
        if not attempt.until_moment(moment, step, leg.sample):
            if not leg.end(attempt):
                return
            leg.problem(f"was done before its last {len(faults)} faults")
            return
        if kind == ONE:
            if kill_one(leg, attempt) is None:
                kill_whole(leg, attempt)
                continue
        elif kind == WHOLE:
            kill_whole(leg, attempt)
        elif len(leg.good_checkpoints()) < 2:
            kill_whole(leg, attempt, note="(in place of a flip: one checkpoint alone)")
            continue
        else:
            kill_whole(leg, attempt, FLIP)
        faults.pop()
    leg.end(leg.start())


# A disk that fills up


def resize(mount: Path, size: int) -> bool:
    """Give the small disk another size; False if more than that lies on it."""
    command = ["mount", "-o", f"remount,size={size}", str(mount)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def used_bytes(mount: Path) -> int:
    """What lies on a disk."""
    disk = os.statvfs(mount)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize


def fill_disk(leg: Leg, attempt: Attempt, mount: Path) -> bool:
    """Have the disk be full while a save is being written; False if the save was faster."""
    pids = attempt.job.ranks()
    send(pids, signal.SIGSTOP)
    time.sleep(0.02)  # a thread stops once it has left the kernel
    is_saving = bool(attempt.staging())
    written = sum(file.stat().st_size for path in attempt.staging() for file in path.glob("*"))
    good = leg.good_checkpoints()
    whole = sum(file.stat().st_size for file in good[0].iterdir()) if good else 2 * written
    room = int(leg.sample.uniform(0, 0.95) * max(0, whole - written)) // 4096 * 4096
    is_full = is_saving and resize(mount, used_bytes(mount) + room)
    send(pids, signal.SIGCONT)
    if not is_full:
        return False
    saved = saved_steps(leg.run_dir)
    if not came_true(
        lambda: not attempt.job.is_running() or not {*saved_steps(leg.run_dir)} <= {*saved},
        60.0,
        POLL_S,
    ):
        leg.problem(f"60 s after the disk was full still there:\n{attempt.job.said()[-3000:]}")
        kill_job(attempt.job)
    return not attempt.job.is_running()


def leg_on_small_disk(leg: Leg, full: int, every: int, mount: Path, size: int) -> None:
    """The first part of the run on a disk that is full during so many saves."""
    while full:
        attempt = leg.start()
        done = leg.taken.step if leg.taken else 0
        if not attempt.until_step(done + leg.sample.randrange(1, every)):
            leg.end(attempt)
            leg.problem(f"was done before its last {full} full disks")
            return
        while attempt.until(lambda a=attempt: bool(a.staging())):  # type: ignore[misc]
            began = time.monotonic()
            if fill_disk(leg, attempt, mount):
                break
            resize(mount, size)
            attempt.until(lambda a=attempt: not a.staging())  # type: ignore[misc]
        if attempt.job.ended_well():
            continue  # every save was faster: once more, from what it left
        if "No space left on device" not in attempt.job.said():
            leg.problem(f"ended on a full disk, and does not say so:\n{attempt.job.said()[-3000:]}")
        seconds = time.monotonic() - began
        leg.note_published()
        leg.record(attempt, DISK, SAVE, seconds)
        resize(mount, size)
        full -= 1
    leg.end(leg.start())


def leg_of_world_sizes(leg: Leg, sizes: list[int], every: int) -> None:
    """The first part of the run, killed and started on another number of ranks again and again."""
    for number, ranks in enumerate(sizes[:-1]):
        leg.ranks = ranks
        attempt = leg.start()
        step = next_step(leg, len(sizes) - 1 - number, every)
        if not attempt.until_moment(leg.sample.choice([STEP, SAVE]), max(step, every), leg.sample):
            leg.end(attempt)
            leg.problem(f"was done before its last {len(sizes) - 1 - number} changes")
            return
        kill_whole(leg, attempt, RANKS, f"({ranks} -> {sizes[number + 1]} ranks)")
    leg.ranks = sizes[-1]
    leg.end(leg.start())


# What is printed


def of(values: Sequence[float], digits: int) -> str:
    """Median and largest."""
    return f"{statistics.median(values):.{digits}f} / {max(values):.{digits}f}" if values else ""


def table(records: list[Record]) -> str:
    """A row for every kind of fault and moment."""
    rows = [
        "| fault | moment | count | steps lost, median / most | all ended after s, median / most "
        "| ended by the runner as a launcher would | unreadable states |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for kind in (WHOLE, ONE, FLIP, DISK, RANKS):
        for moment in (LOADING, STEP, SAVE):
            those = [record for record in records if (record.kind, record.moment) == (kind, moment)]
            if those:
                lost, seconds = of([r.lost for r in those], 0), of([r.seconds for r in those], 2)
                helped, bad = (
                    sum(r.ended_by_launcher for r in those),
                    sum(r.unreadable for r in those),
                )
                rows.append(
                    f"| {kind} | {moment} | {len(those)} | {lost} | {seconds} | {helped} | {bad} |"
                )
    helped, bad = (
        sum(record.ended_by_launcher for record in records),
        sum(record.unreadable for record in records),
    )
    return "\n".join([*rows, f"| all | | {len(records)} | | | {helped} | {bad} |"])


def summary(legs: list[Leg], expected: Checkpoint, skipped: list[str]) -> str:
    """What follows the table."""
    lines = []
    kills = [record for leg in legs for record in leg.records if record.kind in (WHOLE, ONE)]
    within = sum(record.moment == SAVE for record in kills)
    if kills:
        lines.append(
            f"{within} of {len(kills)} kills ({within / len(kills):.0%}) fell within a save."
        )
    for leg in legs:
        said = (
            f"{leg.name}: {leg.starts} starts, {len(leg.seen)} steps, {leg.replayed} trained "
            "again; "
        )
        if leg.relative:
            said += (
                f"losses within {leg.worst:.1e} relative of the unbroken run's (at most "
                f"{leg.relative:g})"
            )
        else:
            same = "are bitwise" if not leg.problems else "are NOT all"
            said += (
                f"every step's figures, and all {len(expected.shapes)} parameters, exp_avg and "
                f"exp_avg_sq at the end, {same} those of the unbroken run"
            )
        lines.append(said + f"; {len(leg.problems)} problems.")
    return "\n".join([*lines, *skipped])


# The command


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line; what is unknown goes to the training command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe", help="default: a tiny one, a few ten milliseconds a step, 6 MB a checkpoint"
    )
    parser.add_argument("--data-dir", type=Path, help="default: a small data set, made here")
    parser.add_argument(
        "--kills", type=int, default=40, help="half of them of the whole job, half of one rank"
    )
    parser.add_argument("--flips", type=int, default=4)
    parser.add_argument("--full-disks", type=int, default=3)
    parser.add_argument("--changes", type=int, default=6, help="of the number of ranks")
    parser.add_argument("--world-sizes", default="2,1,3", help="which are taken in turn")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--launcher", choices=sorted(LAUNCHERS), default="forked")
    parser.add_argument(
        "--directory",
        type=Path,
        help="where to write, and leave it; default: a temporary directory",
    )
    parser.add_argument("--verbose", action="store_true", help="a line for every fault")
    parser.add_argument(
        "--quick", action="store_true", help="6 kills, one flip, one full disk, one change of ranks"
    )
    flags, rest = parser.parse_known_args(arguments)
    if flags.quick:
        flags.kills, flags.flips, flags.full_disks, flags.changes, flags.world_sizes = (
            6,
            1,
            1,
            1,
            "2,1",
        )
    for name, typed in (("--ranks", str(flags.ranks)), ("--world-sizes", flags.world_sizes)):
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", typed):
            raise UserError(f"{name} {typed}: expected numbers of ranks, such as 2,1,3")
    flags.world_sizes = [int(size) for size in flags.world_sizes.split(",")]
    return flags, rest


def built_in_recipe(path: Path, faults: int, is_quick: bool) -> Path:
    """Steps of a few ten milliseconds, 6 MB a checkpoint (3 in the short form), and room for the
    faults.
    """
    model = {"d_model": 64, "num_layers": 4} if is_quick else {"d_model": 96, "num_layers": 4}
    windows, at_once = (6, 3) if is_quick else (12, 2)
    return write_recipe(
        path,
        model={**model, "seq_len": 16},
        batch={"global_batch_tokens": windows * 16, "micro_batch_size": at_once},
        validation={"every_steps": EVERY_STEPS, "eval_tokens": 64},
        checkpoints={"every_steps": EVERY_STEPS},
        train_tokens=EVERY_STEPS * (3 + faults) * windows * 16,
    )


def for_these_faults(flags: argparse.Namespace, recipe: Recipe) -> list[str]:
    """Overrides with which a recipe's run has room for the faults, and its steps divide over
    every number of ranks.
    """
    steps = EVERY_STEPS * (3 + max(flags.kills + flags.flips, flags.changes, flags.full_disks))
    ranks = {flags.ranks, *flags.world_sizes} if flags.changes else {flags.ranks}
    batch_tokens = math.lcm(*ranks) * recipe.model.seq_len
    return [
        f"--batch.global_batch_tokens={batch_tokens}",
        "--batch.micro_batch_size=1",
        f"--train_tokens={steps * batch_tokens}",
        f"--checkpoints.every_steps={EVERY_STEPS}",
        f"--validation.every_steps={EVERY_STEPS}",
        f"--validation.eval_tokens={recipe.model.seq_len}",
    ]


def check_room(flags: argparse.Namespace, recipe: Recipe) -> None:
    """Raise UserError for a run that is too short for the faults, or that some number of ranks
    could not take.
    """
    every, faults = recipe.checkpoints.every_steps, flags.kills + flags.flips
    needed = every * (3 + faults)
    if recipe.total_steps < needed:
        tokens = needed * recipe.batch.global_batch_tokens
        raise UserError(
            f"{faults} kills and flips, with a save every {every} steps, need {needed} steps, not "
            f"{recipe.total_steps}: give --train_tokens={tokens}, or fewer of them"
        )
    sizes = {flags.ranks, *(flags.world_sizes if flags.changes else ())}
    uneven = [
        ranks
        for ranks in sorted(sizes)
        if recipe.global_batch_size % (ranks * recipe.batch.micro_batch_size)
    ]
    if uneven:
        raise UserError(
            f"a step of {recipe.global_batch_size} windows does not divide over {uneven[0]} ranks "
            f"x micro-batch {recipe.batch.micro_batch_size}: give other --ranks, --world-sizes or "
            "--batch.micro_batch_size"
        )


def bytes_of_disk(recipe: Recipe) -> int:
    """A small disk: for the checkpoints that are kept, the one that is written, and little more."""
    return max(DISK_BYTES, CHECKPOINTS_ON_DISK * 12 * sum(count_parameters(recipe.model).values()))


def mounted(mount: Path, size: int) -> str | None:
    """Make a small disk in memory; what stands against it, or None."""
    mount.mkdir(parents=True)
    free = psutil.virtual_memory().available
    if size > free:
        return f"it would take {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    return made.stderr.strip() if made.returncode else None


@dataclass(kw_only=True)
class Plan:
    """What is run: the command, where, and the legs so far."""

    flags: argparse.Namespace
    command: list[str]
    home: Path
    every: int
    pace: Pace = field(default_factory=Pace)
    legs: list[Leg] = field(default_factory=list)

    def leg(
        self, name: str, where: Path, reference: list[Line], *more: str, relative: float = 0.0
    ) -> Leg:
        """Another run of the command in a directory of its own."""
        logs = self.home / f"logs of {name}"
        logs.mkdir()
        where.mkdir(exist_ok=True)
        self.legs.append(
            Leg(
                name=name,
                launcher=self.flags.launcher,
                flags=[*self.command, "--run-dir", str(where / "run"), *more],
                run_dir=where / "run",
                logs=logs,
                ranks=self.flags.ranks,
                reference=reference,
                pace=self.pace,
                sample=random.Random(f"{self.flags.seed} {name}"),
                verbose=self.flags.verbose,
                relative=relative,
            )
        )
        return self.legs[-1]


def go(leg: Leg, body: Callable[[], None], expected: Checkpoint) -> None:
    """A leg to its end, whatever happens; nothing of it stays behind."""
    try:
        body()
        leg.conclude(expected)
    except RuntimeError as error:
        leg.problem(str(error))
    finally:
        if leg.attempt:
            kill_job(leg.attempt.job)


def train_unbroken(plan: Plan, part: int) -> tuple[list[Line], dict[int, Checkpoint]]:
    """The run without a fault: its lines, and its checkpoints, that after its first part among
    them.
    """
    leg = plan.leg("unbroken", plan.home / "unbroken", [], f"--checkpoints.keep_every={part}")
    attempt = leg.start()
    try:
        attempt.measure()
        leg.end(attempt)
    finally:
        kill_job(attempt.job)
    if leg.problems:
        sys.exit(1)
    plan.legs.clear()
    return lines_of(leg.run_dir), {
        int(path.name[-8:]): Checkpoint(path) for path in saved_steps(leg.run_dir)
    }


def enough_data(home: Path, smallest: Path, recipe: Recipe) -> Path:
    """The smallest data set, or one of two batches of the recipe."""
    times = math.ceil(2 * recipe.batch.global_batch_tokens / TOKENS_OF_DATA)
    return counting_dataset(home / "larger dataset", times=times) if times > 1 else smallest


def run_all(flags: argparse.Namespace, rest: list[str], home: Path) -> int:
    """The unbroken run and every leg; the exit code."""
    keys = [flag for flag in rest if re.match(r"--[a-z_.0-9]+=", flag)]
    recipe = flags.recipe
    if recipe is None:
        recipe = str(built_in_recipe(home / "recipe.yaml", flags.kills + flags.flips, flags.quick))
    data_dir = flags.data_dir or counting_dataset(home / "dataset")
    if flags.recipe:
        ours = for_these_faults(flags, load_recipe(recipe, keys, data_dir))
        rest = [*ours, *rest]  # what was typed comes later, and holds
        keys = [*ours, *keys]
    if flags.data_dir is None:
        data_dir = enough_data(home, data_dir, load_recipe(recipe, keys, data_dir))
    resolved = load_recipe(recipe, keys, data_dir)
    check_room(flags, resolved)
    every, total = resolved.checkpoints.every_steps, resolved.total_steps
    part = min(total // every, 4 if flags.quick else 8) * every  # how far the other legs go
    command = ["--recipe", recipe, "--data-dir", str(data_dir), *rest]
    if flags.launcher == "forked":
        warm_up()
    plan = Plan(flags=flags, command=command, home=home, every=every)
    reference, saved = train_unbroken(plan, part)
    pace = plan.pace
    print(
        f"{total} steps of {pace.step:.3f} s, a save of {pace.save:.3f} s every {every}, "
        f"{pace.load:.1f} s to load"
    )
    stop, skipped = ["--stop-at-step", str(part)], []
    if flags.kills + flags.flips:
        kills = plan.leg("kills", home / "kills", reference)
        go(kills, lambda: leg_of_kills(kills, flags.kills, flags.flips, every), saved[total])
    disk_bytes = bytes_of_disk(resolved)
    if flags.full_disks and (refused := mounted(home / "disk", disk_bytes)):
        skipped.append(f"full disks: skipped; a small disk takes root, and memory ({refused})")
    elif flags.full_disks:
        disk = plan.leg("small disk", home / "disk", reference[:part], *stop)
        try:
            go(
                disk,
                lambda: leg_on_small_disk(disk, flags.full_disks, every, home / "disk", disk_bytes),
                saved[part],
            )
        finally:
            subprocess.run(["umount", "--lazy", str(home / "disk")], check=True)
    if flags.changes:
        order = flags.world_sizes
        sizes = [order[i % len(order)] for i in range(flags.changes + 1)]
        worlds = plan.leg(
            "world sizes", home / "worlds", reference[:part], *stop, relative=RELATIVE
        )
        go(worlds, lambda: leg_of_world_sizes(worlds, sizes, every), saved[part])
    records = [record for leg in plan.legs for record in leg.records]
    print(f"\n{table(records)}\n\n{summary(plan.legs, saved[total], skipped)}")
    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return 1 if any(leg.problems for leg in plan.legs) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    flags, rest = parse(arguments)
    # and let nothing stay behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # killed processes give nothing back
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    if flags.directory:
        flags.directory.mkdir(parents=True)
        return run_all(flags, rest, flags.directory.resolve())
    home = Path(tempfile.mkdtemp(prefix="chaos."))
    try:
        return run_all(flags, rest, home)
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: sys.exit(main())))

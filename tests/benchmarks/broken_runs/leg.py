"""A leg: a run that is broken again and again, and what is known of it."""

import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from broken_runs.attempt import Attempt, Pace
from broken_runs.jobs import LAUNCHERS
from broken_runs.leavings import Line, line_problems, lines_of, stamp_of, tensor_problems
from pretrain.checkpoint.find import newest_good
from pretrain.checkpoint.layout import POINTER_NAME, saved_steps
from pretrain.checkpoint.reader import Checkpoint

MOST_LINES_SAID = 5  # of the problems that one look finds in lines

WHOLE = "whole job"
ONE = "one rank"
FLIP = "flipped byte"
DISK = "full disk"
RANKS = "other number of ranks"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What struck a run."""

    kind: str
    moment: str
    seconds: float  # until all had ended
    ended_by_launcher: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A fault, and what it left."""

    fault: Fault
    step: int  # how many steps had their lines
    checkpoint: int  # the step of the newest good checkpoint after it
    unreadable: bool

    @property
    def lost(self) -> int:
        """Steps to be trained again."""
        return self.step - self.checkpoint


class Look(NamedTuple):
    """What is seen of a run that does not go on."""

    steps: int  # that have lines
    unreadable: bool  # whether the newest checkpoint that should be good was not taken


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name[-8:])


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

    @property
    def done(self) -> int:
        """The step that the next start is to continue from."""
        return self.taken.step if self.taken else 0

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
        inodes = {path: stamp_of(path).inode for path in saved_steps(self.run_dir)}
        return [
            path
            for path, inode in inodes.items()
            # the oldest may go meanwhile
            if inode and (path.name, inode) not in self.damaged
        ]

    def note_published(self) -> None:
        """Note how far the run is saved, just before a fault: nothing of that may be lost."""
        for newest in self.good_checkpoints()[:1]:
            self.published = max(self.published, step_of(newest))

    def look(self, attempt: Attempt) -> Look:
        """Check what a fault or the end left."""
        if attempt.has_loaded():
            continued = re.findall(r"continuing from (\S+)", attempt.job.said())
            expected = [str(self.taken.path)] if self.taken else []
            if continued != expected:
                self.problem(f"continued from {continued}, expected {expected}")
        try:
            lines = lines_of(self.run_dir)
        except ValueError as error:
            self.problem(f"metrics.jsonl: {error}")
            return Look(0, unreadable=True)
        self._look_at_lines(lines, attempt)
        return Look(len(lines), unreadable=self._look_at_checkpoints(len(lines)))

    def _look_at_lines(self, lines: list[Line], attempt: Attempt) -> None:
        """Check every line against the unbroken run and against what it was before."""
        for text in line_problems(lines, self.reference, self.relative)[:MOST_LINES_SAID]:
            self.problem(text)
        trained = lines[self.done :] if attempt.has_loaded() else []
        for line in trained:
            first = self.seen.setdefault(line["step"], line)
            if first is line:
                continue
            self.replayed += 1
            if not self.relative and first != line:
                self.problem(f"step {line['step']}, trained again: {line}, before {first}")
        for line, expected in zip(lines, self.reference, strict=False):
            self.worst = max(self.worst, abs(line["loss"] / expected["loss"] - 1))

    def _look_at_checkpoints(self, steps: int) -> bool:
        """Find what the next start is to continue from; whether that is not the newest that was
        not flipped, or is not taken without a word.
        """
        good = self.good_checkpoints()
        newest = good[0] if good else None
        try:
            self.taken, said = newest_good(self.run_dir)
        except Exception as error:
            self.problem(f"the newest checkpoint: {type(error).__name__}: {error}")
            return True
        path = self.taken.path if self.taken else None
        is_wrong = bool(self._unexpected(said, good)) or path != newest
        if is_wrong:
            self.problem(f"newest good checkpoint {path} of {[p.name for p in good]}; {said}")
        if self.done < self.published:
            self.problem(
                f"step {self.published} had been saved, and the newest good checkpoint is {path}"
            )
        if steps < self.done:
            self.problem(f"{steps} lines of metrics.jsonl, and a checkpoint of step {self.done}")
        return is_wrong

    def _unexpected(self, said: list[str], good: list[Path]) -> list[str]:
        """What is said of checkpoints that nobody flipped."""
        unexpected = [
            line for line in said if not any(f"/{name}: " in line for name, _ in self.damaged)
        ]
        if len(good) == 1:
            pointer = good[0].with_name(POINTER_NAME)
            if not pointer.exists():  # killed just before it was written for the first time
                return [line for line in unexpected if f"{pointer}: missing" not in line]
        return unexpected

    def record(self, attempt: Attempt, fault: Fault) -> Record:
        """Look at what a fault left, and note it."""
        look = self.look(attempt)
        record = Record(
            fault=fault, step=look.steps, checkpoint=self.done, unreadable=look.unreadable
        )
        self.records.append(record)
        if self.verbose:
            print(
                f"{len(self.records):4d} {fault.kind}, {fault.moment}: at step {record.step}, "
                f"checkpoint {record.checkpoint}, {record.lost} steps lost, "
                f"ended after {fault.seconds:.2f} s {fault.note}",
                flush=True,
            )
        return record

    def end(self, attempt: Attempt) -> bool:
        """Wait for the job's own end; whether it was a good one."""
        attempt.until(lambda: False)
        if not attempt.job.ended_well():
            self.problem(f"ended by itself, and badly:\n{attempt.last_words()}")
        self.look(attempt)
        return attempt.job.ended_well()

    def conclude(self, expected: Checkpoint) -> None:
        """Check what the finished run left against the unbroken one."""
        lines = len(lines_of(self.run_dir))
        if lines != expected.step:
            self.problem(f"{lines} lines, expected {expected.step}")
        if self.taken is None or self.taken.step != expected.step:
            path = self.taken and self.taken.path
            self.problem(f"ended with checkpoint {path}, expected step {expected.step}")
        elif not self.relative:
            for text in tensor_problems(self.taken, expected):
                self.problem(text)

"""Trains and evaluates the cells of a comparison, some at a time.

Each is started by the ordinary supervisor (launch/supervise.py), then measured by the ordinary
pretrain.evaluate. Both sit behind a pipe from here (launch/shell/guarded.sh): however this process
ends, nothing of a cell outlives it; and each run holds a lock, so that none is trained twice.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from data_prep.commands import signal_name, unheard
from data_prep.errors import UserError, one_line, printable
from data_prep.locks import lock
from pretrain.comparing.cells import Place, evaluation_of, is_evaluated, is_trained
from pretrain.comparing.matrix import Cell
from pretrain.run.state import read_state
from pretrain.view.figures import duration

LAUNCH = Path(__file__).parents[2] / "launch"  # beside pretrain, also where both are installed
GUARDED = LAUNCH / "shell" / "guarded.sh"
SUPERVISE = LAUNCH / "supervise.py"
COUNT_GPUS = LAUNCH / "count_gpus.py"
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_S = 0.1
# Ranks of a command that was killed a moment ago may still hold their run.
LOCKED_S = 60.0


class StoppedBySignal(Exception):  # noqa: N818  # no error: somebody asked for it
    """A signal ended the comparison; the same command continues."""

    def __init__(self, number: int) -> None:
        super().__init__(signal_name(number))
        self.number = number


@dataclass(frozen=True, kw_only=True)
class Share:
    """What each cell gets of the machine."""

    at_once: int
    gpus: int  # of the whole machine

    def variables(self) -> dict[str, str]:
        """The environment of a cell's commands: its cores, unless that is set already."""
        cores = len(os.sched_getaffinity(0))
        threads = max(1, cores // self.at_once)
        return {"OMP_NUM_THREADS": os.getenv("OMP_NUM_THREADS", str(threads))}

    def ranks(self) -> list[str]:
        """The supervisor's flags: its own number where there are GPUs, else one rank.

        One rank of all threads is faster than a rank a core (pretrain/README.md, "Speed").
        """
        return [] if self.gpus else ["--ranks", "1"]


@dataclass
class Work:
    """A cell that something runs for."""

    cell: Cell
    process: subprocess.Popen[bytes]
    is_training: bool
    log_begins: int  # byte of its log from which on it is this command's


@dataclass
class Runner:
    """Takes all cells to their figures."""

    place: Place
    share: Share
    max_restarts: int
    signals: list[int] = field(default_factory=list)  # that came
    failed: dict[str, str] = field(default_factory=dict)  # why, by the cell's name
    taken_since: dict[str, float] = field(default_factory=dict)  # by another process, by name
    cells: int = 0
    found: int = 0  # of them, finished by an earlier command
    finished: int = 0
    began: float = 0.0  # s of the monotonic clock

    def run(self, cells: Sequence[Cell]) -> None:
        """Train and evaluate what is not there yet. Raises StoppedBySignal.

        A cell that fails stands in `failed`, and holds up no other.
        """
        before = {number: signal.signal(number, self.note) for number in ENDING}
        try:
            self.take_to_the_end(cells)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def take_to_the_end(self, cells: Sequence[Cell]) -> None:
        """As `run`, where signals are noted."""
        waiting = [cell for cell in cells if not self.is_complete(cell)]
        self.cells = len(cells)
        self.found = len(cells) - len(waiting)
        self.finished = self.found
        self.began = time.monotonic()
        if self.found:
            self.say(f"{self.found} of {self.cells} cells are there already")
        at_work: list[Work] = []
        while waiting or at_work:
            if self.signals:
                self.stop(at_work)
            if waiting and len(at_work) < self.share.at_once and self.is_free(waiting[0]):
                cell = waiting.pop(0)
                if cell.name not in self.failed:
                    at_work.append(self.begin(cell))
                continue
            time.sleep(POLL_S)
            at_work = [work for work in at_work if self.is_going_on(work)]

    def note(self, number: int, _: FrameType | None) -> None:
        """Take a signal that came."""
        self.signals.append(number)

    def is_complete(self, cell: Cell) -> bool:
        """Whether nothing is left to do for a cell."""
        return is_trained(self.place, cell) and is_evaluated(self.place, cell)

    def is_free(self, cell: Cell) -> bool:
        """Whether nobody else trains a cell; one that stays taken has failed."""
        try:
            lock(self.place.run_dir(cell), "training there", "--output-dir").close()
        except UserError as error:
            since = self.taken_since.setdefault(cell.name, time.monotonic())
            if time.monotonic() < since + LOCKED_S:
                return False
            self.fail(cell, one_line(error))
        return True

    def begin(self, cell: Cell) -> Work:
        """Start what a cell needs next."""
        if is_trained(self.place, cell):
            return self.evaluate(cell)
        command = [str(SUPERVISE), *self.share.ranks()]
        command += ["--max-restarts", str(self.max_restarts), *self.place.flags(cell)]
        self.say(f"{cell.name}: trains")
        return self.start(cell, command, is_training=True)

    def evaluate(self, cell: Cell) -> Work:
        """Start the evaluation of a trained cell."""
        run_dir = str(self.place.run_dir(cell))
        command = ["-m", "pretrain.evaluate", "--run-dir", run_dir]
        command += ["--data-dir", str(self.place.data_dir)]
        return self.start(cell, command, is_training=False)

    def start(self, cell: Cell, command: Sequence[str], *, is_training: bool) -> Work:
        """A command of Python's that dies with this process; what it prints goes into a log."""
        path = self.place.log(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as log:
            log_begins = log.tell()
            process = subprocess.Popen(
                ["sh", str(GUARDED), sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.share.variables()},
                start_new_session=True,
            )
        return Work(cell=cell, process=process, is_training=is_training, log_begins=log_begins)

    def is_going_on(self, work: Work) -> bool:
        """Whether something still runs for a cell; what follows is started in its place."""
        code = work.process.poll()
        if code is None:
            return True
        end(work.process)
        cell = work.cell
        if self.signals:
            return False
        if work.is_training and is_trained(self.place, cell):
            follows = self.evaluate(cell)
            work.process = follows.process
            work.is_training = False
            work.log_begins = follows.log_begins
            return True
        result = evaluation_of(self.place, cell)
        if not work.is_training and code == 0 and result is not None:
            self.finished += 1
            loss = f"loss {result.whole_split.loss:.4f}"
            self.say(f"{cell.name}: {loss}; {self.progress()}")
        else:
            self.fail(cell, self.describe_failure(work, code))
        return False

    def progress(self) -> str:
        """How far it is, and how long the rest takes if cells go on taking as long."""
        words = f"{self.finished} of {self.cells} cells"
        waiting = self.cells - self.finished - len(self.failed)
        here = self.finished - self.found
        if waiting == 0:
            return words
        seconds = (time.monotonic() - self.began) / here * waiting
        return f"{words}, about {duration(seconds)} left"

    def fail(self, cell: Cell, why: str) -> None:
        """Note and say why a cell has no figures."""
        self.failed[cell.name] = why
        self.say(f"{cell.name}: failed: {why}")

    def describe_failure(self, work: Work, code: int) -> str:
        """Why a cell's command failed, on one line: what it printed, else what its run says."""
        log = self.place.log(work.cell)
        printed = log.read_bytes()[work.log_begins :].decode(errors="replace")
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        if errors:
            return printable(errors[-1].removeprefix("error: "))
        state = read_state(self.place.run_dir(work.cell))
        if state.reason:
            return printable(" ".join(state.reason.split()))
        return f"exit code {code}; {log} has what it printed"

    def stop(self, at_work: Sequence[Work]) -> None:
        """Have all that runs end after its step, and wait for that. Raises StoppedBySignal.

        Further signals go on to the supervisors too, which end at once for a second one.
        """
        told = 0
        while any(work.process.poll() is None for work in at_work):
            for number in self.signals[told:]:
                for work in at_work:
                    work.process.send_signal(number if work.is_training else signal.SIGTERM)
                told += 1
            time.sleep(POLL_S)
        for work in at_work:
            end(work.process)
        raise StoppedBySignal(self.signals[0])

    def say(self, text: str) -> None:
        """A line about the comparison."""
        with unheard():
            print(f"{self.place.output_dir}: {text}", flush=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """Close the pipe to a command that has ended, so that its guard ends what is left of it."""
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()
    process.wait()


def count_gpus() -> int:
    """GPUs of this machine. Raises UserError where torch can't tell."""
    command = [sys.executable, str(COUNT_GPUS)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if not answer.stdout.strip().isdecimal():
        why = one_line(UserError(answer.stderr[-200:]))
        raise UserError(f"GPUs cannot be counted: {why}; mend the driver, or torch here")
    return int(answer.stdout)


def share_of(at_once: int) -> Share:
    """What each of so many cells gets. Raises UserError where GPUs can't be shared out."""
    gpus = count_gpus()
    if gpus > 1 and at_once > 1:
        raise UserError(
            f"--at-once {at_once}: a cell takes all {gpus} GPUs of this machine; leave it out, or "
            "show one of them with CUDA_VISIBLE_DEVICES"
        )
    return Share(at_once=at_once, gpus=gpus)

"""The block of a run on a terminal: how far it is, its figures, its last checkpoint, warnings."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data_prep.errors import printable
from pretrain.checkpoint.writer import Saved
from pretrain.distributed.agree import LOG, WARNING
from pretrain.metrics.step_record import AnyStep, SkippedStep, StepRecord
from pretrain.view.figures import (
    BARS,
    PLAIN_BARS,
    History,
    duration,
    fitted,
    percent,
    sparkline,
)

LABEL_WIDTH = 15
CELL_WIDTH = 39  # two at 80 columns, five at 200
WIDEST_BLOCK = 200
WARNINGS_IN_SIGHT = 3
FULL = "━"
EMPTY = "─"
PLAIN_FULL = "#"
PLAIN_EMPTY = "-"


# The terminal's own colours, which its user has chosen to be readable.
DIM = "\x1b[2m"
BLUE = "\x1b[34m"
YELLOW = "\x1b[33m"
NO_COLOUR = "\x1b[0m"

Paint = Callable[[str, str], str]  # of a text and its colour


class Cell(NamedTuple):
    """A figure under its name."""

    label: str
    text: str


def none_yet() -> None:
    """Of a run that saves nothing."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a block tells of a run besides its steps."""

    name: str = ""
    newest_save: Callable[[], Saved | None] = none_yet
    bytes_per_token: float | None = None  # of the validation text; None where it is not known


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a terminal can show."""

    has_unicode: bool = True  # whether its alphabet has bars
    has_colours: bool = False


def plain(text: str, _: str) -> str:
    """A text as it is, for a terminal without colours."""
    return text


def coloured(text: str, colour: str) -> str:
    """A text in one of the terminal's own colours."""
    return f"{colour}{text}{NO_COLOUR}"


def in_columns(cells: Sequence[Cell], width: int, paint: Paint) -> list[str]:
    """Rows of as many cells as fit side by side, each at its place."""
    per_row = max(1, width // CELL_WIDTH)
    room = CELL_WIDTH - LABEL_WIDTH
    rows = []
    for first in range(0, len(cells), per_row):
        row = ""
        for label, text in cells[first : first + per_row]:
            # A blank at the end at least, where a figure is longer than its place.
            row += paint(label.ljust(LABEL_WIDTH), DIM) + text[: room - 1].ljust(room)
        rows.append(row.rstrip())
    return rows


def apart(left: str, right: str, width: int) -> str:
    """Two texts at both ends of a row; the left one gives way."""
    room = max(0, width - len(right) - 2)
    if len(left) > room:
        left = f"...{left[len(left) - room + 3 :]}" if room > 3 else ""
    return f"{left}{right.rjust(width - len(left))}"


class Block:
    """Holds what was seen of a run, and gives its rows for a width."""

    def __init__(self, about: About, total_steps: int, look: Look) -> None:
        self.about = about
        self.total_steps = total_steps
        self.has_unicode = look.has_unicode
        self.paint: Paint = coloured if look.has_colours else plain
        self.began = time.monotonic()
        self.losses = History()
        self.record: StepRecord | None = None
        self.validated: AnyStep | None = None  # the last one with a validation
        self.validation = ""  # how far one is that is under way
        self.skipped: list[int] = []
        self.ends_at: float | None = None  # by the monotonic clock, as far as it is known
        self.warnings: list[str] = []  # the last ones, each once
        for line in LOG.warnings:  # of the start, which went before
            self.heard(line)

    # What happens

    def show(self, record: AnyStep, left_s: float | None) -> None:
        """Take note of a step, and of how long the run still takes after it."""
        self.validation = ""
        if record.val_loss is not None:
            self.validated = record
        if isinstance(record, SkippedStep):
            self.skipped = [*self.skipped, record.step]
            return
        self.record = record
        self.losses.add(record.loss)
        if left_s is not None:
            self.ends_at = time.monotonic() + left_s

    def validating(self, done: int, count: int) -> None:
        """Take note of how far a validation is."""
        self.validation = f"under way, {done / count:.0%}"

    def heard(self, line: str) -> None:
        """Keep a line of the log in sight, if it is a warning: ours or Python's."""
        if not line.startswith(WARNING) and "Warning: " not in line:
            return
        text = printable(line)
        others = [known for known in self.warnings if known != text]
        self.warnings = [*others, text][-WARNINGS_IN_SIGHT:]

    # What is shown

    def rows(self, width: int) -> list[str]:
        """The block's rows, none longer than so many columns, the most important ones first."""
        width = min(width, WIDEST_BLOCK)
        record = self.record
        if record is None:
            steps = f"the first step of {self.total_steps:,} is under way"
            rows = [apart(self.about.name, steps, width)]
        else:
            rows = [*self._progress(record, width), self._loss(record, width)]
            rows += in_columns(self._cells(record), width, self.paint)
        return [*rows, *(self.paint(line[:width], YELLOW) for line in self.warnings)]

    def _progress(self, record: StepRecord, width: int) -> list[str]:
        """How far the run is: in steps and in time, then as a bar."""
        total = self.total_steps
        done = record.step + 1
        now = time.monotonic()
        figures = f"step {done:,} of {total:,}, {done / total:.1%}"
        times = f"{duration(now - self.began)} so far"
        if self.ends_at is not None:
            times += f", {duration(max(0.0, self.ends_at - now))} left"
        filled = round(width * done / total)
        full, empty = (FULL, EMPTY) if self.has_unicode else (PLAIN_FULL, PLAIN_EMPTY)
        bar = self.paint(full * filled, BLUE) + self.paint(empty * (width - filled), DIM)
        return [apart(self.about.name, f"{figures}; {times}", width), bar]

    def _loss(self, record: StepRecord, width: int) -> str:
        """The loss, and how it went."""
        label = "loss".ljust(LABEL_WIDTH)
        text = f"{fitted(record.loss, 6)}  "
        bars = BARS if self.has_unicode else PLAIN_BARS
        drawn = sparkline(self.losses.values, width - len(label) - len(text), bars)
        return self.paint(label, DIM) + text + self.paint(drawn, BLUE)

    def _cells(self, record: StepRecord) -> list[Cell]:
        cells = [
            Cell("validation", self._validation()),
            Cell("bits per byte", self._bits_per_byte()),
            Cell("checkpoint", self._checkpoint()),
            Cell("tokens/s", f"{record.tokens_per_s:,.0f}"),
            Cell("MFU", mfu_words(record)),
            Cell("learning rate", f"{record.learning_rate:.2e}"),
            Cell("gradient norm", fitted(record.gradient_norm, 6).strip()),
            Cell("memory", f"{record.peak_memory_bytes / 1e9:.2f} GB"),
            Cell("step", step_words(record)),
        ]
        if record.slowest and record.slowest.rank:
            cells.append(Cell("slowest rank", f"{record.slowest.rank}"))
        if self.skipped:
            cells.append(Cell("skipped", f"{len(self.skipped)}, last step {self.skipped[-1]:,}"))
        return cells

    def _validation(self) -> str:
        if self.validation:
            return self.validation
        if self.validated is None:
            return "none yet"
        return f"loss {fitted(self.validated.val_loss, 6)}, step {self.validated.step + 1:,}"

    def _bits_per_byte(self) -> str:
        """Of the last validation, by the mean length of the split's tokens."""
        bytes_per_token = self.about.bytes_per_token
        if bytes_per_token is None:
            return "not known"
        if self.validated is None or self.validated.val_loss is None:
            return "none yet"
        return f"{self.validated.val_loss / (math.log(2) * bytes_per_token):.4f}"

    def _checkpoint(self) -> str:
        saved = self.about.newest_save()
        if saved is None:
            return "none yet"
        return f"step {saved.step:,}, {duration(max(0.0, time.time() - saved.at))} ago"


def mfu_words(record: StepRecord) -> str:
    """The utilisation, and what it is measured against where that is no data sheet's peak."""
    if record.mfu is not None:
        return percent(record.mfu)
    if record.mfu_of_matmul is None:
        return "not known"
    return f"{percent(record.mfu_of_matmul)} of a matmul"


def step_words(record: StepRecord) -> str:
    """How long a step took, and the share of it in which data was waited for."""
    share = record.seconds["data"] / record.step_s if record.step_s else 0.0
    return f"{record.step_s:.3f} s, {share:.0%} data"

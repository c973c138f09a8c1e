"""`metrics.jsonl`, which holds a run's steps: written here alone, and read back as records."""

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from data_prep.errors import UserError, naming, what_it_says
from data_prep.files import fsync_directory
from pretrain.checkpoint.patience import patiently
from pretrain.metrics.records import ADVICE, cut_to_step, parse_quickly, stream_lines
from pretrain.metrics.step_record import AnyStep, step_of_line

METRICS_NAME = "metrics.jsonl"


def read_steps(run_dir: Path) -> list[AnyStep]:
    """The steps of a run, in order; none where it never trained. Raises UserError where a line is
    damaged, naming it.
    """
    return list(stream_steps(run_dir))


def stream_steps(run_dir: Path) -> Iterator[AnyStep]:
    """As `read_steps`, a step at a time; a last line that is torn or being written is left out."""
    path = run_dir / METRICS_NAME
    for number, line in enumerate(stream_lines(path), start=1):
        try:
            step = step_of_line(line)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"{path}: line {number}: damaged ({what_it_says(error)}); {ADVICE}"
            ) from None
        yield step


def steps_between(run_dir: Path, first: int, past_last: int) -> Iterator[AnyStep]:
    """The steps of a range, as far as the file has them: a line at a time, of a file that its run
    may be appending to, or cutting back.
    """
    path = run_dir / METRICS_NAME
    if first >= past_last or not path.exists():
        return
    with path.open("rb") as file:
        for content in file:
            # A line that is being written, or one that stands where the file was just cut. What the
            # start found in it was checked when it was opened.
            if not content.endswith(b"\n"):
                return
            try:
                line = parse_quickly(content)
            except ValueError:
                return
            if line["step"] >= past_last:
                return
            if line["step"] >= first:
                yield step_of_line(line)


class MetricsFile:
    """`metrics.jsonl`: one line a step, cut back, in its place, to the step at which a run
    continues.

    `lacks` says how many of the steps before have no line, `cut` what was found damaged behind
    these, if anything was. Raises UserError where the damage is among them.
    """

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self.path = run_dir / METRICS_NAME
        if not self.path.exists():
            self.path.touch()
            fsync_directory(run_dir)
        kept, self.cut = cut_to_step(self.path, start_step)
        self.lacks = start_step - len({line["step"] for line in kept})
        self._open()

    def _open(self) -> None:
        # Unbuffered: what a failed write leaves is in the file, or nowhere.
        self._file = self.path.open("ab", buffering=0)
        self._bytes = self._file.tell()

    def append(self, record: AnyStep) -> None:
        """Add one step's line. Raises OSError, naming the file, where the disk does not take it."""
        content = json.dumps(record.to_line()).encode() + b"\n"

        def write() -> None:
            with naming(self.path):
                # After an attempt that failed: the file server may know the old one no more.
                if self._file.closed:
                    os.truncate(self.path, self._bytes)
                    self._open()
                try:
                    write_all(self._file, content)
                except OSError:
                    with contextlib.suppress(OSError):
                        self._file.close()
                    raise

        patiently(write)
        self._bytes += len(content)

    def close(self) -> None:
        """Flush to disk and close."""
        self._file.close()
        flush_metrics(self.path.parent)


def write_all(file: FileIO, content: bytes) -> None:
    """Write all of it to an unbuffered file, which may take a part at a time."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def flush_metrics(run_dir: Path) -> None:
    """Make the lines of metrics.jsonl durable, on which a checkpoint counts.

    After a flush that failed, Linux takes its pages for written, and a second flush alone would
    succeed over lost lines: so they are written once more, in place, while the run may append.
    """
    path = run_dir / METRICS_NAME
    if not path.exists():
        return
    attempts = itertools.count(1)

    def flush() -> None:
        with naming(path), path.open("r+b", buffering=0) as file:
            if next(attempts) > 1:
                lines = file.readall()
                file.seek(0)
                write_all(file, lines)
            os.fsync(file.fileno())

    patiently(flush)

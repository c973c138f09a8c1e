"""TensorBoard's event files, in `RUN_DIR/tensorboard/`: `tensorboard --logdir RUNS` finds them.

Each start of a run writes a file of its own, whose second record says from which step on it stands
in the place of what older files have; readers that look on drop that (TensorBoard calls it
purging). It is cut off these files too, since the server that TensorBoard 2.21 starts for its data
does not heed that record. All of a step is one record, so that a kill leaves it whole or not at
all. The files alone tell what they hold: a new one begins with the first step that none of them
has.

The format is that of TensorFlow's summaries, written by TensorBoard's own classes.
"""

import os
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import yaml
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from pretrain.config.changes import flatten
from pretrain.metrics.told import AboutRun, ToldStep

DIRECTORY_NAME = "tensorboard"
PREFIX = "events.out.tfevents."
FILE_VERSION = "brain.Event:2"  # from which on readers heed where a start begins
LENGTH = struct.Struct("<Q")  # before each record, in bytes
CHECKSUM_BYTES = 4  # behind the length, and behind the record


class TensorBoardSink:
    """A run as event files."""

    def __init__(self, about: AboutRun) -> None:
        self.about = about
        self.directory = about.run_dir / DIRECTORY_NAME

    def holds(self, steps: int) -> bool:
        """Whether the files have so many steps."""
        return first_missing(event_files(self.directory), steps) == steps

    def begin(self, step: int) -> int:
        """Open the file of a start that goes on from a step. Raises OSError."""
        self.directory.mkdir(exist_ok=True)
        files = event_files(self.directory)
        first = first_missing(files, step)
        take_back(files, first)
        # Read in the order of their names, which begin with the time: a clock may have gone back.
        seconds = int(time.time())
        if files:
            seconds = max(seconds, seconds_of(files[-1]) + 1)
        name = f"{PREFIX}{seconds:010d}.{socket.gethostname()}.{os.getpid()}"
        self.writer = RecordWriter((self.directory / name).open("xb"))
        self.describes = True  # whether the next step brings the run's config with it
        self._add(Event(file_version=FILE_VERSION))
        start = SessionLog(status=SessionLog.START)
        self._add(Event(step=first, session_log=start))
        return first

    def write(self, told: ToldStep) -> None:
        """Add a step. Raises OSError."""
        summary = Summary()
        for name, figure in told.figures.items():
            summary.value.add(tag=name, simple_value=figure)
        for name, text in told.texts.items():
            summary.MergeFrom(text_pb(name, verbatim(text)))
        if self.describes:
            summary.MergeFrom(text_pb("config", as_markdown(self.about)))
            summary.MergeFrom(hparams_pb(hyperparameters(self.about), trial_id=self.about.name))
            self.describes = False
        self._add(Event(step=told.step, summary=summary))

    def close(self) -> None:
        """Close the file. Raises OSError."""
        self.writer.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self.writer.write(event.SerializeToString())
        self.writer.flush()


def as_markdown(about: AboutRun) -> str:
    """The run's config as TensorBoard's page of texts shows it."""
    return verbatim(yaml.safe_dump(about.config, sort_keys=False))


def verbatim(text: str) -> str:
    """A text that TensorBoard's page, which takes it for Markdown, shows as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())  # indented by four


def hyperparameters(about: AboutRun) -> dict[str, str | float | bool]:
    """The run's config as TensorBoard's page of hyperparameters takes it: flat, without lists."""
    found: dict[str, str | float | bool] = {}
    for key, value in flatten(about.config).items():
        if value is not None:
            found[key] = value if isinstance(value, str | int | float | bool) else str(value)
    return found


# What the files hold


def event_files(directory: Path) -> list[Path]:
    """A run's event files, in the order in which TensorBoard reads them."""
    return sorted(path for path in directory.glob(f"{PREFIX}*") if path.is_file())


def seconds_of(path: Path) -> int:
    """The time in a file's name, in seconds since 1970; 0 where there is none."""
    seconds = path.name.removeprefix(PREFIX).partition(".")[0]
    return int(seconds) if seconds.isdecimal() else 0


def first_missing(files: list[Path], step: int) -> int:
    """The first step before one that a run's files lack; the step itself where they have all.

    When a file was begun, those before it had all steps before its first.
    """
    for path in reversed(files):
        held = held_range(path)
        if held is None:
            continue
        return min(step, held.stop) if step >= held.start else step
    return 0


def take_back(files: list[Path], step: int) -> None:
    """Cut from a run's files all from a step on, newest first. Raises OSError."""
    for path in reversed(files):
        held = held_range(path)
        if held is None:
            continue
        if held.start < step:
            if held.stop > step:
                os.truncate(path, end_before(path, step))
            return  # older ones were cut to what came before this one
        path.unlink()


def end_before(path: Path, step: int) -> int:
    """Where in a file the first record of a step, or of one after it, begins, in bytes."""
    end = 0
    with path.open("rb") as file:
        for number, record in enumerate(whole_records(path)):
            # the first two are of no step
            if number > 1 and step_at(file, record) >= step:
                break
            end = record.stop + CHECKSUM_BYTES
    return end


def held_range(path: Path) -> range | None:
    """The steps of a file; None where a kill left no beginning."""
    records = whole_records(path)
    next(records, None)  # its version
    start = next(records, None)
    if start is None:
        return None
    with path.open("rb") as file:
        first = step_at(file, start)
        steps = deque(records, maxlen=1)  # the last one alone
        past_last = step_at(file, steps[0]) + 1 if steps else first
    return range(first, past_last)


def whole_records(path: Path) -> Iterator[range]:
    """Where in a file its records lie, in bytes; one that a kill tore is none."""
    size = path.stat().st_size
    end = 0
    with path.open("rb") as file:
        while len(head := file.read(LENGTH.size)) == LENGTH.size:
            begin = end + LENGTH.size + CHECKSUM_BYTES
            length: int = LENGTH.unpack(head)[0]
            end = begin + length + CHECKSUM_BYTES
            if end > size:
                return
            yield range(begin, begin + length)
            file.seek(end)


def step_at(file: BinaryIO, place: range) -> int:
    """The step of the record that lies there."""
    file.seek(place.start)
    event = Event.FromString(file.read(len(place)))
    return int(event.step)

"""Sinks: tools that draw a run while it trains, told of every step that metrics.jsonl has.

    log.sinks: [tensorboard]      in a recipe, or --log.sinks=tensorboard

metrics.jsonl is the truth, and a sink is brought to it. Each sink has a thread of its own: training
puts a record on its queue and goes on. Where a start goes on from a step, the sink takes back what
it has from there on, and is told what it lacks before, out of the file: what a kill lost, the steps
before a branch. Where the queue is full, records are left out of it, and read from the file later.

So no step is drawn twice and none is missing, and nothing that a sink does can hold up a step: one
that fails is warned of once, and told no more until the next start brings it up to date; or the
same command once the run is finished, which has nothing else to do.
"""

import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

from data_prep.errors import UserError, install_advice, nearest, one_line
from pretrain.metrics.metrics_file import steps_between
from pretrain.metrics.step_record import AnyStep
from pretrain.metrics.told import AboutRun, ToldStep, told

QUEUED = 1000  # records that wait for a sink; more are read from metrics.jsonl
# What W&B takes, which would say so only when the run has begun.
WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")

Warn = Callable[[str], None]


class Sink(Protocol):
    """What draws a run. All is called by one thread; whatever is raised, the run does not see."""

    def holds(self, steps: int) -> bool:
        """Whether it is known to have so many steps, the first ones, from starts before this."""

    def begin(self, step: int) -> int:
        """Take back whatever is there from a step on, or begin anew; returns the first step, at
        most this one, that is to be written next.
        """

    def write(self, told: ToldStep) -> None:
        """Draw the next step."""

    def close(self) -> None:
        """Have all that was written where its reader looks. After it, begin may be called again."""


def open_tensorboard(about: AboutRun) -> Sink:
    """Event files below the run's directory."""
    from pretrain.metrics.tensorboard_sink import TensorBoardSink

    return TensorBoardSink(about)


def open_trackio(about: AboutRun) -> Sink:
    """A run of trackio, wherever it keeps or sends those of this user."""
    from pretrain.metrics.trackio_sink import TrackioSink

    return TrackioSink(about)


def open_wandb(about: AboutRun) -> Sink:
    """A run of W&B, online or below the run's directory."""
    from pretrain.metrics.wandb_sink import WandbSink

    return WandbSink(about)


# By name; the package that each needs has that name, and so has our extra that installs it.
OPENERS: dict[str, Callable[[AboutRun], Sink]] = {
    "tensorboard": open_tensorboard,
    "trackio": open_trackio,
    "wandb": open_wandb,
}


def check_sinks(names: Sequence[str]) -> None:
    """Raise UserError for the first sink whose package is not installed, or that a variable tells
    what it does not know. Imports none.
    """
    mode = os.environ.get("WANDB_MODE")
    if "wandb" in names and mode and mode not in WANDB_MODES:
        raise UserError(
            f"log.sinks: wandb: the variable WANDB_MODE is {mode!r}; {nearest(mode, WANDB_MODES)}"
        )
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"log.sinks: {name}: the package {name} is not installed; {install_advice(name)}, "
                "or leave the sink out"
            )


@dataclass(frozen=True, kw_only=True)
class GoBack:
    """The run goes on from a step that came before."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Close:
    """Nothing follows; so many steps are done."""

    steps: int


class Feed(threading.Thread):
    """The thread that tells one sink of a run, from a step on."""

    after_failure = "it is told no more of this start, training goes on"

    def __init__(self, name: str, about: AboutRun, step: int, warn: Warn) -> None:
        # A daemon, so that a sink that hangs keeps no process alive.
        super().__init__(name=f"sink {name}", daemon=True)
        self.sink_name = name
        self.about = about
        self.start_step = step
        self.warn = warn
        self.waiting: SimpleQueue[AnyStep | GoBack | Close] = SimpleQueue()
        self.next_step = 0  # that the sink is to be told of
        self.start()

    def put(self, task: AnyStep | GoBack | Close) -> None:
        """Have the sink told, some time; a record that finds the queue full is left to the file."""
        is_record = not isinstance(task, GoBack | Close)
        if self.is_alive() and not (is_record and self.waiting.qsize() >= QUEUED):
            self.waiting.put(task)

    def run(self) -> None:
        """The body of the thread, to the end of the run or the sink's first failure."""
        try:
            self._feed(OPENERS[self.sink_name](self.about))
        # Of what packages raise, disks and networks cause, nothing may end a run.
        except Exception as error:
            self.warn(
                f"warning: log.sinks: {self.sink_name}: {type(error).__name__}: {one_line(error)}; "
                f"{self.after_failure}; the same command brings it up to date later"
            )

    def _feed(self, sink: Sink) -> None:
        self._begin(sink, self.start_step)
        while True:
            task = self.waiting.get()
            if isinstance(task, GoBack):
                sink.close()
                self._begin(sink, task.step)
            elif isinstance(task, Close):
                self._catch_up(sink, task.steps)
                sink.close()
                return
            elif task.step >= self.next_step:  # else it was read from the file before
                self._catch_up(sink, task.step)
                self._write(sink, task)

    def _begin(self, sink: Sink, step: int) -> None:
        self.next_step = sink.begin(step)
        self._catch_up(sink, step)

    def _catch_up(self, sink: Sink, step: int) -> None:
        """Tell of the steps before one that the sink lacks, out of metrics.jsonl."""
        for record in steps_between(self.about.run_dir, self.next_step, step):
            self._write(sink, record)

    def _write(self, sink: Sink, record: AnyStep) -> None:
        sink.write(told(record, self.about))
        self.next_step = record.step + 1


class LateFeed(Feed):
    """The thread that has one sink draw what it lacks of a run that is finished, if anything."""

    after_failure = "it lacks steps of this run"
    drew = False

    def _feed(self, sink: Sink) -> None:
        self.next_step = self.start_step
        if sink.holds(self.start_step):
            return
        self._begin(sink, self.start_step)
        sink.close()
        self.drew = True


class Sinks:
    """The sinks of a run, on rank 0; none on other ranks."""

    def __init__(self, names: Iterable[str], about: AboutRun | None, step: int, warn: Warn) -> None:
        self.warn = warn
        self.feeds = [Feed(name, about, step, warn) for name in names if about is not None]

    def add(self, record: AnyStep) -> None:
        """Have all told of a step whose line is in metrics.jsonl. Never waits."""
        for feed in self.feeds:
            feed.put(record)

    def go_back(self, step: int) -> None:
        """Have all take back what they have from a step on. Never waits."""
        for feed in self.feeds:
            feed.put(GoBack(step=step))

    def close(self, steps: int, patience_s: float) -> None:
        """After so many steps: wait until all have drawn them, but no longer than so."""
        for feed in self.feeds:
            feed.put(Close(steps=steps))
        deadline = time.monotonic() + patience_s
        for feed in self.feeds:
            feed.join(max(0.0, deadline - time.monotonic()))
            if feed.is_alive():
                self.warn(
                    f"warning: log.sinks: {feed.sink_name}: has {feed.next_step:,} of {steps:,} "
                    f"steps, {patience_s:g} s after the last; not waited for any longer; "
                    "the same command brings it up to date later"
                )


def bring_up_to_date(
    names: Iterable[str], about: AboutRun, steps: int, warn: Warn, patience_s: float
) -> list[str]:
    """Have sinks draw what they lack of a finished run of so many steps, out of metrics.jsonl.

    Returns the names of those that lacked some and have all now; waits no longer than so.
    """
    late = Sinks((), None, steps, warn)
    feeds = [LateFeed(name, about, steps, warn) for name in names]
    late.feeds.extend(feeds)
    late.close(steps, patience_s)
    return [feed.sink_name for feed in feeds if feed.drew]

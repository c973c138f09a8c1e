"""Trackio's project "tablefree", where it keeps its projects (`TRACKIO_DIR`) or sends them.

    RUN_DIR/trackio.json      the name of the run that draws this one

Trackio takes no step back. Where it has only steps that the run goes on from, a start goes on in
the same run of trackio; else it begins a new one, whose config names the old one, and draws all
steps there. Trackio itself meets what fails with warnings, and drops it: so what it has is counted,
where that can be seen from here. What a server has cannot, so there each start begins a new run.

Trackio greets on stdout, which would stand amid the log or the block on a terminal: it is silenced.
What it warns of is said when the sink is closed, in one line of ours, if steps are lost by it.
"""

import os
import secrets
import time
import warnings
from types import SimpleNamespace

import trackio
import trackio.deploy
import trackio.run
import trackio.utils
from trackio.sqlite_storage import SQLiteStorage

from pretrain.metrics.run_note import RunNote, read_note, write_note
from pretrain.metrics.told import AboutRun, ToldStep

PROJECT = "tablefree"
NOTE_NAME = "trackio.json"
# For what it is handed trackio opens its database anew, every half a second, which takes 4.5 ms of
# CPU time: 0.9 % of a quick start's step, and a tenth of that so.
HAND_ON_EVERY_S = 5.0
ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")  # variables that have it sent to a server


class TrackioSink:
    """A run as trackio draws it."""

    def __init__(self, about: AboutRun) -> None:
        self.about = about
        self.note = about.run_dir / NOTE_NAME
        self.waiting: list[ToldStep] = []
        self.handed_on_at = 0.0  # seconds of the monotonic clock
        self.heard: list[str] = []  # what trackio warned of
        keep_silent(self.heard)

    def holds(self, steps: int) -> bool:
        """Whether the run of the start before has so many; by its note where it can't be seen."""
        before = read_note(self.note)
        if before is None:
            return False
        return (steps_held(before.run) if is_kept_here() else before.steps) == steps

    def begin(self, step: int) -> int:
        """Go on in the run of the start before, or begin one. Raises what trackio does."""
        before = read_note(self.note)
        held = steps_held(before.run) if before else None
        if before and held is not None and 0 < held <= step:
            self._init(before.run, "must", {})
            self.steps = held
            return held
        name = f"{self.about.name}-{secrets.token_hex(3)}"
        self.steps = 0
        write_note(self.note, RunNote(project=PROJECT, run=name))
        self._init(name, "never", {"continues": before.run} if before and step else {})
        return 0

    def _init(self, name: str, resume: str, more: dict[str, str]) -> None:
        self.run = trackio.init(
            project=PROJECT,
            name=name,
            config=self.about.config | more,
            resume=resume,
            embed=False,
            # threads that look at the machine are no part of what was asked for
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, told: ToldStep) -> None:
        """Hand over a step, some seconds later with those that follow it."""
        self.waiting.append(told)
        self.steps = told.step + 1
        if time.monotonic() - self.handed_on_at >= HAND_ON_EVERY_S:
            self._hand_on()

    def _hand_on(self) -> None:
        """Hand over the steps that wait, with their texts."""
        for told in self.waiting:
            row: dict[str, float | str] = {**told.figures, **told.texts}
            self.run.log(row, step=told.step)
        self.waiting.clear()
        self.handed_on_at = time.monotonic()

    def close(self) -> None:
        """Have trackio write what it holds back. Raises OSError where it did not write all."""
        self._hand_on()
        self.run.finish()
        is_whole = steps_held(self.run.name) is not None if is_kept_here() else not self.heard
        if not is_whole:
            why = f" ({self.heard[0]})" if self.heard else ""
            raise OSError(f"some steps were not written{why}; a new run of it is to have all")
        write_note(self.note, RunNote(project=PROJECT, run=self.run.name, steps=self.steps))


def keep_silent(heard: list[str]) -> None:
    """Have trackio print nothing from here on, and nobody else: sys.stdout is of all threads. What
    it warns of is kept.
    """

    def hear(message: str, *_more: object, **_options: object) -> None:
        heard.append(str(message))

    vars(trackio.utils)["warnings"] = SimpleNamespace(**{**vars(warnings), "warn": hear})
    for module in (trackio, trackio.deploy, trackio.run, trackio.utils):
        vars(module)["print"] = print_nothing


def print_nothing(*_what: object, **_how: object) -> None:
    """In the place of Python's print, in the modules of trackio that a run is told through."""


def is_kept_here() -> bool:
    """Whether what trackio has can be looked at: no server has it, and no inbox of files."""
    is_sent = any(os.environ.get(variable) for variable in ELSEWHERE)
    return not is_sent and trackio.utils.get_storage_mode() == "sqlite"


def steps_held(name: str) -> int | None:
    """How many steps, from the first on, a run of trackio has; None where one is missing or there
    twice, or it cannot be seen.
    """
    if not is_kept_here():
        return None
    last = SQLiteStorage.get_last_step(PROJECT, name)
    count = SQLiteStorage.get_log_count(PROJECT, name)
    if last is None or count != last + 1:
        return None
    return int(count)

"""One start of the training command, up to its end or to the fault that strikes it."""

import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.waiting import came_true

from broken_runs.jobs import POLL_S, Job
from broken_runs.leavings import last_step, stamp_of
from data_prep.errors import UserError
from pretrain.checkpoint.layout import checkpoints_dir

PATIENCE_S = 300.0  # for a job on which nothing moves

LOADING = "while loading"
STEP = "in a step"
SAVE = "in a save"


@dataclass(kw_only=True)
class Pace:
    """How long things take, seconds; moments are drawn by it."""

    load: float = 2.0
    step: float = 0.05
    save: float = 0.05


class Attempt:
    """One start of the command."""

    def __init__(self, start: Callable[[], Job], run_dir: Path, pace: Pace) -> None:
        self.run_dir = run_dir
        self.pace = pace
        self.metrics = run_dir / "metrics.jsonl"
        self.state = run_dir / "state.json"
        self.starts = run_dir / "starts.jsonl"
        self.starts_before = stamp_of(self.starts)
        self.state_before = stamp_of(self.state)
        self.began = time.time()
        self.job = start()

    def has_met(self) -> bool:
        """Whether its ranks have met: rank 0 says so in state.json after they did."""
        return stamp_of(self.state) != self.state_before

    def has_loaded(self) -> bool:
        """Whether training has begun: metrics.jsonl is cut back, then a start recorded."""
        return stamp_of(self.starts) != self.starts_before

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

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written, or an old one removed."""
        return bool(self.staging())

    def has_saved(self) -> bool:
        """Whether nothing is being written or removed."""
        return not self.staging()

    def moment(self, loaded: bool) -> str:
        """The moment at which it was struck: in a save, if one was begun and not finished."""
        if self.is_saving():
            return SAVE
        return STEP if loaded else LOADING

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for it; False if the job came to its end before. Raises RuntimeError if the job
        stands still.
        """
        while not condition() and self.job.is_running():
            self._until_news(condition)
        return self.job.is_running()

    def _until_news(self, condition: Callable[[], bool]) -> None:
        before = stamp_of(self.metrics)

        def is_news() -> bool:
            ended = condition() or not self.job.is_running()
            return ended or stamp_of(self.metrics) != before

        if not came_true(is_news, PATIENCE_S, POLL_S):
            raise RuntimeError(f"nothing happened for {PATIENCE_S:.0f} s:\n{self.last_words()}")

    def last_words(self) -> str:
        """The end of what it printed."""
        return self.job.said()[-3000:]

    def until_loaded(self) -> bool:
        """Wait until training begins, and note how long that took."""
        if not self.until(self.has_loaded):
            return False
        self.pace.load = time.time() - self.began
        return True

    def until_step(self, step: int) -> bool:
        """Wait until it has trained a step."""
        return self.until_loaded() and self.until(lambda: last_step(self.metrics) >= step)

    def until_moment(self, moment: str, step: int, sample: random.Random) -> bool:
        """Wait for a random moment of this kind, after a step; False if the job came to its end
        before.
        """
        if moment == LOADING:
            time.sleep(sample.uniform(0, self.pace.load))
            return self.job.is_running()
        if not self.until_step(step):
            return False
        if moment == SAVE and not self.until(self.is_saving):
            return False
        longest = self.pace.save if moment == SAVE else self.pace.step
        time.sleep(sample.uniform(0, longest))
        return self.job.is_running()

    def measure(self) -> None:
        """Watch it to its end, to learn its pace. Raises UserError if it trains no step."""
        self.until_loaded()
        saves = []
        while self.until(self.is_saving):
            began = time.monotonic()
            self.until(self.has_saved)
            saves.append(time.monotonic() - began)
        if saves:
            self.pace.save = statistics.median(saves)
        text = self.metrics.read_text() if self.metrics.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        steps = [line["step_s"] for line in lines if "step_s" in line]
        if not steps:
            errors = [line for line in self.job.said().splitlines() if "error" in line]
            said = errors[0].removeprefix("error: ") if errors else "it said nothing"
            raise UserError(f"the unbroken run trained no step: {said}")
        self.pace.step = statistics.median(steps)

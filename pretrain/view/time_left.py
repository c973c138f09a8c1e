"""How long a run will still take: its steps, and the validations and saves between them."""

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator
from typing import Literal

from pretrain.config.recipe import Recipe

RECENT_STEPS = 20  # one step may be slow: a checkpoint is written beside it, or another job starts

Pause = Literal["validation", "save"]


def times_due(every: int, done: int, total: int) -> int:
    """How often something that happens every so many steps, and at the end, is still to happen
    after `done` steps.
    """
    if done >= total:
        return 0
    times = total // every - done // every
    if total % every != 0:
        times += 1  # at the end, which is no multiple
    return times


class TimeLeft:
    """An estimate by what steps, validations and saves took so far, in seconds.

    `validation_tokens` are those of one validation. Until one was made, it is thought to take as
    long as the forward passes of steps of so many tokens; a save, for which training waits only
    while its state is copied, no time.
    """

    def __init__(self, recipe: Recipe, validation_tokens: int) -> None:
        self.recipe = recipe
        self.validation_tokens = validation_tokens
        self.step_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self.forward_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self.pause_s: dict[Pause, float] = {}  # what the last of its kind took

    def saw_step(self, step_s: float, forward_s: float) -> None:
        """Take note of a step, and of its forward passes."""
        self.step_s.append(step_s)
        self.forward_s.append(forward_s)

    @contextlib.contextmanager
    def during(self, pause: Pause) -> Iterator[None]:
        """Take note of what happens inside: training waits for it."""
        began = time.monotonic()
        yield
        self.pause_s[pause] = time.monotonic() - began

    def seconds(self, done: int) -> float:
        """From the end of `done` steps, the last one seen among them, to the end of the run."""
        recipe = self.recipe
        total = recipe.total_steps
        validations = times_due(recipe.validation.every_steps, done, total)
        saves = times_due(recipe.checkpoints.every_steps, done, total)
        steps_s = (total - done) * statistics.median(self.step_s)
        validation_s = self.pause_s.get("validation", self._guess_validation_s())
        return steps_s + validations * validation_s + saves * self.pause_s.get("save", 0.0)

    def _guess_validation_s(self) -> float:
        forward_s_per_token = (
            statistics.median(self.forward_s) / self.recipe.batch.global_batch_tokens
        )
        return self.validation_tokens * forward_s_per_token

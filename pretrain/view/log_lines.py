"""A line of the log now and then, for a run whose output goes to a file or through a pipe.

Every figure has its place, so that it can be read down a column; what else a step was is in
metrics.jsonl.
"""

import math
import time

from data_prep.errors import printable
from pretrain.config.recipe import LogRecipe
from pretrain.distributed.agree import inform
from pretrain.distributed.world import World
from pretrain.metrics.step_record import AnyStep, Sample, StepRecord
from pretrain.view.figures import duration, fitted, percent

LONGEST = 120  # characters of a line
MOST_DIGITS = 7  # of a run's steps, for which there is room for its memory too


def step_line(record: StepRecord, total_steps: int, left_s: float | None) -> str:
    """The line of a step, of at most LONGEST characters; `left_s` is how long the run still takes,
    if that is known.
    """
    width = len(str(total_steps))
    measured = record.mfu is None  # against a matrix product: the star says so
    mfu = percent(record.mfu_of_matmul if measured else record.mfu)
    val = "val" if record.val_loss is not None else "   "
    left = "" if left_s is None else f"eta {duration(left_s):>6}"
    columns = [
        f"step {record.step + 1:{width}d}/{total_steps}",
        f"loss {fitted(record.loss, 6)}",
        f"{val} {fitted(record.val_loss, 6)}",
        f"lr {record.learning_rate:.1e}",
        f"norm {fitted(record.gradient_norm, 5)}",
        f"{record.tokens_per_s:10,.0f} tok/s",
        f"{'MFU*' if measured else 'MFU'} {mfu:>5}",
        f"{fitted(record.peak_memory_bytes / 1e9, 4)} GB",
        left,
    ]
    if width > MOST_DIGITS:
        del columns[-2]
    return "  ".join(columns).rstrip()


def sample_line(number: int, sample: Sample) -> str:
    """The line of a sample, of at most LONGEST characters; line breaks are shown as such."""
    bits = "" if sample.bits_per_byte is None else f" ({sample.bits_per_byte:.3f} bits/byte)"
    beginning = f"sample {number}{bits}: "
    text = f"{sample.prompt} -> {sample.text}".replace("\r", "␍").replace("\n", "⏎")
    return beginning + shortened(printable(text), LONGEST - len(beginning))


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters; dots stand for what was cut off."""
    return text if len(text) <= most else text[: most - 3] + "..."


class LogLines:
    """Says the line of a step where one is due: at the first step, at a validation, at the end, and
    in between as the recipe has it.
    """

    def __init__(self, world: World, recipe: LogRecipe, total_steps: int) -> None:
        self.world = world
        self.recipe = recipe
        self.total_steps = total_steps
        self._last_at = -math.inf
        self._validating_at: float | None = None  # when the validation under way began

    def show(self, record: AnyStep, left_s: float | None) -> None:
        """Say the line of a trained step, if it is due; of a skipped one the trainer tells."""
        self._validating_at = None
        if isinstance(record, StepRecord) and self._is_due(record):
            inform(self.world, step_line(record, self.total_steps, left_s))
            self._last_at = time.monotonic()
        for number, sample in enumerate(record.samples):
            inform(self.world, sample_line(number, sample))

    def _is_due(self, record: StepRecord) -> bool:
        steps = record.step + 1
        if record.val_loss is not None or steps == self.total_steps:
            return True
        if self._last_at == -math.inf:
            return True
        if self.recipe.every_steps is not None:
            return steps % self.recipe.every_steps == 0
        return time.monotonic() - self._last_at >= self.recipe.every_s

    def validating(self, done: int, count: int) -> None:
        """Say how far a validation is that takes long."""
        now = time.monotonic()
        if self._validating_at is None:
            self._validating_at = now
            self._last_at = max(self._last_at, now)
        if not done or now - self._last_at <= self.recipe.every_s:
            return
        left_s = (now - self._validating_at) / done * (count - done)
        inform(self.world, f"validating: {done / count:.0%} done, {duration(left_s)} left of it")
        self._last_at = now

    def close(self) -> None:
        """Nothing is left to say."""

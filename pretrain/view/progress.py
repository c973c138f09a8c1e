"""What a run says while it trains: a bar on a terminal, or a line now and then.

It reads records, and adds nothing to them.
"""

import math
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from pretrain.config.recipe import Recipe
from pretrain.data.loader import TrainingLoader
from pretrain.distributed.agree import say
from pretrain.distributed.world import World
from pretrain.metrics.step_record import StepRecord
from pretrain.view.time_left import TimeLeft

T = TypeVar("T")
# Beyond four, repeated text is worth little (Muennighoff et al. 2023, arXiv 2305.16264).
MANY_EPOCHS = 4.0


def epochs_lines(recipe: Recipe, loader: TrainingLoader) -> list[str]:
    """How often each source is gone through, and a warning where that is too often."""
    epochs = loader.manifest.epochs(recipe.total_steps * recipe.batch.global_batch_tokens)
    seen = ", ".join(f"{name} {count:.2f}" for name, count in epochs.items())
    tail = sum(loader.unseen_tail_tokens().values())
    lines = [
        f"epochs: {seen}; {tail:,} tokens at the ends of sources fill no window and are never seen"
    ]
    for name, count in epochs.items():
        if count > MANY_EPOCHS:
            lines.append(
                f"warning: {name} is gone through {count:.1f} times; beyond {MANY_EPOCHS:g}, "
                "repetition is worth little"
            )
    return lines


class Progress:
    """A bar on a terminal; plain lines, now and then, where the output goes to a file."""

    LINE_EVERY_S = 15.0

    def __init__(self, time_left: TimeLeft, start_step: int, world: World) -> None:
        self.time_left = time_left
        self.start_step = start_step
        self.total_steps = time_left.recipe.total_steps
        self.world = world
        self.bar = tqdm(
            total=self.total_steps,
            initial=start_step,
            unit="step",
            disable=bar_is_off(world),
            dynamic_ncols=True,
            # Without the estimate of its own: ours knows of validations and saves.
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]",
        )
        self.last_line_at = -math.inf

    def show(self, record: StepRecord) -> None:
        """Report a finished step."""
        self.time_left.saw_step(record.step_s, record.seconds["forward"])
        figures = figures_of(record)
        left = ""
        if record.step > self.start_step:  # the first one compiles and fills caches
            left = f"{self.time_left.seconds(record.step + 1) / 60:.1f} min left"
        postfix = f"{left}, {figures}" if left else figures
        self.bar.set_postfix_str(postfix, refresh=False)
        self.bar.update(record.step + 1 - self.bar.n)  # steps are skipped, and gone back
        if record.val_loss is not None:
            figures += f", validation loss {record.val_loss:.4f}"
        elif not self._is_line_due():
            return
        if left:
            figures += f", {left}"
        if self.world.world_size > 1 and record.slowest:
            slowest = record.slowest
            split = split_words(slowest.seconds, slowest.peak_memory_bytes)
            figures += f"; slowest rank {slowest.rank}: {split}; rank 0"
        split = split_words(record.seconds, record.peak_memory_bytes)
        step = f"step {record.step + 1:,} of {self.total_steps:,}"
        say(self.world, f"{step}: {figures}: {split}")
        self.last_line_at = time.monotonic()

    def _is_line_due(self) -> bool:
        """Whether the last line is long enough ago, where no bar stands for it."""
        is_long_ago = time.monotonic() - self.last_line_at >= self.LINE_EVERY_S
        return bool(self.bar.disable) and is_long_ago

    def validating(self, batches: Iterable[T], count: int) -> Iterator[T]:
        """This rank's validation batches, so many, with a bar of their own, or lines where there
        is none.
        """
        began = time.monotonic()
        line_at = began
        bar = tqdm(
            total=count,
            unit="batch",
            desc="validating",
            disable=bar_is_off(self.world),
            leave=False,
            dynamic_ncols=True,
        )
        for done, batch in enumerate(batches):
            now = time.monotonic()
            if bar.disable and done and now - line_at > self.LINE_EVERY_S:
                left_s = (now - began) / done * (count - done)
                share = f"{done / count:.0%} done"
                say(self.world, f"validating: {share}, {left_s / 60:.1f} min left of it")
                line_at = now
            yield batch
            bar.update()
        bar.close()

    def close(self) -> None:
        """Leave the terminal clean."""
        self.bar.close()


def bar_is_off(world: World) -> bool | None:
    """What tqdm takes for `disable`: None has it look whether stderr is a terminal."""
    return None if world.is_main else True


def figures_of(record: StepRecord) -> str:
    """A step's figures, in words."""
    rate = f"{record.tokens_per_s:,.0f} tokens/s"
    if record.mfu is not None:
        rate += f", MFU {record.mfu:.1%}"
    return (
        f"loss {record.loss:.4f}, {rate}, lr {record.learning_rate:.2e}, "
        f"gradient norm {record.gradient_norm:.2f}"
    )


def split_words(seconds: dict[str, float], peak_memory_bytes: int) -> str:
    """Where a rank's step went, in words, and its memory."""
    parts = {
        "data": seconds["data"],
        "forward+backward": seconds["forward"] + seconds["backward"],
        "optimizer": seconds["optimizer"],
        "rest": seconds["other"],
    }
    whole = sum(parts.values())
    shares = ", ".join(f"{name} {part / whole:.0%}" for name, part in parts.items())
    return f"{shares}, {peak_memory_bytes / 1e9:.2f} GB"

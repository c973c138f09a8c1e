"""What a run says while it trains: what it is about to do, then a bar on a terminal or a line
now and then.
"""

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from pretrain.config.recipe import Recipe
from pretrain.costs.devices import find_device
from pretrain.costs.flops import flops_per_token
from pretrain.data.loader import TrainingLoader
from pretrain.distributed.agree import say
from pretrain.distributed.world import World
from pretrain.view.time_left import TimeLeft

T = TypeVar("T")
# beyond four, repeated text is worth little (Muennighoff et al. 2023, arXiv 2305.16264)
MANY_EPOCHS = 4.0


def epochs_lines(recipe: Recipe, loader: TrainingLoader) -> list[str]:
    """How often each source is gone through, and a warning where that is too often."""
    epochs = loader.manifest.epochs(recipe.total_steps * recipe.batch.global_batch_tokens)
    seen = ", ".join(f"{name} {count:.2f}" for name, count in epochs.items())
    tail = sum(loader.unseen_tail_tokens().values())
    often = [
        f"warning: {name} is gone through {count:.1f} times; beyond {MANY_EPOCHS:g}, repetition "
        "is worth little"
        for name, count in epochs.items()
        if count > MANY_EPOCHS
    ]
    return [
        f"epochs: {seen}; {tail:,} tokens at the ends of sources fill no window and are never seen",
        *often,
    ]


class Utilisation:
    """Model-FLOPs utilisation: the model's FLOPs a second over the device's bf16 peak; see
    pretrain/costs/flops.py.
    """

    def __init__(self, recipe: Recipe, device: torch.device, world: World) -> None:
        self.name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.flops_per_token = flops_per_token(recipe.model)
        is_gpu = device.type == "cuda"
        known = find_device(
            self.name, torch.cuda.get_device_properties(device).total_memory if is_gpu else None
        )
        self.peak_flops = known.peak_flops * world.world_size if known else None

    def mfu(self, tokens_per_s: float) -> float | None:
        """Between 0 and 1; None where the device's peak is not known."""
        return tokens_per_s * self.flops_per_token / self.peak_flops if self.peak_flops else None

    def __str__(self) -> str:
        cost = f"{self.flops_per_token / 1e9:.3g} GFLOP a token"
        if self.peak_flops is None:
            return f"device {self.name}: {cost}; its peak is not known, so no MFU is shown"
        return (
            f"device {self.name}: {cost}, peak {self.peak_flops / 1e12:,.0f} TFLOP/s over all ranks"
        )


class Progress:
    """A bar on a terminal; plain lines, now and then, where the output goes to a file."""

    LINE_EVERY_S = 15.0

    def __init__(
        self,
        recipe: Recipe,
        start_step: int,
        device: torch.device,
        world: World,
        validation_tokens: int = 0,
    ) -> None:
        self.world = world
        self.time_left = TimeLeft(recipe, validation_tokens)
        self.utilisation = Utilisation(recipe, device, world)
        say(world, str(self.utilisation))
        is_off = None if world.is_main else True  # None: unless stderr is a terminal
        self.bar = tqdm(
            total=recipe.total_steps,
            initial=start_step,
            unit="step",
            disable=is_off,
            dynamic_ncols=True,
            # its own estimate is ours
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]",
        )
        self.start_step, self.total_steps = start_step, recipe.total_steps
        self.last_line_at = -math.inf

    def show(self, line: dict[str, Any]) -> None:
        """Report a finished step; adds its MFU to its line, where the device's peak is known."""
        mfu, rate = (
            self.utilisation.mfu(line["tokens_per_s"]),
            f"{line['tokens_per_s']:,.0f} tokens/s",
        )
        if mfu is not None:
            line["mfu"] = mfu
            rate += f", MFU {mfu:.1%}"
        figures = f"loss {line['loss']:.4f}, {rate}, lr {line['learning_rate']:.2e}"
        figures += f", gradient norm {line['gradient_norm']:.2f}"
        self.time_left.saw_step(line["step_s"], line["seconds"]["forward"])
        left = f"{self.time_left.seconds(line['step'] + 1) / 60:.1f} min left"
        is_first = line["step"] == self.start_step  # which compiles, allocates and fills caches
        self.bar.set_postfix_str(figures if is_first else f"{left}, {figures}", refresh=False)
        self.bar.update(line["step"] + 1 - self.bar.n)  # steps are skipped, and gone back
        if "val_loss" in line:
            figures += f", validation loss {line['val_loss']:.4f}"
        elif not self.bar.disable or time.monotonic() - self.last_line_at < self.LINE_EVERY_S:
            return
        figures += "" if is_first else f", {left}"
        if self.world.world_size > 1 and line["slowest"]:
            figures += (
                f"; slowest rank {line['slowest']['rank']}: {split_words(line['slowest'])}; rank 0"
            )
        say(
            self.world,
            f"step {line['step'] + 1:,} of {self.total_steps:,}: {figures}: {split_words(line)}",
        )
        self.last_line_at = time.monotonic()

    def validating(self, batches: Iterable[T], count: int) -> Iterator[T]:
        """This rank's validation batches, so many, with a bar of their own, or lines where there
        is none.
        """
        began = next_line_at = time.monotonic()
        is_off = None if self.world.is_main else True
        bar = tqdm(
            total=count,
            unit="batch",
            desc="validating",
            disable=is_off,
            leave=False,
            dynamic_ncols=True,
        )
        for done, batch in enumerate(batches):
            now = time.monotonic()
            if bar.disable and done and now - next_line_at > self.LINE_EVERY_S:
                left_s = (now - began) / done * (count - done)
                say(
                    self.world,
                    f"validating: {done / count:.0%} done, {left_s / 60:.1f} min left of it",
                )
                next_line_at = now
            yield batch
            bar.update()
        bar.close()

    def close(self) -> None:
        """Leave the terminal clean."""
        self.bar.close()


def split_words(figures: dict[str, Any]) -> str:
    """Where a rank's step went, in words, and its memory."""
    seconds = figures["seconds"]
    parts = {
        "data": seconds["data"],
        "forward+backward": seconds["forward"] + seconds["backward"],
        "optimizer": seconds["optimizer"],
        "rest": seconds["other"],
    }
    shares = ", ".join(f"{name} {part / sum(parts.values()):.0%}" for name, part in parts.items())
    return f"{shares}, {figures['peak_memory_bytes'] / 1e9:.2f} GB"

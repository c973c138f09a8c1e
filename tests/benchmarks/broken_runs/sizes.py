"""Recipes, data and disks that have room for the faults."""

import argparse
import math
from pathlib import Path

from support.runs import counting_dataset, write_recipe

from data_prep.errors import UserError
from pretrain.config.recipe import Recipe
from pretrain.costs.flops import count_parameters

EVERY_STEPS = 5  # between saves
STEPS_BESIDE = 3 * EVERY_STEPS  # those that the faults need
DISK_BYTES = 400 << 20  # at least; of larger checkpoints it holds CHECKPOINTS_ON_DISK
CHECKPOINTS_ON_DISK = 4
BYTES_A_PARAMETER = 12  # of a checkpoint: master and both moments, fp32
TOKENS_OF_DATA = 8_000  # of the small data set


def built_in_recipe(path: Path, faults: int, is_quick: bool) -> Path:
    """Steps of a few ten milliseconds, 6 MB a checkpoint (3 in the short form), and room for the
    faults.
    """
    windows = 6 if is_quick else 12
    return write_recipe(
        path,
        model={"d_model": 64 if is_quick else 96, "num_layers": 4, "seq_len": 16},
        batch={"global_batch_tokens": windows * 16, "micro_batch_size": 3 if is_quick else 2},
        validation={"every_steps": EVERY_STEPS, "eval_tokens": 64},
        checkpoints={"every_steps": EVERY_STEPS},
        train_tokens=(STEPS_BESIDE + EVERY_STEPS * faults) * windows * 16,
    )


def numbers_of_ranks(flags: argparse.Namespace) -> list[int]:
    """All on which the run is to go."""
    changed = flags.world_sizes if flags.changes else []
    return sorted({flags.ranks, *changed})


def for_these_faults(flags: argparse.Namespace, recipe: Recipe) -> list[str]:
    """Overrides with which a recipe's run has room for the faults, and its steps divide over
    every number of ranks.
    """
    faults = max(flags.kills + flags.flips, flags.changes, flags.full_disks)
    batch_tokens = math.lcm(*numbers_of_ranks(flags)) * recipe.model.seq_len
    return [
        f"--batch.global_batch_tokens={batch_tokens}",
        "--batch.micro_batch_size=1",
        f"--train_tokens={(STEPS_BESIDE + EVERY_STEPS * faults) * batch_tokens}",
        f"--checkpoints.every_steps={EVERY_STEPS}",
        f"--validation.every_steps={EVERY_STEPS}",
        f"--validation.eval_tokens={recipe.model.seq_len}",
    ]


def check_room(flags: argparse.Namespace, recipe: Recipe) -> None:
    """Raise UserError for a run that is too short for the faults, or that some number of ranks
    could not take.
    """
    every = recipe.checkpoints.every_steps
    faults = flags.kills + flags.flips
    needed = every * (3 + faults)
    if recipe.total_steps < needed:
        tokens = needed * recipe.batch.global_batch_tokens
        raise UserError(
            f"{faults} kills and flips, with a save every {every} steps, need {needed} steps, not "
            f"{recipe.total_steps}: give --train_tokens={tokens}, or fewer of them"
        )
    for ranks in numbers_of_ranks(flags):
        if recipe.global_batch_size % (ranks * recipe.batch.micro_batch_size):
            raise UserError(
                f"a step of {recipe.global_batch_size} windows does not divide over {ranks} ranks "
                f"x micro-batch {recipe.batch.micro_batch_size}: give other --ranks, --world-sizes "
                "or --batch.micro_batch_size"
            )


def bytes_of_disk(recipe: Recipe) -> int:
    """A small disk: for the checkpoints that are kept, the one that is written, and little more."""
    checkpoint = BYTES_A_PARAMETER * sum(count_parameters(recipe.model).values())
    return max(DISK_BYTES, CHECKPOINTS_ON_DISK * checkpoint)


def enough_data(home: Path, smallest: Path, recipe: Recipe) -> Path:
    """The smallest data set, or one of two batches of the recipe."""
    times = math.ceil(2 * recipe.batch.global_batch_tokens / TOKENS_OF_DATA)
    return counting_dataset(home / "larger dataset", times=times) if times > 1 else smallest

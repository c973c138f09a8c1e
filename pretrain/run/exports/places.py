"""Where a run's own exports lie, which are there, and which may go.

    exports/step-00000200            the export of the checkpoint after 200 steps
    exports/.step-00000200.k2j8x0q_  one being written, or left by a kill

An export has its name once it is whole.
"""

import os
import re
from pathlib import Path

from pretrain.checkpoint.layout import saved_steps, step_name, step_of, steps_in
from pretrain.checkpoint.retention import discard, sweep, warn
from pretrain.config.recipe import CheckpointsRecipe
from pretrain.hf.marker import MARKER_NAME, read_marker, strangers_in

EXPORTS_NAME = "exports"
# What an export took the place of, where a kill came between the two renames.
SET_BACK = re.compile(r"\.(step-\d{8,})\.old\.[0-9a-f]{8}")


def exports_dir(run_dir: Path) -> Path:
    """Where a run keeps the exports that it makes by itself."""
    return run_dir / EXPORTS_NAME


def export_place(run_dir: Path, step: int) -> Path:
    """Where the export of a step lies."""
    return exports_dir(run_dir) / step_name(step)


def is_due(step: int, recipe: CheckpointsRecipe, total_steps: int) -> bool:
    """Whether the checkpoint after so many steps is to be exported: at each interval, and at the
    run's end.
    """
    interval = recipe.export_every_steps
    if interval is None or step == 0:
        return False
    return step % interval == 0 or step == total_steps


def steps_without_export(
    run_dir: Path, recipe: CheckpointsRecipe, steps_done: int, total_steps: int
) -> list[int]:
    """Steps whose checkpoint is there, up to `steps_done`, and whose export is due and missing.

    In order; of those that are too old to be kept as exports, none.
    """
    steps = [step_of(path.name) or 0 for path in saved_steps(run_dir)]
    due = [
        step for step in sorted(steps) if step <= steps_done and is_due(step, recipe, total_steps)
    ]
    newest = due[-recipe.export_keep_last :]
    return [
        step
        for step in due
        if not export_place(run_dir, step).is_dir()
        and (step in newest or stays_for_good(step, recipe))
    ]


def stays_for_good(step: int, recipe: CheckpointsRecipe) -> bool:
    """Whether a step is one of those that are kept whatever follows."""
    return recipe.keep_every is not None and step % recipe.keep_every == 0


def clear_leftovers(run_dir: Path) -> None:
    """Remove what killed exports left, and put back what one was about to replace."""
    home = exports_dir(run_dir)
    if not home.is_dir():
        return
    for name in os.listdir(home):
        set_back = SET_BACK.fullmatch(name)
        if set_back and not (home / set_back[1]).exists():
            os.rename(home / name, home / set_back[1])
        elif set_back:
            discard(home / name)
    sweep(home)


def prune_exports(newest: Path, recipe: CheckpointsRecipe) -> None:
    """Remove all but the newest exports, counted from the one just made, and those that stay for
    good. What can't be removed, or holds what no export made, is said and stays.
    """
    try:
        steps = [step_of(path.name) or 0 for path in steps_in(newest.parent)]
    except OSError as error:
        warn(f"{newest.parent}: can't be listed ({error.strerror}), so nothing is removed")
        return
    so_far = [step for step in steps if step <= (step_of(newest.name) or 0)]
    for step in so_far[recipe.export_keep_last :]:
        if not stays_for_good(step, recipe):
            prune_export(newest.with_name(step_name(step)))


def prune_export(path: Path) -> None:
    """Remove an export that is due, unless somebody keeps other files in it."""
    try:
        marker = None if path.is_symlink() else read_marker(path)
        strangers = strangers_in(path, marker) if marker else []
        if marker is None:
            warn(f"{path}: kept, since it is no export with its {MARKER_NAME}; move it away")
        elif strangers:
            warn(
                f"{path}: kept, since it holds {strangers[0]}, which is no part of the export; "
                "move that away"
            )
        else:
            discard(path)
    except OSError as error:
        warn(f"{path}: not removed ({error.strerror}); the next export tries again")

"""Branch a run off another's checkpoint, with another length or decay: from the stable part of a
wsd schedule, say; or onto another data set of the same tokenizer.

Everything that the steps so far depended on must be the same, their learning rates too; so the
branch is what a run of the other length would have been from its start. Imported weights were
trained by no step, and only the model must be theirs.
"""

import shutil
from pathlib import Path

from data_prep.errors import UserError, refusal
from data_prep.files import replace_directory, write_durably
from pretrain.checkpoint.find import is_checkpoint
from pretrain.checkpoint.layout import (
    MANIFEST_NAME,
    POINTER_NAME,
    SIDECAR_NAME,
    checkpoints_dir,
    saved_steps,
)
from pretrain.checkpoint.manifest import pointer_to
from pretrain.checkpoint.reader import UNREADABLE, Checkpoint
from pretrain.config.load import build_recipe
from pretrain.config.recipe import Recipe
from pretrain.config.schedule import rate_of
from pretrain.metrics.metrics_file import METRICS_NAME
from pretrain.run.continuing import refuse_another_run
from pretrain.run.directory import Identity, is_run
from pretrain.run.starts import copy_starts
from pretrain.run.state import read_state, write_state


def open_origin(path: Path, run_dir: Path, asked: Identity) -> Checkpoint | None:
    """The checkpoint to branch from; None where that was done, and the branch goes on from its own.

    Raises UserError if this run could not have made its steps, or is another run already.
    """
    origin = f"--branch-from {path}"
    if saved_steps(run_dir):
        before = read_state(run_dir).branched_from
        if before != str(path.resolve()):
            made = f"branched from {before}" if before else "of a run of its own"
            advice = "leave the flag out to continue that run, or give another --run-dir"
            raise UserError(f"{origin}: {run_dir} has checkpoints already, {made}; {advice}")
        return None
    if not is_checkpoint(path) and is_run(path):
        advice = "it has no checkpoint yet"
        named = saved_steps(path)
        if named:
            advice = f"name one of its checkpoints, such as {named[0]}"
        raise UserError(f"{origin}: a run, not a checkpoint; {advice}")
    try:
        checkpoint = Checkpoint(path)
    except UNREADABLE as error:
        there = ", ".join(step.name for step in saved_steps(path.parent.parent)) or "none"
        problem = f"{origin}: no checkpoint ({type(error).__name__}: {error}); beside it: {there}"
        raise refusal(error, problem) from None
    refuse_another_run(run_dir, checkpoint, asked, origin)
    if checkpoint.manifest.imported_from is not None:
        return checkpoint
    saved_recipe = build_recipe(checkpoint.manifest.recipe, origin)
    check_rates(saved_recipe, asked.recipe, checkpoint.step, origin)
    return checkpoint


def check_rates(old: Recipe, new: Recipe, steps: int, origin: str) -> None:
    """The steps taken must have had the learning rates that the new schedule gives them."""
    if new.total_steps <= steps:
        raise UserError(
            f"{origin}: {steps:,} steps are taken, train_tokens asks for {new.total_steps:,}; ask "
            "for more"
        )
    # Step by step: two schedules may agree at a step and differ before it.
    for step in range(steps):
        was = rate_of(old, step)
        now = rate_of(new, step)
        if was != now:
            problem = f"step {step} had learning rate {was:.6g}, this recipe gives it {now:.6g}"
            warmup = f"schedule.warmup_steps={old.schedule.warmup(old.total_steps)}"
            raise UserError(
                f"{origin}: {problem}; branch before the decay begins, and give the warm-up as "
                f"{warmup}"
            )


def copy_files(origin: Checkpoint, destination: Path) -> None:
    """The checkpoint's own files, and nothing else that lies beside them."""
    for name in (MANIFEST_NAME, SIDECAR_NAME, *(file.name for file in origin.manifest.files)):
        shutil.copyfile(origin.path / name, destination / name)


def copy_branch(origin: Checkpoint, run_dir: Path) -> None:
    """Make the checkpoint, and the metrics before it, the new run's own. Its digests are checked
    when it is loaded.
    """
    metrics = origin.path.parent.parent / METRICS_NAME
    if metrics.is_file():
        # Cut back to the checkpoint when training starts.
        shutil.copyfile(metrics, run_dir / METRICS_NAME)
    trunk = origin.path.parent.parent
    copy_starts(trunk, run_dir, origin.step)
    write_state(
        run_dir,
        branched_from=str(origin.path.resolve()),
        imported_from=origin.manifest.imported_from or read_state(trunk).imported_from,
        saved_step=origin.step,
    )
    copy = checkpoints_dir(run_dir) / origin.path.name
    replace_directory(copy, lambda staged: copy_files(origin, staged))
    write_durably(copy.with_name(POINTER_NAME), pointer_to(copy))

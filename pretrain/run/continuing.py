"""Whether a run may go on from a checkpoint: as the same run, or as a branch of it."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_prep.errors import UserError
from pretrain.checkpoint.layout import saved_steps
from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.checkpoint.reader import UNREADABLE, Checkpoint
from pretrain.config.changes import (
    ENGINE_MAY_CHANGE_ON_RESUME,
    MAY_CHANGE_ON_BRANCH,
    MAY_CHANGE_ON_RESUME,
    refuse_changes,
)
from pretrain.config.load import build_recipe, recipe_to_dict
from pretrain.config.recipe import ModelRecipe
from pretrain.data.stages import DataStage, are_the_same, seen_by, steps_of_stage
from pretrain.modeling_tablefree import bits_needed
from pretrain.run.directory import Identity
from pretrain.run.state import read_state


def refuse_another_run(
    run_dir: Path, checkpoint: Checkpoint, asked: Identity, flag: str = ""
) -> None:
    """Raise UserError where a checkpoint was made with another recipe, engine or data set, naming
    both values.

    Length and schedule may be others if the run was branched off there, or is to be: then `flag`
    says so, and the data set may be another one too.
    """
    manifest = checkpoint.manifest
    origin = flag or str(checkpoint.path)
    if manifest.imported_from is not None:
        refuse_another_model(checkpoint, asked.recipe.model)
        return
    branched_from = read_state(run_dir).branched_from or ""
    may_change = MAY_CHANGE_ON_RESUME
    if flag or Path(branched_from).name == checkpoint.path.name:
        may_change = MAY_CHANGE_ON_BRANCH
    # Built anew, so that keys that the checkpoint's version did not know are as by default.
    saved_recipe = recipe_to_dict(build_recipe(manifest.recipe, origin))
    if not flag:
        refuse_other_data(stages_so_far(run_dir, manifest), asked.fingerprint, origin)
    refuse_changes(saved_recipe, recipe_to_dict(asked.recipe), may_change, origin)
    origin += " (chosen with --deepspeed-config)"
    refuse_changes(manifest.deepspeed, asked.engine_config, ENGINE_MAY_CHANGE_ON_RESUME, origin)


def stages_so_far(run_dir: Path, manifest: CheckpointManifest) -> tuple[DataStage, ...]:
    """The data sets of a run that has this checkpoint, oldest first.

    A branch onto other data begins with the checkpoint of its trunk, which knows nothing of them:
    the run's state does. Where that tells of other steps than the checkpoint, the latter counts.
    """
    saved = manifest.data_stages
    told = read_state(run_dir).data_stages
    if told and are_the_same(seen_by(told, manifest.step), seen_by(saved, manifest.step)):
        return told
    return saved


def refuse_other_data(stages: Sequence[DataStage], fingerprint: str, origin: str) -> None:
    """Raise UserError where a run with these stages of data is to go on with another data set."""
    wanted = stages[-1]
    if len(stages) == 1:
        saved = {"fingerprint": wanted.fingerprint}
        refuse_changes(saved, {"fingerprint": fingerprint}, frozenset(), origin)
    elif wanted.fingerprint != fingerprint:
        got = fingerprint
        for stage in stages[:-1]:
            if stage.fingerprint == fingerprint:
                got = f"{fingerprint}, its data set {steps_of_stage(stages, stage)}"
        raise UserError(
            f"{origin}: {steps_of_stage(stages, wanted)} this run has the data set "
            f"{wanted.fingerprint}, got {got}; give --data-dir {wanted.data_dir}, or where that "
            "data set is now"
        )


def stages_with(
    run_dir: Path, branch_from: Checkpoint | None, now: DataStage, rows: int
) -> tuple[DataStage, ...]:
    """The stages of data of a run that begins, branches off or goes on with the data set `now`,
    which `check_same_run` and `open_origin` allow. A step has `rows` samples.
    """
    before: tuple[DataStage, ...] = ()
    if branch_from is not None:
        # a stage that the checkpoint has no step of is none of the branch's
        before = seen_by(branch_from.manifest.data_stages, branch_from.step)
    else:
        before = stages_on_record(run_dir)
        # of a run none of whose checkpoints can be read, which is said later
        if before and before[-1].fingerprint != now.fingerprint:
            before = ()
    if not before:
        return (now,)
    if before[-1].fingerprint == now.fingerprint:
        return (*before[:-1], replace(before[-1], data_dir=now.data_dir, sources=now.sources))
    assert branch_from is not None  # all else was refused
    step = branch_from.step
    return (*before, replace(now, first_step=step, samples_before=step * rows))


def stages_on_record(run_dir: Path) -> tuple[DataStage, ...]:
    """The data sets that a run has steps of, by its newest checkpoint and its state; none of one
    that has saved nothing, or has imported weights alone.
    """
    newest = newest_readable(run_dir)
    if newest is None:
        return read_state(run_dir).data_stages if saved_steps(run_dir) else ()
    if newest.manifest.imported_from is not None:
        return ()
    return stages_so_far(run_dir, newest.manifest)


def newest_readable(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint of a run whose manifest can be read; which are passed over is said
    later.
    """
    for path in saved_steps(run_dir):
        with contextlib.suppress(*UNREADABLE):
            return Checkpoint(path)
    return None


def refuse_another_model(checkpoint: Checkpoint, asked: ModelRecipe) -> None:
    """Raise UserError where imported weights are of another model than was asked for.

    All else is free: they were trained by no step of this project.
    """
    saved = checkpoint.manifest.model_config
    now: dict[str, object] = {
        "vocab_size": asked.vocab_size,
        "d_model": asked.d_model,
        "num_layers": asked.num_layers,
        "num_heads": asked.num_heads,
        "seq_len": asked.seq_len,
        "input_embedding": asked.input_embedding,
    }
    if asked.input_embedding != "learned":
        now["code_bits"] = asked.code_bits or bits_needed(asked.vocab_size)
    for key, value in now.items():
        if saved[key] != value:
            raise UserError(
                f"{checkpoint.path}: the imported weights have model.{key}={saved[key]!r}, got "
                f"{value!r}; give the former"
            )


def check_same_run(run_dir: Path, asked: Identity) -> None:
    """Refuse to continue a run as another one, as its newest checkpoint that can be read has it.

    A run that has saved nothing yet has nothing to continue: it may start over with other values.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir}: is a file; give a directory")
    newest = newest_readable(run_dir)
    if newest is not None:
        refuse_another_run(run_dir, newest, asked)

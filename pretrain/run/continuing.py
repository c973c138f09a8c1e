"""Whether a run may go on from a checkpoint: as the same run, or as a branch of it."""

import contextlib
from pathlib import Path

from data_prep.errors import UserError
from pretrain.checkpoint.layout import saved_steps
from pretrain.checkpoint.reader import UNREADABLE, Checkpoint
from pretrain.config.changes import (
    ENGINE_MAY_CHANGE_ON_RESUME,
    MAY_CHANGE_ON_BRANCH,
    MAY_CHANGE_ON_RESUME,
    refuse_changes,
)
from pretrain.config.load import build_recipe, recipe_to_dict
from pretrain.config.recipe import ModelRecipe
from pretrain.modeling_tablefree import bits_needed
from pretrain.run.directory import Identity
from pretrain.run.state import read_state


def refuse_another_run(
    run_dir: Path, checkpoint: Checkpoint, asked: Identity, flag: str = ""
) -> None:
    """Raise UserError where a checkpoint was made with another recipe, engine or data set, naming
    both values.

    Length and schedule may be others if the run was branched off there, or is to be: then `flag`
    says so.
    """
    manifest = checkpoint.manifest
    origin = flag or str(checkpoint.path)
    if manifest.imported_from is not None:
        refuse_another_model(checkpoint, asked.recipe.model, flag)
        return
    branched_from = read_state(run_dir).branched_from or ""
    may_change = MAY_CHANGE_ON_RESUME
    if flag or Path(branched_from).name == checkpoint.path.name:
        may_change = MAY_CHANGE_ON_BRANCH
    # Built anew, so that keys that the checkpoint's version did not know are as by default.
    saved_recipe = recipe_to_dict(build_recipe(manifest.recipe, origin))
    now = {"fingerprint": asked.fingerprint}
    refuse_changes({"fingerprint": manifest.fingerprint}, now, frozenset(), origin)
    refuse_changes(saved_recipe, recipe_to_dict(asked.recipe), may_change, origin)
    origin += " (chosen with --deepspeed-config)"
    refuse_changes(manifest.deepspeed, asked.engine_config, ENGINE_MAY_CHANGE_ON_RESUME, origin)


def refuse_another_model(checkpoint: Checkpoint, asked: ModelRecipe, flag: str) -> None:
    """Raise UserError where imported weights are of another model than was asked for.

    All else is free: they were trained by no step of this run, and `--branch-from` has nothing to
    go back to.
    """
    if flag:
        raise UserError(f"{flag}: imported weights, of no step; import them into that --run-dir")
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
    for path in saved_steps(run_dir):
        with contextlib.suppress(*UNREADABLE):  # which is said when it is passed over
            refuse_another_run(run_dir, Checkpoint(path), asked)
            return

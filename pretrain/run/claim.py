"""Whether a run may live in a directory: in a new or an empty one, beside files that no run writes,
or as before.

A run writes under names that others use too (`recipe.yaml`, `metrics.jsonl`, `tokenizer/`). Where
one of them is there without a run of ours around it, it is somebody else's, and a start would
replace it. No torch: this is looked at before anything is imported, started or written.
"""

import json
import os
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, parse_yaml
from data_prep.locks import LOCK_NAME
from data_prep.shards import TOKENIZER_NAME
from pretrain.checkpoint.patience import read_patiently
from pretrain.checkpoint.retention import OWN_FILE, SIDECAR_NAME, steps_in
from pretrain.config.recipe import build_recipe, recipe_to_yaml

RECIPE_NAME = "recipe.yaml"
ENGINE_CONFIG_NAME = "deepspeed.json"
METRICS_NAME = "metrics.jsonl"
SKIPS_NAME = "skips.jsonl"
STATE_NAME = "state.json"
STARTS_NAME = "starts.jsonl"
CHECKPOINTS_NAME = "checkpoints"
WRITTEN = (
    RECIPE_NAME,
    ENGINE_CONFIG_NAME,
    STATE_NAME,
    METRICS_NAME,
    STARTS_NAME,
    SKIPS_NAME,
    TOKENIZER_NAME,
)
POINTER = f"{CHECKPOINTS_NAME}/latest"
STATUSES = ("running", "preempted", "done", "failed")


def refuse_what_is_no_run(run_dir: Path, data_dir: Path) -> None:
    """Raise UserError where training would replace files that are no run's of ours, or write
    through a link.

    The directory itself and its `checkpoints` may be links, to a larger disk.
    """
    refuse_links(run_dir)
    if is_run(run_dir):
        return
    home, data = run_dir.resolve(), data_dir.resolve()
    if home.is_relative_to(data):
        place = (
            "is the data set's directory"
            if home == data
            else f"is inside of the data set {data_dir}"
        )
        raise UserError(
            f"--run-dir {run_dir}: {place}, which holds nothing else; give another directory"
        )
    for name in (*WRITTEN, POINTER):
        if os.path.lexists(run_dir / name):
            problem = (
                f"there is no run of pretrain.train here, so {name} is somebody else's and would "
                "be replaced"
            )
            raise UserError(
                f"--run-dir {run_dir}: {problem}; move it away, or give another directory"
            )


def refuse_links(run_dir: Path) -> None:
    """Raise UserError for a link in the place of what a run writes."""
    tokenizer = run_dir / TOKENIZER_NAME
    inside = (
        sorted(tokenizer.iterdir()) if tokenizer.is_dir() and not tokenizer.is_symlink() else []
    )
    for path in (*(run_dir / name for name in WRITTEN), *inside):
        if path.is_symlink():
            problem = "is a symbolic link, and a run writes there"
            raise UserError(
                f"{path}: {problem}; put the file itself there, or give another --run-dir"
            )


def is_run(run_dir: Path) -> bool:
    """Whether a run of ours is there, with a state, a checkpoint, or no more than its first file.

    A damaged `state.json` is no other's: reading it says later what to do.
    """
    state = run_dir / STATE_NAME
    if state.is_file():
        try:
            content: Any = json.loads(read_patiently(state))
        except (ValueError, RecursionError):
            return True
        if isinstance(content, dict) and content.get("status") in STATUSES:
            return True
    return any(
        holds_checkpoint(path) for path in steps_in(run_dir / CHECKPOINTS_NAME)
    ) or was_begun(run_dir)


def holds_checkpoint(path: Path) -> bool:
    """Whether a directory called as a checkpoint holds a file of one; a damaged one lacks some."""
    names = os.listdir(path) if path.is_dir() else []
    return any(name == SIDECAR_NAME or OWN_FILE.fullmatch(name) for name in names)


def was_begun(run_dir: Path) -> bool:
    """Whether a start was killed after it had written its recipe, before its state: under the lock,
    as runs write it.

    Such a file is replaced by the like, so that nothing is lost where it was made by hand.
    """
    recipe, lock = run_dir / RECIPE_NAME, run_dir / LOCK_NAME
    if not (recipe.is_file() and lock.is_file()) or lock.stat().st_size:
        return False
    content = read_patiently(recipe)
    try:
        return (
            recipe_to_yaml(build_recipe(parse_yaml(content, str(recipe)), str(recipe))).encode()
            == content
        )
    except UserError:
        return False

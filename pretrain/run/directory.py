"""A run's directory: what lies there, whether a run may live there, and what was asked of it.

    recipe.yaml      the resolved recipe
    deepspeed.json   the merged engine dictionary
    tokenizer/       a copy of the data set's
    metrics.jsonl    exactly one line for every step: pretrain/metrics/metrics_file.py
    state.json       how the run stands: pretrain/run/state.py
    starts.jsonl     what each start ran on: pretrain/run/starts.py
    skips.jsonl      bad steps and what was decided: pretrain/run/bad_steps.py
    checkpoints/     pretrain/checkpoint/layout.py
    exports/         of checkpoints.export_every_steps: pretrain/run/exports/places.py
    checked_data/    which files of data were found good: pretrain/data/data_check.py
    logs/            stacks of ranks that stalled: pretrain/watch/watch.py
    evaluation.json  and evaluations/, by pretrain.evaluate: pretrain/evaluation/result.py
    profile/         of --profile: pretrain/engine/profiler.py
    hostfile, .lock  of launch/pretrain.sh, and of whoever trains there: data_prep/locks.py
    slurm.json       of a job of Slurm: launch/requeue.py

A run writes under names that others use too (`recipe.yaml`, `metrics.jsonl`, `tokenizer/`). Where
one of them is there without a run of ours around it, it is somebody else's, and a start would
replace it. No torch: this is looked at before anything is imported, started or written.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, parse_yaml
from data_prep.files import write_durably
from data_prep.locks import LOCK_NAME
from data_prep.shards import TOKENIZER_NAME, ShardReader, read_tokenizer, tokenizer_sha256
from pretrain.checkpoint.layout import (
    CHECKPOINTS_NAME,
    MANIFEST_NAME,
    OWN_FILE,
    POINTER_NAME,
    SIDECAR_NAME,
    saved_steps,
    steps_in,
)
from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.checkpoint.patience import read_patiently
from pretrain.config.load import build_recipe, recipe_to_yaml
from pretrain.config.recipe import Recipe
from pretrain.data.tokenizer_definition import DEFINITION_NAME, give_the_same_ids
from pretrain.metrics.metrics_file import METRICS_NAME
from pretrain.run.state import NOT_OURS, STATE_NAME, may_be_a_run_s, read_state

RECIPE_NAME = "recipe.yaml"
ENGINE_CONFIG_NAME = "deepspeed.json"
SKIPS_NAME = "skips.jsonl"
STARTS_NAME = "starts.jsonl"
WRITTEN = (
    RECIPE_NAME,
    ENGINE_CONFIG_NAME,
    STATE_NAME,
    METRICS_NAME,
    STARTS_NAME,
    SKIPS_NAME,
    TOKENIZER_NAME,
)
POINTER = f"{CHECKPOINTS_NAME}/{POINTER_NAME}"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a run is: all that must stay what it was for it to go on bit for bit."""

    recipe: Recipe
    engine_config: dict[str, Any]  # DeepSpeed's, merged with the recipe
    fingerprint: str  # of the data set


def describe_run(run_dir: Path, asked: Identity, data_dir: Path) -> None:
    """Write what was asked for, and keep the tokenizer, so that an export needs the run alone.

    A run that starts over as another one has no use for decisions on the bad steps of the one
    before.
    """
    recipe_path = run_dir / RECIPE_NAME
    recipe = recipe_to_yaml(asked.recipe).encode()
    if recipe_path.exists() and not saved_steps(run_dir):
        is_same_recipe = recipe_path.read_bytes() == recipe
        if not is_same_recipe or read_state(run_dir).fingerprint != asked.fingerprint:
            (run_dir / SKIPS_NAME).unlink(missing_ok=True)
    write_durably(recipe_path, recipe)
    engine_config = json.dumps(asked.engine_config, indent=1).encode()
    write_durably(run_dir / ENGINE_CONFIG_NAME, engine_config)
    for name, content in read_tokenizer(data_dir / TOKENIZER_NAME).items():
        write_durably(run_dir / TOKENIZER_NAME / name, content)


def refuse_another_tokenizer(run_dir: Path, branch_from: Path | None, reader: ShardReader) -> None:
    """Raise UserError where a run is to go on with other ids than those of its weights: a branch
    onto other data, or a run of imported weights.

    Later checkpoints are of a data set, by whose fingerprint they know it.
    """
    saved = saved_steps(run_dir)
    if saved:
        branch_from = None  # that was done, and the run goes on from its own
    checkpoint = branch_from or next(iter(saved), None)
    if checkpoint is None:
        return
    try:
        manifest = CheckpointManifest.from_json(read_patiently(checkpoint / MANIFEST_NAME))
    except (OSError, KeyError, AttributeError, *NOT_OURS):
        return  # said when it is passed over or can't be branched from
    tokenizer = checkpoint.parent.parent / TOKENIZER_NAME
    if manifest.imported_from is not None:
        refuse_other_ids(manifest.imported_from, tokenizer, reader)
    elif branch_from is not None and reader.manifest.fingerprint != manifest.fingerprint:
        refuse_other_tokenizer_files(branch_from, manifest, tokenizer, reader)


def refuse_other_ids(imported_from: str, tokenizer: Path, reader: ShardReader) -> None:
    """Raise UserError where a data set has other ids than imported weights, by their tokenizer.

    It is compared what decides ids, as an export's other files are made anew.
    """
    own = tokenizer / DEFINITION_NAME
    if not own.is_file():
        raise UserError(f"{own}: missing, so the ids of its weights can't be told; import again")
    theirs = (reader.data_dir / TOKENIZER_NAME / DEFINITION_NAME).read_bytes()
    if not give_the_same_ids(own.read_bytes(), theirs):
        raise UserError(
            f"{reader.data_dir}: its tokenizer is not that of {imported_from}, whose weights "
            f"the run begins with; build the data set with --tokenizer {tokenizer}"
        )


def refuse_other_tokenizer_files(
    branch_from: Path, manifest: CheckpointManifest, tokenizer: Path, reader: ShardReader
) -> None:
    """Raise UserError where a branch is to go on with another tokenizer than its trunk, or ends
    documents by another id.

    The checkpoint tells the tokenizer's digest or, in early ones, the run's copy of it.
    """
    own = manifest.data.tokenizer_sha256
    if own is None and tokenizer.is_dir():
        own = tokenizer_sha256(tokenizer)
    if own is None:
        raise UserError(
            f"--branch-from {branch_from}: whether {reader.data_dir} has its tokenizer can't be "
            f"told, since {tokenizer} is missing; restore it"
        )
    theirs = reader.manifest.tokenizer_sha256
    advice = f"build the data set with --tokenizer {tokenizer}"
    if theirs != own:
        raise UserError(
            f"{reader.data_dir}: its tokenizer (sha256 {theirs[:12]}) is not that of --branch-from "
            f"{branch_from} (sha256 {own[:12]}); {advice}"
        )
    if reader.manifest.eos_id != manifest.data.eos_id:
        raise UserError(
            f"{reader.data_dir}: id {reader.manifest.eos_id} ends its documents, of --branch-from "
            f"{branch_from} {manifest.data.eos_id} does; {advice}"
        )


def refuse_what_is_no_run(run_dir: Path, data_dir: Path) -> None:
    """Raise UserError where training would replace files that are no run's of ours, or write
    through a link.

    The directory itself and its `checkpoints` may be links, to a larger disk.
    """
    refuse_links(run_dir)
    if is_run(run_dir):
        return
    home = run_dir.resolve()
    data = data_dir.resolve()
    if home.is_relative_to(data):
        place = "is the data set's directory"
        if home != data:
            place = f"is inside of the data set {data_dir}"
        raise UserError(
            f"--run-dir {run_dir}: {place}, which holds nothing else; give another directory"
        )
    for name in (*WRITTEN, POINTER):
        if os.path.lexists(run_dir / name):
            raise UserError(
                f"--run-dir {run_dir}: there is no run of pretrain.train here, so {name} is "
                "somebody else's and would be replaced; move it away, or give another directory"
            )


def refuse_links(run_dir: Path) -> None:
    """Raise UserError for a link in the place of what a run writes."""
    written = [run_dir / name for name in WRITTEN]
    tokenizer = run_dir / TOKENIZER_NAME
    if tokenizer.is_dir() and not tokenizer.is_symlink():
        written += sorted(tokenizer.iterdir())
    for path in written:
        if path.is_symlink():
            raise UserError(
                f"{path}: is a symbolic link, and a run writes there; put the file itself there, "
                "or give another --run-dir"
            )


def is_run(run_dir: Path) -> bool:
    """Whether a run of ours is there, with a state, a checkpoint, or no more than its first file.

    A damaged `state.json` is no other's: reading it says later what to do.
    """
    state = run_dir / STATE_NAME
    if state.is_file() and may_be_a_run_s(state):
        return True
    checkpoints = steps_in(run_dir / CHECKPOINTS_NAME)
    return any(holds_checkpoint(path) for path in checkpoints) or was_begun(run_dir)


def holds_checkpoint(path: Path) -> bool:
    """Whether a directory called as a checkpoint holds a file of one; a damaged one lacks some."""
    names = os.listdir(path) if path.is_dir() else []
    return any(name == SIDECAR_NAME or OWN_FILE.fullmatch(name) for name in names)


def was_begun(run_dir: Path) -> bool:
    """Whether a start was killed after it had written its recipe, before its state: under the lock,
    as runs write it.

    Such a file is replaced by the like, so that nothing is lost where it was made by hand.
    """
    recipe_path = run_dir / RECIPE_NAME
    lock = run_dir / LOCK_NAME
    if not (recipe_path.is_file() and lock.is_file()) or lock.stat().st_size:
        return False
    content = read_patiently(recipe_path)
    where = str(recipe_path)
    try:
        recipe = build_recipe(parse_yaml(content, where), where)
        return recipe_to_yaml(recipe).encode() == content
    except UserError:
        return False

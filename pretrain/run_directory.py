"""A run's directory: what was asked for, what happened at every step, and how the run stands.

recipe.yaml      the resolved recipe            metrics.jsonl   exactly one line for every step
deepspeed.json   the merged engine dictionary   state.json      running | preempted | done | failed: why
checkpoints/     see pretrain/checkpoint.py     skips.jsonl     see pretrain/bad_steps.py
tokenizer/       a copy of the data set's       logs/           see pretrain/watch.py
"""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from data_prep.errors import UserError, explained
from data_prep.shards import TOKENIZER_NAME, write_durably
from pretrain import config
from pretrain.checkpoint import saved_steps
from pretrain.config import Recipe, build_recipe, recipe_to_dict, recipe_to_yaml, refuse_changes

RECIPE_NAME = "recipe.yaml"
ENGINE_CONFIG_NAME = "deepspeed.json"
METRICS_NAME = "metrics.jsonl"
SKIPS_NAME = "skips.jsonl"
STATE_NAME = "state.json"
STATE_LOCK = threading.Lock()  # of this process: the thread that writes checkpoints updates it too


def read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """A YAML or JSON file of this directory. Raises UserError if something else wrote it."""
    with explained((ValueError, yaml.YAMLError), f"{path}: damaged", "remove it to continue from the checkpoints"):
        content = parse(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no keys and values")
    return content


def read_state(run_dir: Path) -> dict[str, Any]:
    """How the run stands; empty if it never started."""
    path = run_dir / STATE_NAME
    return read_mapping(path, json.loads) if path.is_file() else {}


def write_state(run_dir: Path, **changes: Any) -> None:
    """Update `state.json`."""
    with STATE_LOCK:
        write_durably(run_dir / STATE_NAME, json.dumps({**read_state(run_dir), **changes}, indent=1).encode())


def note_failure(run_dir: Path, reason: str) -> None:
    """Why a run failed, in `state.json`, where no other end was noted before."""
    if read_state(run_dir).get("status") == "running":
        write_state(run_dir, status="failed", reason=reason)


def check_same_run(
    run_dir: Path, recipe: Recipe, engine_config: dict[str, Any], fingerprint: str, engine_may_change: frozenset[str]
) -> None:
    """Refuse to continue a run with another recipe, engine or data set.

    A run that has saved nothing yet has nothing to continue: it may start over with other values.
    """
    has_saved = bool(saved_steps(run_dir)) or "saved_step" in read_state(run_dir)
    recipe_path, engine_path = run_dir / RECIPE_NAME, run_dir / ENGINE_CONFIG_NAME
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir}: is a file; give a directory")
    if recipe_path.is_file():
        saved_recipe = read_mapping(recipe_path, yaml.safe_load)
        if has_saved:
            saved_recipe = recipe_to_dict(build_recipe(saved_recipe, str(recipe_path)))  # keys it lacks are as default
            refuse_changes(saved_recipe, recipe_to_dict(recipe), config.MAY_CHANGE_ON_RESUME, str(recipe_path))
    saved_fingerprint = read_state(run_dir).get("fingerprint", fingerprint)
    if has_saved:
        refuse_changes({"fingerprint": saved_fingerprint}, {"fingerprint": fingerprint}, frozenset(), str(run_dir))
    if engine_path.is_file():
        saved_engine = read_mapping(engine_path, json.loads)
        if has_saved:
            origin = f"{engine_path} (chosen with --deepspeed-config)"
            refuse_changes(saved_engine, engine_config, engine_may_change, origin)


def describe_run(
    run_dir: Path, recipe: Recipe, engine_config: dict[str, Any], data_dir: Path, fingerprint: str
) -> None:
    """Write what was asked for, and keep the tokenizer, so that an export needs the run alone.

    A run that starts over as another one has no use for decisions on the bad steps of the one before.
    """
    before, now = run_dir / RECIPE_NAME, (recipe_to_yaml(recipe).encode(), fingerprint)
    is_other = before.exists() and (before.read_bytes(), read_state(run_dir).get("fingerprint")) != now
    if is_other and not saved_steps(run_dir):
        (run_dir / SKIPS_NAME).unlink(missing_ok=True)
    write_durably(before, now[0])
    write_durably(run_dir / ENGINE_CONFIG_NAME, json.dumps(engine_config, indent=1).encode())
    for file in sorted((data_dir / TOKENIZER_NAME).glob("*")):
        write_durably(run_dir / TOKENIZER_NAME / file.name, file.read_bytes())


class MetricsFile:
    """`metrics.jsonl`: one line a step, cut back to the step at which a run continues."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self.path = run_dir / METRICS_NAME
        kept = [line for line in read_lines(self.path) if line["step"] < start_step]
        write_durably(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, line: dict[str, Any]) -> None:
        """Add one step's line."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flush to disk and close."""
        os.fsync(self._file.fileno())
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a `.jsonl` file; a kill can tear the last one. Raises UserError for a damaged one."""
    if not path.is_file():
        return []
    with explained(ValueError, f"{path}: damaged", "mend or remove it, and the same command continues"):
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]

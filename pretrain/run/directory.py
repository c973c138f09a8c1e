"""A run's directory: what was asked for, what happened at every step, and how the run stands.

recipe.yaml      the resolved recipe            metrics.jsonl   exactly one line for every step
deepspeed.json   the merged engine dictionary   state.json      running | preempted | done | failed:
why checkpoints/     see pretrain/checkpoint/reader.py     skips.jsonl     see
pretrain/run/bad_steps.py tokenizer/       a copy of the data set's       starts.jsonl    see
pretrain/run/starts.py checked_data/    see pretrain/data/data_check.py     logs/           see
pretrain/run/watch.py
"""

import contextlib
import itertools
import json
import os
import secrets
import threading
from io import FileIO
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, explained, naming
from data_prep.files import fsync_directory, write_durably
from data_prep.shards import TOKENIZER_NAME, read_tokenizer
from pretrain.checkpoint.patience import patiently, read_patiently
from pretrain.checkpoint.reader import UNREADABLE, Checkpoint, saved_steps
from pretrain.checkpoint.saving import Callback
from pretrain.checkpoint.writer import AroundSaves
from pretrain.config import recipe as config
from pretrain.config.engine_config import ENGINE_MAY_CHANGE_ON_RESUME
from pretrain.config.recipe import (
    Recipe,
    build_recipe,
    recipe_to_dict,
    recipe_to_yaml,
    refuse_changes,
)
from pretrain.metrics.records import cut_to_step
from pretrain.run.claim import ENGINE_CONFIG_NAME, METRICS_NAME, RECIPE_NAME, SKIPS_NAME, STATE_NAME

NOT_OURS = (ValueError, TypeError, RecursionError)  # what reading JSON of another form raises
STATE_LOCK = threading.Lock()  # of this process: the thread that writes checkpoints updates it too


def read_state(run_dir: Path) -> dict[str, Any]:
    """How the run stands; empty if it never started. Raises UserError if something else wrote
    it.
    """
    path = run_dir / STATE_NAME
    if not path.is_file():
        return {}
    with explained(NOT_OURS, f"{path}: damaged", "remove it to continue from the checkpoints"):
        return dict(json.loads(read_patiently(path)))


def write_state(run_dir: Path, **changes: Any) -> None:
    """Update `state.json`."""
    with STATE_LOCK:
        content = json.dumps({**read_state(run_dir), **changes}, indent=1).encode()
        patiently(lambda: write_durably(run_dir / STATE_NAME, content))


def note_failure(run_dir: Path, reason: str) -> None:
    """Why a run failed, in `state.json`, where no other end was noted before. Several ranks may
    do so at once.
    """
    with STATE_LOCK:
        state = read_state(run_dir)
        if state.get("status") == "running":
            content = json.dumps({**state, "status": "failed", "reason": reason}, indent=1).encode()
            write_durably(run_dir / STATE_NAME, content, f".{secrets.token_hex(8)}.tmp")


def refuse_another_run(
    run_dir: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    engine_config: dict[str, Any],
    fingerprint: str,
    flag: str = "",
) -> None:
    """Raise UserError where a checkpoint was made with another recipe, engine or data set, naming
    both values.

    Length and schedule may be others if the run was branched off there, or is to be: then `flag`
    says so.
    """
    manifest, origin = checkpoint.manifest, flag or str(checkpoint.path)
    is_branch = (
        flag or Path(read_state(run_dir).get("branched_from", "")).name == checkpoint.path.name
    )
    may_change = config.MAY_CHANGE_ON_BRANCH if is_branch else config.MAY_CHANGE_ON_RESUME
    # keys it lacks are as default
    saved_recipe = recipe_to_dict(build_recipe(manifest["recipe"], origin))
    refuse_changes(
        {"fingerprint": manifest["fingerprint"]}, {"fingerprint": fingerprint}, frozenset(), origin
    )
    refuse_changes(saved_recipe, recipe_to_dict(recipe), may_change, origin)
    origin += " (chosen with --deepspeed-config)"
    refuse_changes(manifest["deepspeed"], engine_config, ENGINE_MAY_CHANGE_ON_RESUME, origin)


def check_same_run(
    run_dir: Path, recipe: Recipe, engine_config: dict[str, Any], fingerprint: str
) -> None:
    """Refuse to continue a run as another one, as its newest checkpoint that can be read has it.

    A run that has saved nothing yet has nothing to continue: it may start over with other values.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir}: is a file; give a directory")
    for path in saved_steps(run_dir):
        with contextlib.suppress(*UNREADABLE):  # which is said when it is passed over
            refuse_another_run(run_dir, Checkpoint(path), recipe, engine_config, fingerprint)
            return


def describe_run(
    run_dir: Path, recipe: Recipe, engine_config: dict[str, Any], data_dir: Path, fingerprint: str
) -> None:
    """Write what was asked for, and keep the tokenizer, so that an export needs the run alone.

    A run that starts over as another one has no use for decisions on the bad steps of the one
    before.
    """
    before, now = run_dir / RECIPE_NAME, (recipe_to_yaml(recipe).encode(), fingerprint)
    is_other = (
        before.exists() and (before.read_bytes(), read_state(run_dir).get("fingerprint")) != now
    )
    if is_other and not saved_steps(run_dir):
        (run_dir / SKIPS_NAME).unlink(missing_ok=True)
    write_durably(before, now[0])
    write_durably(run_dir / ENGINE_CONFIG_NAME, json.dumps(engine_config, indent=1).encode())
    for name, content in read_tokenizer(data_dir / TOKENIZER_NAME).items():
        write_durably(run_dir / TOKENIZER_NAME / name, content)


def around_saves(
    run_dir: Path, failed: Callback = None, wrote_block: Callback = None
) -> AroundSaves:
    """What a run does around a save: its lines of metrics are made durable before, and
    state.json tells of it after.
    """

    def before() -> None:
        flush_metrics(run_dir)

    def saved(step: int) -> None:
        write_state(run_dir, saved_step=step)

    return AroundSaves(before=before, saved=saved, wrote_block=wrote_block, failed=failed)


class MetricsFile:
    """`metrics.jsonl`: one line a step, cut back, in its place, to the step at which a run
    continues.

    `lacks` says how many of the steps before have no line, `cut` what was found damaged behind
    these, if anything was. Raises UserError where the damage is among them.
    """

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self.path = run_dir / METRICS_NAME
        if not self.path.exists():
            self.path.touch()
            fsync_directory(run_dir)
        kept, self.cut = cut_to_step(self.path, start_step)
        self.lacks = start_step - len({line["step"] for line in kept})
        self._open()

    def _open(self) -> None:
        # what a failed write leaves is in the file, or nowhere
        self._file = self.path.open("ab", buffering=0)
        self._bytes = self._file.tell()

    def append(self, line: dict[str, Any]) -> None:
        """Add one step's line. Raises OSError, naming the file, where the disk does not take it."""
        content = json.dumps(line).encode() + b"\n"

        def write() -> None:
            with naming(self.path):
                # after an attempt that failed: the file server may know the old one no more
                if self._file.closed:
                    os.truncate(self.path, self._bytes)
                    self._open()
                try:
                    write_all(self._file, content)
                except OSError:
                    with contextlib.suppress(OSError):
                        self._file.close()
                    raise

        patiently(write)
        self._bytes += len(content)

    def close(self) -> None:
        """Flush to disk and close."""
        self._file.close()
        flush_metrics(self.path.parent)


def write_all(file: FileIO, content: bytes) -> None:
    """Write all of it to an unbuffered file, which may take a part at a time."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def flush_metrics(run_dir: Path) -> None:
    """Make the lines of metrics.jsonl durable, on which a checkpoint counts.

    After a flush that failed, Linux takes its pages for written, and a second flush alone would
    succeed over lost lines: so they are written once more, in place, while the run may append.
    """
    path = run_dir / METRICS_NAME
    if not path.exists():
        return
    attempts = itertools.count(1)

    def flush() -> None:
        with naming(path), path.open("r+b", buffering=0) as file:
            if next(attempts) > 1:
                lines = file.readall()
                file.seek(0)
                write_all(file, lines)
            os.fsync(file.fileno())

    patiently(flush)

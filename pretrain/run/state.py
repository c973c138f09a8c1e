"""How a run stands: `state.json` in its directory, which this module alone writes and reads.

running     a start trains, or was killed while it did
preempted   it stopped before its last step, as it was told
done        all steps are trained
failed      `reason` says why
"""

import json
import secrets
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, explained
from data_prep.files import write_durably
from pretrain.checkpoint.patience import patiently, read_patiently
from pretrain.data.stages import DataStage, stages_of_json

STATE_NAME = "state.json"
STATUSES = ("running", "preempted", "done", "failed")
NOT_OURS = (ValueError, TypeError, RecursionError)  # what reading JSON of another form raises
STATE_LOCK = threading.Lock()  # of this process: the thread that writes checkpoints updates it too


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How a run stands; all is None where it never started."""

    status: str | None = None  # one of STATUSES
    reason: str | None = None  # why it is preempted or failed
    fingerprint: str | None = None  # of the data set; of several, that of the newest stage
    stages: tuple[DataStage, ...] | None = None  # of a run that had several data sets
    began: int | None = None  # ns since 1970, of the start that is the newest
    branched_from: str | None = None  # the checkpoint of another run
    imported_from: str | None = None  # whose weights it began with, by pretrain.import_hf
    saved_step: int | None = None  # the steps behind the newest checkpoint

    @property
    def data_stages(self) -> tuple[DataStage, ...]:
        """The data sets that it is trained on, oldest first; none where none is told."""
        if self.stages is not None:
            return self.stages
        if self.fingerprint is None:
            return ()
        return (DataStage(fingerprint=self.fingerprint),)

    def to_json(self) -> bytes:
        """The file's content: what is known, and a reason beside every status."""
        content = {name: value for name, value in asdict(self).items() if value is not None}
        if self.status is not None:
            content["reason"] = self.reason
        return json.dumps(content, indent=1).encode()


def state_of(content: Any) -> RunState:
    """Raises ValueError for what is no such record; fields of later versions are passed over."""
    if not isinstance(content, dict):
        raise ValueError("not an object")
    known = {name: content.get(name) for name in vars(RunState())}
    if known["stages"] is not None:
        known["stages"] = stages_of_json(known["stages"])
    state = RunState(**known)
    for name in ("status", "reason", "fingerprint", "branched_from", "imported_from"):
        if not isinstance(getattr(state, name), str | None):
            raise ValueError(f"{name} is no text")
    for name in ("began", "saved_step"):
        if not isinstance(getattr(state, name), int | None):
            raise ValueError(f"{name} is no whole number")
    return state


def read_state(run_dir: Path) -> RunState:
    """How the run stands; all is None where the file is not there.

    Raises UserError if something else wrote it.
    """
    path = run_dir / STATE_NAME
    if not path.is_file():
        return RunState()
    with explained(NOT_OURS, f"{path}: damaged", "remove it to continue from the checkpoints"):
        return state_of(json.loads(read_patiently(path)))


def stages_of_run(run_dir: Path) -> tuple[DataStage, ...]:
    """The data sets that a run was trained on, oldest first. Raises UserError, or OSError, where
    none is told.
    """
    path = run_dir / STATE_NAME
    with explained(NOT_OURS, f"{path}: damaged", "use --recipe"):
        state = state_of(json.loads(path.read_bytes()))
        stages = state.data_stages
        if not stages and state.imported_from is None:
            raise ValueError("no fingerprint")
    if not stages:
        raise UserError(
            f"{run_dir}: begins with imported weights, and has trained on no data set yet; train "
            "first, or use --recipe"
        )
    return stages


def may_be_a_run_s(path: Path) -> bool:
    """Whether a file of this name may be a run's: a status of ours is in it, or it is damaged."""
    try:
        content: Any = json.loads(read_patiently(path))
    except (ValueError, RecursionError):
        return True
    return isinstance(content, dict) and content.get("status") in STATUSES


def write_state(run_dir: Path, **changes: Any) -> None:
    """Set some fields of the state, and leave the others."""
    with STATE_LOCK:
        content = replace(read_state(run_dir), **changes).to_json()
        patiently(lambda: write_durably(run_dir / STATE_NAME, content))


def note_failure(run_dir: Path, reason: str) -> None:
    """Why a run failed, where no other end was noted before.

    Several ranks may do so at once, so each writes beside under a name of its own, and none waits
    for a disk that may be what failed.
    """
    with STATE_LOCK:
        state = read_state(run_dir)
        if state.status == "running":
            content = replace(state, status="failed", reason=reason).to_json()
            write_durably(run_dir / STATE_NAME, content, f".{secrets.token_hex(8)}.tmp")

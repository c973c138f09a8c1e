"""How a run stands, as far as its directory tells, and why a start failed.

The launcher's exit code alone does not say: it can be 0 though ranks were killed.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError
from pretrain.checkpoint.layout import saved_steps
from pretrain.data.digests import lengths_that_differ
from pretrain.metrics.metrics_file import METRICS_NAME
from pretrain.run.directory import STARTS_NAME
from pretrain.run.state import RunState, read_state


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a run stands at one moment."""

    state: RunState  # of state.json; nothing is known where that cannot be read
    steps: int = 0  # that metrics.jsonl has
    starts: int = 0  # that trained: each left a line of starts.jsonl

    @property
    def status(self) -> str:
        """running, preempted, done or failed; unknown where nothing is said."""
        return self.state.status or "unknown"

    def has_begun_since(self, before: "Standing") -> bool:
        """Whether the ranks of a start have met since."""
        return self.state.began != before.state.began

    def has_trained_since(self, before: "Standing") -> bool:
        """Whether a start has come to its first step since."""
        return self.has_begun_since(before) and self.starts > before.starts


def standing(run_dir: Path) -> Standing:
    """How a run stands; what is damaged there is the trainer's to complain about."""
    state = RunState()
    with suppress(OSError, UserError):
        state = read_state(run_dir)
    return Standing(
        state=state,
        steps=count_lines(run_dir / METRICS_NAME),
        starts=count_lines(run_dir / STARTS_NAME),
    )


def count_lines(path: Path) -> int:
    """How many whole lines a file has; 0 if it is not there."""
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def newest_checkpoint(run_dir: Path) -> str:
    """The name of the checkpoint of most steps; step 0 where there is none."""
    newest_first = saved_steps(run_dir)
    return newest_first[0].name if newest_first else "step 0"


def describe_failure(code: int, before: Standing, now: Standing, data_dir: Path) -> str:
    """Why a start failed, on one line: what the trainer says, else what can be known.

    `code` is the launcher's exit code.
    """
    if now.status == "failed" and now != before:
        return " ".join(str(now.state.reason).split())
    if now.status != "running":
        return f"it ended before training (the launcher's exit code {code})"
    killed = f"its ranks or their launcher were killed (the launcher's exit code {code})"
    damage = lengths_that_differ(data_dir)  # who reads a mapped file behind its end is killed
    return "; ".join([killed, *damage])

"""How a run stands, as far as its directory tells, and why a start failed.

The launcher's exit code alone does not say: it can be 0 though ranks were killed.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.digests import lengths_that_differ
from pretrain.metrics.metrics_file import METRICS_NAME
from pretrain.run.state import STATE_NAME

STARTS_NAME = "starts.jsonl"
STEP_PREFIX = "step-"  # of a checkpoint's name


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a run stands at one moment."""

    state: dict[str, object]  # of state.json; empty where none can be read
    steps: int = 0  # that metrics.jsonl has
    starts: int = 0  # that trained: each left a line of starts.jsonl

    @property
    def status(self) -> str:
        """running, preempted, done or failed; unknown where nothing is said."""
        return str(self.state.get("status", "unknown"))

    def has_begun_since(self, before: "Standing") -> bool:
        """Whether the ranks of a start have met since."""
        return self.state.get("began") != before.state.get("began")

    def has_trained_since(self, before: "Standing") -> bool:
        """Whether a start has come to its first step since."""
        return self.has_begun_since(before) and self.starts > before.starts


def standing(run_dir: Path) -> Standing:
    """How a run stands; what is damaged there is the trainer's to complain about."""
    state: dict[str, object] = {}
    with suppress(OSError, ValueError, TypeError, RecursionError):
        state = dict(json.loads((run_dir / STATE_NAME).read_bytes()))
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

    def steps(name: str) -> str:
        return name.removeprefix(STEP_PREFIX)

    names = [path.name for path in run_dir.glob(f"checkpoints/{STEP_PREFIX}*")]
    whole = [name for name in names if steps(name).isdecimal()]
    # as numbers: more steps than fill eight digits take more of them
    return max(whole, key=lambda name: int(steps(name)), default="step 0")


def describe_failure(code: int, before: Standing, now: Standing, data_dir: Path) -> str:
    """Why a start failed, on one line: what the trainer says, else what can be known.

    `code` is the launcher's exit code.
    """
    if now.status == "failed" and now != before:
        return " ".join(str(now.state.get("reason")).split())
    if now.status != "running":
        return f"it ended before training (deepspeed's exit code {code})"
    killed = f"its ranks or their launcher were killed (deepspeed's exit code {code})"
    damage = lengths_that_differ(data_dir)  # who reads a mapped file behind its end is killed
    return "; ".join([killed, *damage])

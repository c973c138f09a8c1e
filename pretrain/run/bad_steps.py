"""Bad steps: judged before their update, which they never reach; recorded, and from then on
replayed, not judged again.

A step is bad where its loss or gradient norm is no number, or a spike: further above the running
median than `bad_steps.spike_deviations` deviations, both over the last 128 steps trained. A
deviation is the median distance from the median times 1.4826, which is the standard deviation where
values are normal, and which spikes do not move.

`skips.jsonl` in the run's directory holds a line for every bad step: what was found and decided,
its samples and their documents, and its worst row's text. A step recorded with policy `skip` or
`rewind` is a no-op on every rank whenever the run comes to it again: it consumes its samples and
advances the schedule, no more.
"""

import json
import math
import os
import statistics
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer

from data_prep.errors import explained, naming, printable
from data_prep.shards import TOKENIZER_NAME, ShardReader
from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.config.recipe import BadStepsRecipe
from pretrain.data.loader import TrainingLoader
from pretrain.data.provenance import parts_of
from pretrain.distributed.agree import gather, say, together
from pretrain.distributed.world import World
from pretrain.engine.figures import finite, no_number
from pretrain.metrics.records import cut_damaged_end, read_lines
from pretrain.run.directory import SKIPS_NAME

RUNNING_STEPS = 128
FEWEST_STEPS = 32  # no spike before so many were trained
DEVIATIONS_OF_NORMAL = 1.4826  # 1 / the 75 % quantile of the standard normal distribution

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was found of a bad step and decided: all that its replay needs."""

    step: int
    reason: str
    policy: str  # stop, skip or rewind
    loss: float | None  # None: no number
    gradient_norm: float | None

    @classmethod
    def of_record(cls, record: Json) -> Self:
        """That of a line of skips.jsonl, or of a checkpoint. Raises KeyError for what is none."""
        return cls(
            step=record["step"],
            reason=record["reason"],
            policy=record["policy"],
            loss=record["loss"],
            gradient_norm=record["gradient_norm"],
        )


class BadSteps:
    """The judge of a run's steps and its decisions: the same on every rank."""

    def __init__(self, run_dir: Path, recipe: BadStepsRecipe, world: World) -> None:
        self.path = run_dir / SKIPS_NAME
        self.recipe = recipe
        self.world = world
        self.decisions: dict[int, Decision] = {}  # by step
        # Loss and gradient norm of the last steps trained, oldest first.
        self.recent: deque[tuple[float, float]] = deque(maxlen=RUNNING_STEPS)

    def restore(self, manifest: CheckpointManifest | None) -> None:
        """Take up what a checkpoint holds, if there is one, and every decision of the run that
        is on disk. Raises UserError for a damaged one.
        """
        records = list(gather(together(self._recorded))[0])
        recent: tuple[tuple[float, float], ...] = ()
        if manifest:
            records = [*manifest.skips, *records]
            recent = manifest.recent_steps
        self.recent = deque(recent, maxlen=RUNNING_STEPS)
        for record in records:
            problem = f"{self.path}: step {record['step']}: damaged"
            with explained(KeyError, problem, "mend or remove it"):
                self.decisions[record["step"]] = Decision.of_record(record)

    def _recorded(self) -> list[Json]:
        """On rank 0, what the file holds; an end that a crash left is cut off.

        Nothing followed from it that is not in a checkpoint, or is decided alike when the run comes
        to that step again.
        """
        if not self.world.is_main or not self.path.exists():
            return []
        records, cut = cut_damaged_end(self.path)
        if cut:
            say(self.world, f"warning: {cut}")
        return records

    def skips_before(self, step: int) -> tuple[Json, ...]:
        """The decisions that a checkpoint after `step` steps keeps, by step."""
        kept = [self.decisions[skipped] for skipped in sorted(self.decisions) if skipped < step]
        return tuple(asdict(decision) for decision in kept)

    def replayed(self, step: int) -> Decision | None:
        """The decision on a step that is not to be trained."""
        decision = self.decisions.get(step)
        if decision is None or decision.policy == "stop":
            return None
        return decision

    def all_bad(self, steps: range) -> bool:
        """Whether none of these steps was trained."""
        return all(self.replayed(step) for step in steps)

    def skipped_steps(self) -> int:
        """How many steps were not trained so far."""
        return sum(decision.policy != "stop" for decision in self.decisions.values())

    def judge(self, loss: float, gradient_norm: float) -> str | None:
        """Why a step must not be taken, or None. Good steps enter the running figures."""
        losses = [before for before, _ in self.recent]
        norms = [before for _, before in self.recent]
        reason = (
            no_number(loss, gradient_norm)
            or self._spike("loss", losses, loss)
            or self._spike("gradient norm", norms, gradient_norm)
        )
        if reason is None:
            self.recent.append((loss, gradient_norm))
        return reason

    def _spike(self, name: str, before: list[float], value: float) -> str | None:
        limit = self.recipe.spike_deviations
        if limit is None or len(before) < FEWEST_STEPS:
            return None
        median = statistics.median(before)
        deviation = DEVIATIONS_OF_NORMAL * statistics.median(abs(each - median) for each in before)
        if value <= median + limit * deviation:
            return None
        return (
            f"{name} {value:.6g}, above the running median {median:.6g} by over {limit:g} "
            f"deviations {deviation:.3g}"
        )

    def decide(self, step: int) -> str:
        """The policy for a bad step; `stop` where too many came in a row."""
        row_before = range(step - self.recipe.max_in_a_row, step)
        if self.all_bad(row_before):
            return "stop"
        return self.recipe.policy

    def record(self, decision: Decision, rows: Json) -> None:
        """Keep a decision, on disk before anything follows from it, with what `describe_rows` says
        of the step.
        """
        self.decisions[decision.step] = decision
        if not self.world.is_main:
            return
        line = printable(json.dumps({**asdict(decision), **rows}, ensure_ascii=False)) + "\n"
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def worst_texts(run_dir: Path) -> dict[int, str]:
    """Of each bad step of a run, the text of the row with the highest loss, where it is known.

    Raises UserError for a damaged line.
    """
    texts = {}
    for record in read_lines(run_dir / SKIPS_NAME):
        worst = record.get("worst_row")
        text = worst.get("text") if isinstance(worst, dict) else None
        if isinstance(text, str):
            texts[record["step"]] = text
    return texts


def rewound_steps(run_dir: Path) -> frozenset[int]:
    """The bad steps at which a run went back to a checkpoint.

    Raises UserError for a damaged line.
    """
    found = set()
    for record in read_lines(run_dir / SKIPS_NAME):
        step = record.get("step")
        if record.get("policy") == "rewind" and isinstance(step, int):
            found.add(step)
    return frozenset(found)


def describe_rows(
    loader: TrainingLoader, reader: ShardReader, samples: range, row_nats: list[float]
) -> Json:
    """The samples of a step, the documents in each (input file, row), and the row of the highest
    loss with its text. `row_nats` has a mean loss in nats for each sample.
    """

    def badness(row: int) -> tuple[bool, float]:
        return math.isnan(row_nats[row]), row_nats[row]

    worst = max(range(len(samples)), key=badness)
    ids = loader.samples(np.array([samples[worst]]))[0].tolist()
    tokenizer_path = reader.data_dir / TOKENIZER_NAME / "tokenizer.json"
    text = None
    if tokenizer_path.is_file():
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
        text = tokenizer.decode(ids, skip_special_tokens=False)
    return {
        "samples": list(samples),
        "documents": [[part.origin for part in parts_of(loader, sample)] for sample in samples],
        "worst_row": {"row": worst, "loss": finite(row_nats[worst]), "text": text},
    }

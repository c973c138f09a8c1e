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
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data_prep.errors import explained, naming, printable
from data_prep.shards import TOKENIZER_NAME, ShardReader
from pretrain.config.recipe import BadStepsRecipe
from pretrain.data.loader import TrainingLoader
from pretrain.data.provenance import parts_of
from pretrain.distributed.agree import gather, say, together
from pretrain.distributed.world import World
from pretrain.engine.figures import finite, no_number
from pretrain.metrics.records import cut_damaged_end
from pretrain.run.claim import SKIPS_NAME

RUNNING_STEPS = 128
FEWEST_STEPS = 32  # no spike before so many were trained
DEVIATIONS_OF_NORMAL = 1.4826
# what a record needs for its replay
DECISION = ("step", "reason", "policy", "loss", "gradient_norm")

Record = dict[str, Any]


class BadSteps:
    """The judge of a run's steps and its record: the same on every rank."""

    def __init__(self, run_dir: Path, recipe: BadStepsRecipe, world: World) -> None:
        self.path, self.recipe, self.world = run_dir / SKIPS_NAME, recipe, world
        # loss and gradient norm
        self.recent: deque[tuple[float, float]] = deque(maxlen=RUNNING_STEPS)
        self.records: dict[int, Record] = {}

    def restore(self, manifest: dict[str, Any] | None) -> None:
        """Take up what a checkpoint holds, if there is one, and every decision of the run that
        is on disk.
        """
        manifest = manifest or {}
        self.recent = deque(map(tuple, manifest.get("recent_steps", [])), maxlen=RUNNING_STEPS)
        for record in [*manifest.get("skips", []), *gather(together(self._recorded))[0]]:
            with explained(
                KeyError, f"{self.path}: step {record['step']}: damaged", "mend or remove it"
            ):
                self.records[record["step"]] = {key: record[key] for key in DECISION}

    def _recorded(self) -> list[Record]:
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

    def about(self, step: int) -> dict[str, Any]:
        """What the manifest of a checkpoint after `step` steps keeps."""
        skips = [self.records[skipped] for skipped in sorted(self.records) if skipped < step]
        return {"skips": skips, "recent_steps": list(self.recent)}

    def replayed(self, step: int) -> Record | None:
        """The record of a step that is not to be trained."""
        record = self.records.get(step)
        return record if record and record["policy"] != "stop" else None

    def all_bad(self, steps: range) -> bool:
        """Whether none of these steps was trained."""
        return all(self.replayed(step) for step in steps)

    def judge(self, loss: float, gradient_norm: float) -> str | None:
        """Why a step must not be taken, or None. Good steps enter the running figures."""
        reason = no_number(loss, gradient_norm)
        for name, column, value in (("loss", 0, loss), ("gradient norm", 1, gradient_norm)):
            reason = reason or self._spike(
                name, [figures[column] for figures in self.recent], value
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
        too_many = all(
            self.replayed(before) for before in range(step - self.recipe.max_in_a_row, step)
        )
        return "stop" if too_many else self.recipe.policy

    def record(self, record: Record) -> None:
        """Keep a decision, on disk before anything follows from it."""
        self.records[record["step"]] = {key: record[key] for key in DECISION}
        if self.world.is_main:
            with naming(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(printable(json.dumps(record, ensure_ascii=False)) + "\n")
                file.flush()
                os.fsync(file.fileno())


def describe_rows(
    loader: TrainingLoader, reader: ShardReader, samples: range, row_nats: list[float]
) -> Record:
    """The samples of a step, the documents in each (input file, row), and the row of the highest
    loss with its text.
    """
    worst = max(range(len(samples)), key=lambda row: (math.isnan(row_nats[row]), row_nats[row]))
    path = reader.data_dir / TOKENIZER_NAME / "tokenizer.json"
    ids = loader.samples(np.array([samples[worst]]))[0].tolist()
    text = (
        Tokenizer.from_file(str(path)).decode(ids, skip_special_tokens=False)
        if path.is_file()
        else None
    )
    return {
        "samples": list(samples),
        "documents": [[part.origin for part in parts_of(loader, sample)] for sample in samples],
        "worst_row": {"row": worst, "loss": finite(row_nats[worst]), "text": text},
    }

"""What a finished cell was measured to be, read back through the owners of its files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.comparing.cells import Place, evaluation_of
from pretrain.comparing.matrix import Cell, Settings
from pretrain.costs.flops import count_parameters
from pretrain.evaluation.result import Score
from pretrain.metrics.metrics_file import stream_steps
from pretrain.metrics.step_record import SkippedStep, StepRecord, tokens_per_second


@dataclass(frozen=True, kw_only=True)
class CellFigures:
    """A cell after its last step."""

    name: str
    settings: Settings
    seed: int
    score: Score  # of the whole validation split
    parameters: int
    parameters_without_table: int  # the size that treatments of one group have in common
    train_tokens: int  # those of whole steps
    tokens_per_s: float
    peak_memory_bytes: int  # of rank 0
    skipped_steps: int  # whose update was left out, since they were bad

    @property
    def loss(self) -> float:
        """Nats a target."""
        return self.score.loss


def measure(place: Place, cell: Cell) -> CellFigures | None:
    """The figures of a cell; None where it has none, or a loss that is no number."""
    result = evaluation_of(place, cell)
    if result is None or not math.isfinite(result.whole_split.loss):
        return None
    steps = list(stream_steps(place.run_dir(cell)))
    trained = [step for step in steps if isinstance(step, StepRecord)]
    parts = count_parameters(cell.recipe.model)
    parameters = sum(parts.values())
    batch = cell.recipe.batch.global_batch_tokens
    return CellFigures(
        name=cell.name,
        settings=cell.settings,
        seed=cell.seed,
        score=result.whole_split,
        parameters=parameters,
        parameters_without_table=parameters - parts["input_embedding"],
        train_tokens=cell.recipe.total_steps * batch,
        tokens_per_s=tokens_per_second(steps),
        peak_memory_bytes=max((step.peak_memory_bytes for step in trained), default=0),
        skipped_steps=sum(isinstance(step, SkippedStep) for step in steps),
    )


def measure_all(place: Place, cells: Sequence[Cell]) -> list[CellFigures]:
    """The figures of all cells that have some, in the order of the matrix."""
    found = [measure(place, cell) for cell in cells]
    return [figures for figures in found if figures is not None]

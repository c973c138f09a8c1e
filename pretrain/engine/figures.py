"""The figures of a step, and whether they are numbers."""

import math
from dataclasses import dataclass

from pretrain.metrics.step_record import RankFigures


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """What one step gave, known before its update."""

    loss: float  # nats, mean over all targets of all ranks
    gradient_norm: float  # of all ranks' parameters, before clipping
    own: RankFigures
    # Whose data and forward pass took longest, where no rank waits for another; a step earlier, so
    # None at the first.
    slowest: RankFigures | None
    # Why nothing of this step reached weights or moments; None: it was trained.
    refused: str | None


def no_number(loss: float, gradient_norm: float) -> str | None:
    """What is wrong with figures that are not finite, or None."""
    if math.isfinite(loss) and math.isfinite(gradient_norm):
        return None
    return f"loss {loss}, gradient norm {gradient_norm}"


def finite(value: float) -> float | None:
    """A number as JSON has it, which has no infinity."""
    return value if math.isfinite(value) else None

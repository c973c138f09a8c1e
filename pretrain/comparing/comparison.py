"""What a comparison came to, and the file that keeps it: comparison.json, whose only owner this is.

Differences are the treatment's figure less the baseline's: above 0 the treatment is worse.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pydantic

from data_prep.errors import UserError, first_problem, parse_json
from data_prep.files import write_durably
from pretrain.comparing.matching import Match
from pretrain.comparing.matrix import Settings, Value
from pretrain.comparing.measured import CellFigures
from pretrain.comparing.significance import LEVEL, Figure
from pretrain.evaluation.intervals import Interval

COMPARISON_NAME = "comparison.json"
FORMAT = 1
ADVICE = "move it away; the same command makes it again from the cells"


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What one value of the treatment's key gave, over its seeds."""

    value: Value  # None where nothing is compared
    seeds: tuple[int, ...]
    parameters: int
    loss: Figure  # nats a target
    perplexity: Figure
    bits_per_byte: Figure
    tokens_per_s: Figure
    peak_memory_bytes: Figure


@dataclass(frozen=True, kw_only=True)
class OverSeeds:
    """What pairs of two seeds or more show: Student's t, and its power (significance.py)."""

    deviation: float  # of the pairs' differences, nats
    interval: Interval  # of the mean difference, nats
    interval_bits: Interval  # the same, bits per byte
    p_value: float
    p_holm: float  # adjusted for all treatments of the group
    detectable: float  # nats that so many seeds show in 4 of 5 cases
    seeds_for_one_percent: int | None  # of the baseline's loss; None: over 10,000

    @property
    def is_seen(self) -> bool:
        """Whether the treatments differ, as far as the test tells."""
        return self.p_holm < LEVEL


@dataclass(frozen=True, kw_only=True)
class OverDocuments:
    """What the validation documents show within one seed: a paired bootstrap."""

    seed: int
    documents: int
    difference: float  # nats
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A treatment against the baseline, over the seeds that both have."""

    value: Value
    seeds: tuple[int, ...]
    loss: float  # nats a target, the mean over seeds
    bits_per_byte: float
    baseline_loss: float  # its mean over the same seeds, by which differences become percents
    over_seeds: OverSeeds | None  # None of fewer than two seeds
    over_documents: tuple[OverDocuments, ...]  # none where an evaluation kept no documents

    def percent(self, nats: float) -> float:
        """A difference in percents of the baseline's loss."""
        return 100 * nats / self.baseline_loss


@dataclass(frozen=True, kw_only=True)
class Group:
    """Cells that are compared within themselves."""

    settings: Settings  # what they have in common; empty where there is one group
    train_tokens: int
    parameters: int  # without an input table, which is of treatments
    treatments: tuple[Treatment, ...]
    differences: tuple[Difference, ...]  # one for each treatment but the baseline


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A cell without figures."""

    name: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All of it."""

    recipe: str
    data_dir: str
    fingerprint: str  # of the data set
    keys: tuple[str, ...]  # that vary
    treatment: str | None  # the key that is compared
    baseline: Value
    cells: tuple[CellFigures, ...]
    missing: tuple[Missing, ...]
    groups: tuple[Group, ...]
    matches: tuple[Match, ...]
    format: int = FORMAT

    def to_json(self) -> bytes:
        """The file's content."""
        return json.dumps(asdict(self), indent=1, allow_nan=False).encode() + b"\n"


def write_comparison(comparison: Comparison, output_dir: Path) -> Path:
    """Write comparison.json; its path. Raises OSError where that can't be."""
    path = output_dir / COMPARISON_NAME
    write_durably(path, comparison.to_json())
    return path


def read_comparison(output_dir: Path) -> Comparison | None:
    """What was found before; None where nothing was. Raises UserError for another's file."""
    path = output_dir / COMPARISON_NAME
    if not path.is_file():
        return None
    content: Any = parse_json(path.read_bytes(), str(path), ADVICE)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not what pretrain.compare of this version writes; {ADVICE}")
    try:
        return pydantic.TypeAdapter(Comparison).validate_json(json.dumps(content))
    except pydantic.ValidationError as error:
        problem = first_problem(error, lambda _: "remove it")
        raise UserError(f"{path}: {problem}; {ADVICE}") from None

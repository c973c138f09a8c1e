"""What sinks are told: of a run, once; of its steps, figures under names that are the same in all.

Names are grouped as TensorBoard, W&B and trackio group them, by what stands before the slash.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.metrics.step_record import AnyStep, Sample, SkippedStep, StepRecord

Figures = dict[str, float]
Texts = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class EarlierText:
    """The validation text of a data set that a run had before."""

    end: int  # the first step of the next one
    bytes_per_token: float | None  # None also where that data set is no longer at hand


@dataclass(frozen=True, kw_only=True)
class AboutRun:
    """A run as its sinks know it."""

    run_dir: Path
    config: dict[str, Any]  # recipe, fingerprint, versions and the like, as JSON has them
    restarts: frozenset[int]  # steps that starts of the run went on from
    # Of the validation text, end-of-document ids included; None where its bytes are not known.
    bytes_per_token: float | None
    # Of the data sets before the newest one, oldest first.
    earlier_texts: tuple[EarlierText, ...] = ()

    def bytes_per_token_at(self, step: int) -> float | None:
        """Of the validation text of the data set that a step was trained on."""
        for text in self.earlier_texts:
            if step < text.end:
                return text.bytes_per_token
        return self.bytes_per_token

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.run_dir.resolve().name


@dataclass(frozen=True, kw_only=True)
class ToldStep:
    """A step as its sinks draw it."""

    step: int
    figures: Figures
    texts: Texts = field(default_factory=dict)  # why it was skipped, what its model wrote


def told(record: AnyStep, about: AboutRun) -> ToldStep:
    """What is drawn of a step. What is no number, or not known, is left out."""
    figures: dict[str, float | None] = {
        "train/loss": record.loss,
        "train/gradient_norm": record.gradient_norm,
        "train/learning_rate": record.learning_rate,
        "train/tokens": record.tokens,
    }
    figures |= validation_figures(record.val_loss, about.bytes_per_token_at(record.step))
    if isinstance(record, StepRecord):
        figures |= speed_figures(record)
    if record.step in about.restarts:
        figures["marks/restart"] = 1
    if any(record.step == text.end for text in about.earlier_texts):
        figures["marks/other_data"] = 1
    texts: Texts = {}
    if isinstance(record, SkippedStep):
        figures["marks/skipped"] = 1
        texts["marks/why_skipped"] = record.skipped
    for number, sample in enumerate(record.samples):
        texts[f"samples/{number}"] = as_text(sample)
        figures[f"samples/{number}_bits_per_byte"] = sample.bits_per_byte
    known = {name: float(value) for name, value in figures.items() if value is not None}
    finite = {name: value for name, value in known.items() if math.isfinite(value)}
    return ToldStep(step=record.step, figures=finite, texts=texts)


def as_text(sample: Sample) -> str:
    """A sample as sinks show it: the prompt, and how it goes on."""
    return sample.prompt + sample.text


def validation_figures(
    val_loss: float | None, bytes_per_token: float | None
) -> dict[str, float | None]:
    """Nats a token and, by the mean length of the split's tokens, bits a byte."""
    if val_loss is None:
        return {}
    bits_per_byte = None
    if bytes_per_token is not None:
        bits_per_byte = val_loss / (math.log(2) * bytes_per_token)
    return {"validation/loss": val_loss, "validation/bits_per_byte": bits_per_byte}


def speed_figures(record: StepRecord) -> dict[str, float | None]:
    """How fast a step was, where its time went on rank 0, and that rank's memory."""
    figures: dict[str, float | None] = {
        "speed/tokens_per_s": record.tokens_per_s,
        "speed/mfu": record.mfu,
        "speed/mfu_of_matmul": record.mfu_of_matmul,
        "speed/step_s": record.step_s,
        "memory/peak_bytes": record.peak_memory_bytes,
    }
    for phase, seconds in record.seconds.items():
        figures[f"split/{phase}_s"] = seconds
    return figures

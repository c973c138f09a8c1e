"""What became of a step: the records behind the lines of metrics.jsonl.

A record is complete before anybody sees it: display, files and whatever follows a run read records,
and add nothing to them. A step that was trained is a StepRecord; one that was refused, and so never
reached the weights, a SkippedStep, which has no times.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

Line = dict[str, Any]  # of metrics.jsonl
LARGEST_EXPONENT = 700.0  # e ** 709 is the largest that a float holds


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the model made of a prompt when a validation was due."""

    prompt: str
    text: str  # the continuation alone
    bits_per_byte: float | None  # of the continuation; None where it has no byte


@dataclass(frozen=True, kw_only=True)
class RankFigures:
    """What one rank's step took."""

    rank: int
    seconds: dict[str, float]  # of each phase, data to other: engine/clock.py names them
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class SkippedStep:
    """A step that reached neither weights nor moments: its samples count as seen."""

    step: int  # from 0
    loss: float | None  # nats, mean over all targets; None where it was no number
    gradient_norm: float | None  # before clipping
    learning_rate: float  # the schedule's
    tokens: int  # of all steps up to this one
    skipped: str  # why
    val_loss: float | None = None  # nats a token, where a validation was due
    samples: tuple[Sample, ...] = ()  # where a validation was due, one for each of log.prompts
    is_new: bool = False  # found now, not replayed from the record; not in the file

    def to_line(self) -> Line:
        """The line of metrics.jsonl."""
        line = {
            "step": self.step,
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "learning_rate": self.learning_rate,
            "tokens": self.tokens,
            "skipped": self.skipped,
        }
        return line | validation_of(self.val_loss) | samples_in_line(self.samples)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A step that was trained."""

    step: int  # from 0
    loss: float  # nats, mean over all targets of all ranks, before the update
    gradient_norm: float  # of all parameters, before clipping
    learning_rate: float
    tokens: int  # of all steps up to this one
    tokens_per_s: float  # of all ranks together
    tokens_per_s_per_rank: float
    step_s: float  # the sum of `seconds`
    seconds: dict[str, float]  # rank 0's, of each phase: data, forward, backward, optimizer, other
    peak_memory_bytes: int  # rank 0's
    slowest: RankFigures | None  # of the step before, so none at the first
    val_loss: float | None = None  # nats a token, where a validation was due
    mfu: float | None = None  # 0 to 1, where the device's peak is known
    # 0 to 1, where it is not: against what a matrix product reached on these devices
    mfu_of_matmul: float | None = None
    samples: tuple[Sample, ...] = ()  # where a validation was due, one for each of log.prompts

    def to_line(self) -> Line:
        """The line of metrics.jsonl."""
        line = {
            "step": self.step,
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "learning_rate": self.learning_rate,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_per_rank": self.tokens_per_s_per_rank,
            "step_s": self.step_s,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "slowest": asdict(self.slowest) if self.slowest else None,
        }
        line |= validation_of(self.val_loss)
        if self.mfu is not None:
            line["mfu"] = self.mfu
        if self.mfu_of_matmul is not None:
            line["mfu_of_matmul"] = self.mfu_of_matmul
        return line | samples_in_line(self.samples)


AnyStep = StepRecord | SkippedStep


def perplexity_of(loss: float) -> float:
    """e to the mean loss in nats; e ** 700 where it is above, as a float holds no more than 709."""
    return math.exp(min(loss, LARGEST_EXPONENT))


def validation_of(val_loss: float | None) -> Line:
    """What a line says of its validation, if there was one."""
    if val_loss is None:
        return {}
    return {"val_loss": val_loss, "val_perplexity": perplexity_of(val_loss)}


def samples_in_line(samples: tuple[Sample, ...]) -> Line:
    """What a line says of its samples, if there are any."""
    if not samples:
        return {}
    return {"samples": [asdict(sample) for sample in samples]}


def samples_of_line(line: Line) -> tuple[Sample, ...]:
    """The samples of a line; most have none. Raises KeyError or TypeError for what is no sample."""
    if "samples" not in line:
        return ()
    samples = []
    for own in line["samples"]:
        sample = Sample(
            prompt=own["prompt"], text=own["text"], bits_per_byte=own.get("bits_per_byte")
        )
        if not (isinstance(sample.prompt, str) and isinstance(sample.text, str)):
            raise TypeError("a sample that is no text")
        if not isinstance(sample.bits_per_byte, float | int | None):
            raise TypeError("bits per byte of a sample that are no number")
        samples.append(sample)
    return tuple(samples)


def step_of_line(line: Line) -> AnyStep:
    """The record behind a line; those of earlier versions may lack memory and slowest rank.

    Raises KeyError or TypeError for what is no line of a step.
    """
    if "skipped" in line:
        return SkippedStep(
            step=line["step"],
            loss=line["loss"],
            gradient_norm=line["gradient_norm"],
            learning_rate=line["learning_rate"],
            tokens=line["tokens"],
            skipped=line["skipped"],
            val_loss=line.get("val_loss"),
            samples=samples_of_line(line),
        )
    slowest = line.get("slowest")
    return StepRecord(
        step=line["step"],
        loss=line["loss"],
        gradient_norm=line["gradient_norm"],
        learning_rate=line["learning_rate"],
        tokens=line["tokens"],
        tokens_per_s=line["tokens_per_s"],
        tokens_per_s_per_rank=line["tokens_per_s_per_rank"],
        step_s=line["step_s"],
        seconds=line["seconds"],
        peak_memory_bytes=line.get("peak_memory_bytes", 0),
        slowest=RankFigures(**slowest) if slowest else None,
        val_loss=line.get("val_loss"),
        mfu=line.get("mfu"),
        mfu_of_matmul=line.get("mfu_of_matmul"),
        samples=samples_of_line(line),
    )


def tokens_per_second(steps: Iterable[AnyStep]) -> float:
    """Of all steps that were trained, over their own time; NaN where none was."""
    trained = [step for step in steps if isinstance(step, StepRecord)]
    seconds = sum(step.step_s for step in trained)
    if not trained:
        return math.nan
    return sum(step.tokens_per_s * step.step_s for step in trained) / seconds

"""The data sets that a run was trained on, one after another: its stages of data.

A run has one of them, until it is branched off with another data set. The samples of a stage are
those of its own loader, counted from 0 where the stage begins; so they depend on nothing that was
trained before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.manifest import Manifest, load_manifest

Json = dict[str, Any]  # an object of JSON that another record knows the fields of


@dataclass(frozen=True, kw_only=True)
class DataStage:
    """A data set, and from where on a run was trained on it."""

    fingerprint: str
    data_dir: str = ""  # where it lay; empty where that is not told
    first_step: int = 0
    samples_before: int = 0  # of the run, drawn from the stages before
    sources: tuple[Json, ...] = ()  # as checkpoints tell of them


def stages_of_json(told: Any) -> tuple[DataStage, ...]:
    """The stages of a file. Raises ValueError for what is none of ours."""
    try:
        stages = [stage_of_json(entry) for entry in told]
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"no stages of data ({type(error).__name__}: {error})") from None
    first_steps = [stage.first_step for stage in stages]
    # each has a step at least, so the steps are told apart
    if first_steps[:1] != [0] or sorted(set(first_steps)) != first_steps:
        raise ValueError(f"stages of data begin at steps {first_steps}")
    return tuple(stages)


def stage_of_json(entry: Json) -> DataStage:
    """One of them. Raises ValueError, KeyError or TypeError for what is none."""
    return DataStage(
        fingerprint=str(entry["fingerprint"]),
        data_dir=str(entry["data_dir"]),
        first_step=int(entry["first_step"]),
        samples_before=int(entry["samples_before"]),
        sources=tuple(entry["sources"]),
    )


def manifest_of_stage(stage: DataStage) -> Manifest | None:
    """The manifest of a stage's data set; None where that is no longer where it lay."""
    try:
        manifest = load_manifest(Path(stage.data_dir))
    except UserError:
        return None
    return manifest if manifest.fingerprint == stage.fingerprint else None


def stage_at(stages: Sequence[DataStage], step: int) -> DataStage:
    """The stage that a step, counted from 0, belongs to."""
    return next(stage for stage in reversed(stages) if stage.first_step <= step)


def steps_of_stage(stages: Sequence[DataStage], stage: DataStage) -> str:
    """Which steps a stage has, in words that follow the name of its data set."""
    later = [other.first_step for other in stages if other.first_step > stage.first_step]
    if not later:
        return f"from step {stage.first_step:,} on"
    return f"from step {stage.first_step:,} to {min(later) - 1:,}"


def seen_by(stages: Sequence[DataStage], steps: int) -> tuple[DataStage, ...]:
    """The stages that so many steps of a run were trained on."""
    return tuple(stage for stage in stages if stage.first_step < steps)


def are_the_same(some: Sequence[DataStage], others: Sequence[DataStage]) -> bool:
    """Whether stages are of the same data sets and steps, wherever these lay."""
    places = [
        [(stage.fingerprint, stage.first_step) for stage in stages] for stages in (some, others)
    ]
    return places[0] == places[1]

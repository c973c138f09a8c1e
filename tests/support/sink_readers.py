"""What sinks hold of a run, as their own readers show it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Steps = dict[str, list[tuple[int, float]]]  # of each figure: where it is drawn, in order


@dataclass
class Drawn:
    """A run as a sink's reader shows it."""

    figures: Steps
    config: str  # as text
    name: str = ""
    notes: list[tuple[int, str]] = field(default_factory=list)  # why steps were skipped


def read_tensorboard(run_dir: Path) -> list[Drawn]:
    """The one run that TensorBoard finds, all of its points."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    reader = EventAccumulator(
        str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}
    )
    reader.Reload()
    tags = reader.Tags()
    figures = {
        tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags["scalars"]
    }
    texts = {
        tag: [
            (event.step, make_ndarray(event.tensor_proto).item().decode())
            for event in reader.Tensors(tag)
        ]
        for tag in tags["tensors"]
        if not tag.startswith("_hparams_")
    }
    config = texts["config"][-1][1]
    return [Drawn(figures, config, run_dir.name, texts.get("marks/why_skipped", []))]


READERS = {"tensorboard": read_tensorboard}


def newest(sink: str, run_dir: Path) -> Drawn:
    """The run that a sink's reader shows last."""
    return READERS[sink](run_dir)[-1]


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

"""What sinks hold of a run, as their own readers show it."""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from support.runs import run_command

Steps = dict[str, list[tuple[int, float]]]  # of each figure: where it is drawn, in order


@dataclass
class Drawn:
    """A run as a sink's reader shows it."""

    figures: Steps
    config: str  # as text
    name: str = ""
    notes: list[tuple[int, str]] = field(default_factory=list)  # why steps were skipped
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)  # of each name, all


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
    return [Drawn(figures, config, run_dir.name, texts.get("marks/why_skipped", []), texts)]


def read_trackio(run_dir: Path) -> list[Drawn]:
    """The runs that trackio has of this one, each named by the next; all of their rows."""
    from trackio.sqlite_storage import SQLiteStorage

    with trackio_in(Path(os.environ["TRACKIO_DIR"])):
        return trackio_runs(SQLiteStorage, run_dir)


@contextlib.contextmanager
def trackio_in(directory: Path) -> Iterator[None]:
    """Have trackio look for its projects in a directory, whichever it read as it was imported: that
    of other tests, maybe.
    """
    import trackio.sqlite_storage
    import trackio.utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(directory))
        for module in (trackio.utils, trackio.sqlite_storage):
            patch.setattr(module, "TRACKIO_DIR", directory)
        yield


def trackio_runs(storage: Any, run_dir: Path) -> list[Drawn]:
    """As `read_trackio`, where trackio looks."""
    found: list[Drawn] = []
    name = json.loads((run_dir / "trackio.json").read_text())["run"]
    while name:
        path = storage.get_project_db_path("tablefree")
        with contextlib.closing(sqlite3.connect(path)) as database:
            rows = database.execute(
                "SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id", (name,)
            ).fetchall()
        shown = storage.get_logs("tablefree", name)
        assert [row["step"] for row in shown] == [step for step, _ in rows]
        config = storage.get_run_config("tablefree", name) or {}
        found.append(of_rows([(step, json.loads(row)) for step, row in rows], config, name))
        name = config.get("continues")
    return found[::-1]


def read_wandb(run_dir: Path) -> list[Drawn]:
    """The runs that W&B has below a run's directory, oldest first, as its own command reads it.

    One that was killed before W&B wrote anything is none.
    """
    found: dict[str, Drawn] = {}
    for directory in sorted((run_dir / "wandb").glob("offline-run-*")):
        result = run_command("wandb", "leet", "inspect", "--json", str(directory))
        assert result.returncode == 0, result.stderr
        records = [json.loads(line) for line in result.stdout.splitlines()]
        rows = [
            (record["history"]["step"].get("num", 0), record["history"]["item"])
            for record in records
            if record["type"] == "history"
        ]
        told = [(step, without_own(row)) for step, row in rows]
        for run in [record["run"] for record in records if record["type"] == "run"]:
            found[run["run_id"]] = of_rows(told, run["config"]["update"], run["run_id"])
    ordered: list[Drawn] = []
    name = json.loads((run_dir / "wandb.json").read_text())["run"]
    while name in found:
        ordered.append(found.pop(name))
        name = json.loads(ordered[-1].config).get("continues")
    assert not found
    return ordered[::-1]


def without_own(row: dict[str, Any]) -> dict[str, Any]:
    """A row of W&B's without the keys that W&B adds."""
    return {key: value for key, value in row.items() if not key.startswith("_")}


def of_rows(rows: list[tuple[int, dict[str, Any]]], config: dict[str, Any], name: str) -> Drawn:
    """A run of a sink that has a row for each step."""
    figures: Steps = {}
    texts: dict[str, list[tuple[int, str]]] = {}
    for step, row in rows:
        for key, value in row.items():
            if isinstance(value, str):
                texts.setdefault(key, []).append((step, value))
            else:
                figures.setdefault(key, []).append((step, value))
    return Drawn(figures, json.dumps(config), name, texts.get("marks/why_skipped", []), texts)


READERS = {"tensorboard": read_tensorboard, "trackio": read_trackio, "wandb": read_wandb}


@cache
def newest(sink: str, run_dir: Path) -> Drawn:
    """The run that a sink's reader shows last, of a run that is over."""
    return READERS[sink](run_dir)[-1]


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

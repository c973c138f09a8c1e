"""The cells of a comparison on disk.

    OUTPUT/cells/NAME/    a run directory like any other: pretrain/run/directory.py
    OUTPUT/logs/NAME.log  what its commands printed, start after start

A cell that is there already is taken as it is, or gone on with, if it is the same run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError, parse_yaml
from data_prep.manifest import Manifest, load_manifest
from pretrain.comparing.matrix import Cell
from pretrain.config.changes import refuse_changes
from pretrain.config.load import build_recipe, recipe_to_dict
from pretrain.evaluation.documents import DocumentScores, documents_path, read_documents
from pretrain.evaluation.result import EVALUATION_NAME, EvaluationResult, read_result
from pretrain.run.directory import RECIPE_NAME, is_run
from pretrain.run.first_checks import check_arguments
from pretrain.run.state import read_state

CELLS_NAME = "cells"
LOGS_NAME = "logs"
# What a cell may have been trained with otherwise: it bears on no step, and on no bit of one.
MAY_DIFFER = frozenset({"data", "log", "checkpoints", "stalls", "validation"})


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a comparison lies, and the data set that it is made on."""

    output_dir: Path
    data_dir: Path
    recipe: str  # as given

    def run_dir(self, cell: Cell) -> Path:
        """The directory of a cell's run."""
        return self.output_dir / CELLS_NAME / cell.name

    def log(self, cell: Cell) -> Path:
        """What its commands printed."""
        return self.output_dir / LOGS_NAME / f"{cell.name}.log"

    def flags(self, cell: Cell) -> list[str]:
        """Those of pretrain.train."""
        where = ["--data-dir", str(self.data_dir), "--run-dir", str(self.run_dir(cell))]
        return ["--recipe", self.recipe, *where, *cell.overrides]


def check_place(place: Place, cells: Sequence[Cell], ranks: int) -> None:
    """Raise UserError where cells can't lie, can't be trained on so many ranks, or are other runs.

    All of them are looked at before any is started.
    """
    output_dir = place.output_dir
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output-dir {output_dir}: is a file; give a directory")
    if is_run(output_dir):
        raise UserError(
            f"--output-dir {output_dir}: is a run of pretrain.train; give a directory of its own"
        )
    if output_dir.resolve().is_relative_to(place.data_dir.resolve()):
        raise UserError(
            f"--output-dir {output_dir}: is inside of the data set {place.data_dir}, which holds "
            "nothing else; give another directory"
        )
    manifest = load_manifest(place.data_dir)
    for cell in cells:
        check_arguments(place.flags(cell), ranks)
        check_cell(place, cell, manifest)


def check_cell(place: Place, cell: Cell, manifest: Manifest) -> None:
    """Raise UserError where a cell's directory holds another run."""
    run_dir = place.run_dir(cell)
    advice = "move that directory away, or give another --output-dir"
    recipe_path = run_dir / RECIPE_NAME
    if recipe_path.is_file():
        where = str(recipe_path)
        before = build_recipe(parse_yaml(recipe_path.read_bytes(), where), where)
        try:
            saved = recipe_to_dict(before)
            refuse_changes(saved, recipe_to_dict(cell.recipe), MAY_DIFFER, str(run_dir))
        except UserError as error:
            difference = str(error).partition(";")[0]
            raise UserError(f"{difference}; {advice}") from None
    fingerprint = read_state(run_dir).fingerprint
    if fingerprint is not None and fingerprint != manifest.fingerprint:
        raise UserError(
            f"{run_dir}: this run was trained on the data set {fingerprint}, and {place.data_dir} "
            f"is {manifest.fingerprint}; {advice}"
        )


def is_trained(place: Place, cell: Cell) -> bool:
    """Whether a cell has all its steps."""
    return read_state(place.run_dir(cell)).status == "done"


def evaluation_of(place: Place, cell: Cell) -> EvaluationResult | None:
    """What a cell was measured to be after its last step; None where that was not done yet."""
    return read_result(place.run_dir(cell), cell.recipe.total_steps)


def is_evaluated(place: Place, cell: Cell) -> bool:
    """Whether a cell was measured, its documents too, which older evaluations did not keep."""
    if evaluation_of(place, cell) is None:
        return False
    return documents_path(place.run_dir(cell) / EVALUATION_NAME).is_file()


def documents_of(place: Place, name: str) -> DocumentScores | None:
    """What each validation document gave under a cell's model; None where that was not kept.

    Raises UserError for a damaged file.
    """
    path = documents_path(place.output_dir / CELLS_NAME / name / EVALUATION_NAME)
    return read_documents(path) if path.is_file() else None

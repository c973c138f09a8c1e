"""What a comparison leaves in its directory, and prints.

comparison.json    every figure: pretrain/comparing/comparison.py
comparison.md      the same in tables and sentences
comparison.html    the report of all cells, their curves in bands over seeds
gap_over_*.png     and .svg, where tokens or size vary: pretrain/comparing/gap.py
"""

import base64
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

from data_prep.errors import RetryableError, UserError
from data_prep.files import write_durably
from data_prep.manifest import load_manifest
from pretrain.comparing.cells import Place
from pretrain.comparing.comparison import (
    Comparison,
    Missing,
    read_comparison,
    write_comparison,
)
from pretrain.comparing.gap import draw_gaps
from pretrain.comparing.matching import match_cells
from pretrain.comparing.matrix import Matrix
from pretrain.comparing.measured import measure_all
from pretrain.comparing.summary import summarise
from pretrain.comparing.words import findings_of, markdown_of, reservations_of, sections_of
from pretrain.reporting.page import report_page
from pretrain.reporting.reading import read_runs
from pretrain.reporting.words import Image

MARKDOWN_NAME = "comparison.md"
PAGE_NAME = "comparison.html"
# For intervals, figures and the page: those of the extra `compare`.
PACKAGES = ("scipy", "matplotlib", "uplot")


def check_packages(output_dir: Path) -> None:
    """Raise UserError where results could not be made or written after hours of training."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"the result of a comparison needs {name}, which is missing; "
                "pip install 'tablefree[compare]' installs it"
            )
    read_comparison(output_dir)  # or it is somebody else's file


def compare_cells(matrix: Matrix, place: Place, failed: Mapping[str, str]) -> Comparison:
    """All that the cells show. Raises RetryableError where none has figures."""
    figures = measure_all(place, matrix.cells)
    names = [cell.name for cell in figures]
    if not names:
        first = next(iter(failed.values()), "no cell has a loss that is a number")
        raise RetryableError(f"{place.output_dir}: no cell has figures: {first}")
    missing = []
    for cell in matrix.cells:
        if cell.name not in names:
            why = failed.get(cell.name, "its loss is no number")
            missing.append(Missing(name=cell.name, why=why))
    return Comparison(
        recipe=matrix.recipe_name,
        data_dir=str(place.data_dir),
        fingerprint=load_manifest(place.data_dir).fingerprint,
        keys=matrix.keys,
        treatment=matrix.treatment,
        baseline=matrix.baseline,
        cells=tuple(figures),
        missing=tuple(missing),
        groups=tuple(summarise(matrix, place, figures)),
        matches=tuple(match_cells(matrix, names, place)),
    )


def data_url(png: bytes) -> str:
    """An image as a page holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def write_results(matrix: Matrix, place: Place, failed: Mapping[str, str]) -> Comparison:
    """Write all files, and print what the numbers support."""
    comparison = compare_cells(matrix, place, failed)
    output_dir = place.output_dir
    gaps = draw_gaps(comparison, output_dir)
    write_comparison(comparison, output_dir)
    markdown = markdown_of(comparison, [gap.name for gap in gaps])
    write_durably(output_dir / MARKDOWN_NAME, markdown.encode())
    names = {cell.name for cell in comparison.cells}
    paths = [place.run_dir(cell) for cell in matrix.cells if cell.name in names]
    runs = read_runs(paths, [place.data_dir])
    images = [Image(title=gap.title, source=data_url(gap.png)) for gap in gaps]
    title = f"Comparison of {comparison.recipe}"
    page = report_page(runs, sections_of(comparison, images), title)
    write_durably(output_dir / PAGE_NAME, page.encode(errors="backslashreplace"))
    for missing in comparison.missing:
        if missing.name in failed:  # which is said of all together
            continue
        print(f"note: {missing.name} has no figures: {missing.why}", file=sys.stderr)
    for group in comparison.groups:
        found = findings_of(comparison, group)
        for sentence in found.sentences:
            print(f"{found.title}: {sentence}")
    for sentence in reservations_of(comparison):
        print(sentence)
    print(output_dir / MARKDOWN_NAME)
    return comparison

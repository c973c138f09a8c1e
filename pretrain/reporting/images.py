"""The charts of a report as images for papers: one file for each, drawn by matplotlib."""

import functools
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import UserError, install_advice
from data_prep.files import write_durably
from pretrain.metrics.step_columns import Floats, Groups, Integers
from pretrain.reporting.charts import (
    Curves,
    DrawnRun,
    draw_bands,
    draw_run,
    figures_drawn,
    group_size,
    last_step,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES = (5.5, 3.4)  # a column of a page, or half of a wide one
DOTS_PER_INCH = 200
MILLION = 1e6
STYLE = "report.css"  # whose colours runs have on the page
COLOUR = re.compile(r"--c\d: (#[0-9a-f]{6});")
COLOURS = 8  # of light paper, which come first there
DASHES = ("-", (0, (6, 4)), (0, (2, 3)))  # of runs that no colour is left for, as in report.js


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure against tokens."""

    name: str  # of its file
    figure: str  # as figures_drawn names it
    label: str
    is_bits: bool = False  # a loss as bits per byte


CHARTS = (
    Chart(name="loss", figure="loss", label="loss (nats a token)"),
    Chart(name="bits_per_byte", figure="loss", label="bits per byte", is_bits=True),
    Chart(name="gradient_norm", figure="gradient_norm", label="gradient norm"),
    Chart(name="learning_rate", figure="learning_rate", label="learning rate"),
    Chart(name="tokens_per_s", figure="tokens_per_s", label="tokens/s"),
    Chart(name="seconds", figure="step_s", label="seconds a step"),
    Chart(name="memory", figure="memory", label="peak memory of rank 0 (GB)"),
    Chart(name="mfu", figure="mfu", label="model-FLOPs utilisation (%)"),
    Chart(
        name="mfu_of_matmul",
        figure="mfu_of_matmul",
        label="speed against a measured matrix product (%)",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What stands on every chart."""

    runs: Sequence[Curves]
    bands: Sequence[DrawnRun]  # over runs of several seeds
    size: int  # of a group of steps


def drawing_of(runs: Sequence[Curves]) -> Drawing:
    """Runs in groups of the same steps, and their bands."""
    size = group_size(max(last_step(run.steps) for run in runs), len(runs))
    drawn = [draw_run(run, size) for run in runs]
    return Drawing(runs=runs, bands=draw_bands(runs, drawn), size=size)


def new_figure() -> "Figure":
    """An empty figure. Raises UserError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError(
            "--png and --svg are drawn by matplotlib, which is missing; "
            f"{install_advice('report')} installs it"
        ) from None
    return Figure(figsize=INCHES, layout="constrained")


def nats_to(chart: Chart, bytes_per_token: Floats) -> Floats:
    """By what losses are multiplied to stand on a chart's axis."""
    if not chart.is_bits:
        return np.ones_like(bytes_per_token)
    return 1.0 / (math.log(2) * bytes_per_token)


@functools.cache
def page_colours() -> list[str]:
    """Colours of runs, as on the page."""
    style = Path(__file__).with_name(STYLE).read_text(encoding="utf-8")
    return COLOUR.findall(style)[:COLOURS]


def colour_of(number: int) -> str:
    """The colour of a run by its number, as report.js gives it."""
    return page_colours()[number % COLOURS]


def lone_places(values: Floats) -> Integers:
    """Places of the values with none on either side, which a line through them does not show."""
    is_there = np.pad(np.isfinite(values), 1)
    is_lone = is_there[1:-1] & ~is_there[:-2] & ~is_there[2:]
    return np.flatnonzero(is_lone)


def draw_line(axes: "Axes", chart: Chart, drawing: Drawing, number: int) -> None:
    """Draw one run: means of groups of steps, and a shade from the least to the greatest."""
    run = drawing.runs[number]
    steps = run.steps
    values = figures_drawn(steps).get(chart.figure)
    if len(steps) == 0 or values is None:
        return
    groups = Groups(steps=steps, size=drawing.size)
    tokens = groups.last(steps.column("tokens")) / MILLION
    ratios = run.ratios_at(np.arange(len(steps)), is_validation=False)
    scaled = values * nats_to(chart, ratios)
    colour = colour_of(number)
    dash = DASHES[number // COLOURS % len(DASHES)]
    mean = groups.mean(scaled)
    axes.plot(tokens, mean, linewidth=1.0, color=colour, linestyle=dash, label=run.name)
    lone = lone_places(mean)
    axes.plot(tokens[lone], mean[lone], "o", markersize=2.5, color=colour)
    if drawing.size > 1:
        low = groups.least(scaled)
        high = groups.most(scaled)
        axes.fill_between(tokens, low, high, alpha=0.2, linewidth=0, color=colour)
    if chart.figure != "loss":
        return
    validated = np.flatnonzero(~np.isnan(steps.column("val_loss")))
    if len(validated):
        factor = nats_to(chart, run.ratios_at(validated, is_validation=True))
        at = steps.column("tokens")[validated] / MILLION
        of_validation = steps.column("val_loss")[validated] * factor
        own = colour_of(1) if len(drawing.runs) == 1 else colour
        label = f"{run.name}, validation"
        axes.plot(at, of_validation, "--", linewidth=1.0, color=own, label=label)


def draw_seeds(axes: "Axes", chart: Chart, drawing: Drawing) -> None:
    """Draw the mean loss over runs that only the seed tells apart, and between which they lie."""
    if chart.figure != "loss":
        return
    for place, band in enumerate(drawing.bands):
        colour = colour_of(len(drawing.runs) + place)
        # one ratio, or one for each point; None becomes NaN
        factor = nats_to(chart, np.array(band.bytes_per_token, np.float64))
        loss = band.series["loss"]
        tokens = np.array(band.places.tokens, np.float64) / MILLION
        # None becomes NaN, which is a gap
        mean = np.array(loss.mean, np.float64) * factor
        low = np.array(loss.low, np.float64) * factor
        high = np.array(loss.high, np.float64) * factor
        axes.plot(tokens, mean, linewidth=1.4, color=colour, label=band.name)
        axes.fill_between(tokens, low, high, alpha=0.25, linewidth=0, color=colour)


def is_known(chart: Chart, runs: Sequence[Curves]) -> bool:
    """Whether any run has what a chart shows; of bits per byte, whether all have its bytes."""
    if chart.is_bits:
        for run in runs:
            if not (run.bytes_per_token and run.validation_bytes_per_token):
                return False
    for run in runs:
        values = figures_drawn(run.steps).get(chart.figure)
        if values is not None and np.isfinite(values).any():
            return True
    return False


def draw_figures(
    runs: Sequence[Curves], folder: Path, suffix: str, *, is_bits_only: bool
) -> list[Path]:
    """Write each chart of some runs into a folder; the files, in order. A chart of which no run
    has a figure is left out, and so are nats a token of runs whose tokens are not the same.

    `suffix` is that of a format of matplotlib's, `.png` or `.svg`. Raises UserError where it is not
    installed.
    """
    drawing = drawing_of(runs)
    written = []
    for chart in CHARTS:
        is_nats = chart.figure == "loss" and not chart.is_bits
        if (is_nats and is_bits_only) or not is_known(chart, runs):
            continue
        figure = new_figure()
        axes = figure.add_subplot()
        for number in range(len(runs)):
            draw_line(axes, chart, drawing, number)
        draw_seeds(axes, chart, drawing)
        axes.set_xlabel("tokens (millions)")
        axes.set_ylabel(chart.label)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
        content = io.BytesIO()
        figure.savefig(content, format=suffix.removeprefix("."), dpi=DOTS_PER_INCH)
        path = folder / f"{chart.name}{suffix}"
        write_durably(path, content.getvalue())
        written.append(path)
    return written

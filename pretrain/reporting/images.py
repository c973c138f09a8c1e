"""The charts of a report as images for papers: one file for each, drawn by matplotlib."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import UserError, install_advice
from data_prep.files import write_durably
from pretrain.metrics.step_columns import Groups
from pretrain.reporting.charts import Curves, figures_drawn, group_size, last_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES = (5.5, 3.4)  # a column of a page, or half of a wide one
DOTS_PER_INCH = 200
MILLION = 1e6


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
)


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


def nats_to(chart: Chart, bytes_per_token: float | None) -> float:
    """By what a loss is multiplied to stand on a chart's axis."""
    if not chart.is_bits or bytes_per_token is None:
        return 1.0
    return 1.0 / (math.log(2) * bytes_per_token)


def draw_run(axes: "Axes", chart: Chart, run: Curves, size: int) -> None:
    """Draw one run: means of groups of steps, and a shade from the least to the greatest."""
    steps = run.steps
    values = figures_drawn(steps).get(chart.figure)
    if len(steps) == 0 or values is None:
        return
    groups = Groups(steps=steps, size=size)
    tokens = groups.last(steps.column("tokens")) / MILLION
    scaled = values * nats_to(chart, run.bytes_per_token)
    (line,) = axes.plot(tokens, groups.mean(scaled), linewidth=1.0, label=run.name)
    if size > 1:
        low = groups.least(scaled)
        high = groups.most(scaled)
        axes.fill_between(tokens, low, high, alpha=0.2, linewidth=0, color=line.get_color())
    if chart.figure != "loss":
        return
    validated = np.flatnonzero(~np.isnan(steps.column("val_loss")))
    if len(validated):
        factor = nats_to(chart, run.validation_bytes_per_token)
        at = steps.column("tokens")[validated] / MILLION
        of_validation = steps.column("val_loss")[validated] * factor
        colour = line.get_color()
        label = f"{run.name}, validation"
        axes.plot(at, of_validation, "--", linewidth=1.0, color=colour, label=label)


def is_known(chart: Chart, runs: Sequence[Curves]) -> bool:
    """Whether any run has what a chart shows; of bits per byte, whether all have."""
    if chart.is_bits:
        return all(run.bytes_per_token and run.validation_bytes_per_token for run in runs)
    return any(chart.figure in figures_drawn(run.steps) for run in runs)


def draw_figures(runs: Sequence[Curves], folder: Path, suffix: str) -> list[Path]:
    """Write each chart of some runs into a folder; the files, in order.

    `suffix` is that of a format of matplotlib's, `.png` or `.svg`. Raises UserError where it is not
    installed.
    """
    size = group_size(max(last_step(run.steps) for run in runs), len(runs))
    written = []
    for chart in CHARTS:
        if not is_known(chart, runs):
            continue
        figure = new_figure()
        axes = figure.add_subplot()
        for run in runs:
            draw_run(axes, chart, run, size)
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

"""How the gap between treatments and baseline goes over tokens and over size: images.

    gap_over_tokens.png, .svg        where groups differ in the tokens that they trained on
    gap_over_parameters.png, .svg    where they differ in size; an input table is not counted

Each line joins groups that differ in nothing else. A band is the t interval over seeds.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from data_prep.files import write_durably
from pretrain.comparing.comparison import Comparison, Difference, Group
from pretrain.comparing.matrix import Settings, show_value
from pretrain.comparing.words import settings_words
from pretrain.reporting.images import DOTS_PER_INCH, new_figure
from pretrain.reporting.words import large

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_KEYS = frozenset({"model.d_model", "model.num_layers", "model.num_heads"})
SHADE = 0.2
MOST_LABELS = 8  # side by side below an axis


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What a gap is drawn over."""

    name: str  # of the file
    label: str
    keys: frozenset[str]  # that place a group on it

    def place(self, group: Group) -> int:
        """Where a group lies."""
        return group.train_tokens if "train_tokens" in self.keys else group.parameters


AXES = (
    Axis(
        name="gap_over_tokens",
        label="tokens trained on",
        keys=frozenset({"train_tokens"}),
    ),
    Axis(
        name="gap_over_parameters",
        label="parameters, without an input table",
        keys=SIZE_KEYS,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A treatment's gap in one group."""

    at: int
    difference: Difference


@dataclass(frozen=True, kw_only=True)
class Line:
    """A treatment's gaps over groups that an axis tells apart."""

    label: str
    points: tuple[Point, ...]  # in order of the axis


def lines_over(axis: Axis, comparison: Comparison) -> list[Line]:
    """A line for each treatment and what else varies; none where the axis has one place."""
    points: dict[str, list[Point]] = {}
    for group in comparison.groups:
        others: Settings = {
            key: value for key, value in group.settings.items() if key not in axis.keys
        }
        for one in group.differences:
            names = [show_value(one.value), settings_words(others)]
            label = ", ".join(filter(None, names))
            points.setdefault(label, []).append(Point(at=axis.place(group), difference=one))
    lines = []
    for label, of_line in points.items():
        in_order = sorted(of_line, key=lambda point: point.at)
        if in_order[0].at < in_order[-1].at:
            lines.append(Line(label=label, points=tuple(in_order)))
    return lines


@dataclass(frozen=True, kw_only=True)
class Gap:
    """An image of gaps, as it was written."""

    name: str  # of its PNG file
    title: str
    png: bytes


def draw_gaps(comparison: Comparison, folder: Path) -> list[Gap]:
    """Write the images that there is something for.

    Raises UserError where matplotlib is not installed, OSError where a file can't be written.
    """
    gaps = []
    for axis in AXES:
        lines = lines_over(axis, comparison)
        if not lines:
            continue
        png = draw(axis, comparison, lines, "png")
        svg = draw(axis, comparison, lines, "svg")
        write_durably(folder / f"{axis.name}.png", png)
        write_durably(folder / f"{axis.name}.svg", svg)
        title = f"Loss less that of {show_value(comparison.baseline)}, over {axis.label}"
        gaps.append(Gap(name=f"{axis.name}.png", title=title, png=png))
    return gaps


def draw(axis: Axis, comparison: Comparison, lines: Sequence[Line], kind: str) -> bytes:
    """One image, of a format that matplotlib knows."""
    figure = new_figure()
    axes = figure.add_subplot()
    for line in lines:
        draw_line(axes, line)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    places = apart_enough(sorted({point.at for line in lines for point in line.points}))
    axes.set_xticks(places, labels=[large(place) for place in places])
    axes.minorticks_off()
    axes.set_xlabel(axis.label)
    axes.set_ylabel(f"loss less that of {show_value(comparison.baseline)} (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    score = comparison.cells[0].score
    # The same text of the same tokenizer for all: bits per byte are nats times a number.
    bits_of_nat = score.bits_per_byte / score.loss

    def to_bits(nats: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return np.asarray(nats, np.float64) * bits_of_nat

    def to_nats(shown: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return np.asarray(shown, np.float64) / bits_of_nat

    bits = axes.secondary_yaxis("right", functions=(to_bits, to_nats))
    bits.set_ylabel("bits per byte")
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=DOTS_PER_INCH)
    return content.getvalue()


def apart_enough(places: Sequence[int]) -> list[int]:
    """Those of the places of points, in order, that a label fits below on a logarithmic axis."""
    width = math.log(places[-1] / places[0]) / MOST_LABELS
    kept = [places[0]]
    for place in places[1:]:
        if math.log(place / kept[-1]) >= width:
            kept.append(place)
    return kept


def draw_line(axes: "Axes", line: Line) -> None:
    """Points, and the band of those that have an interval."""
    places = [point.at for point in line.points]
    gaps = [point.difference.loss for point in line.points]
    (drawn,) = axes.plot(places, gaps, marker="o", markersize=3, linewidth=1, label=line.label)
    banded = [point for point in line.points if point.difference.over_seeds]
    low = []
    high = []
    for point in banded:
        test = point.difference.over_seeds
        if test is not None:
            low.append(test.interval.low)
            high.append(test.interval.high)
    at = [point.at for point in banded]
    colour = drawn.get_color()
    axes.fill_between(at, low, high, alpha=SHADE, linewidth=0, color=colour)

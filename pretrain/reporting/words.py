"""Tables and texts of a report, and figures in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.errors import printable
from pretrain.reporting.reported_run import ReportedRun

MOST_ROWS = 100  # of a table of what happened
MOST_TEXT = 400  # characters of a sample that are shown
NOT_KNOWN = "–"  # noqa: RUF001  # an empty cell, as tables are set
UNITS = {"E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}

Cells = dict[str, str]  # by name of the row


@dataclass(frozen=True, kw_only=True)
class Table:
    """Words in rows and columns."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Image:
    """A picture that the page itself holds."""

    title: str
    source: str  # a data: URL


@dataclass(frozen=True, kw_only=True)
class Text:
    """Lines to be read or copied as they are."""

    title: str
    content: str
    is_open: bool = False


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A row of a chart of bars."""

    name: str
    width: str  # in CSS
    words: str


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A table whose rows are bars."""

    title: str
    bars: Sequence[Bar]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ShownSample:
    """What a model made of a prompt."""

    prompt: str
    text: str
    bits_per_byte: str


@dataclass(frozen=True, kw_only=True)
class ShownStep:
    """The samples after a step."""

    words: str
    samples: Sequence[ShownSample]
    is_printed: bool  # stands there on paper, and where no script runs


@dataclass(frozen=True, kw_only=True)
class SampledRun:
    """The samples of a run, of which one step is shown at a time."""

    name: str
    steps: Sequence[ShownStep]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page under a heading."""

    title: str
    sampled: Sequence[SampledRun] = field(default=())
    bars: Sequence[Bars] = field(default=())
    tables: Sequence[Table] = field(default=())
    images: Sequence[Image] = field(default=())
    texts: Sequence[Text] = field(default=())

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing under the heading."""
        return not (self.sampled or self.tables or self.bars or self.texts)


def large(value: float) -> str:
    """A large number in words, such as 12.3 G."""
    for name, unit in UNITS.items():
        if value >= unit:
            return f"{value / unit:.4g} {name}"
    return f"{value:.4g}"


def figure(value: float | None, form: str = ".4f") -> str:
    """A figure in its form, or the sign of one that isn't known."""
    if value is None or not math.isfinite(value):
        return NOT_KNOWN
    return format(value, form)


def share(part: float, whole: float) -> str:
    """A part of a whole."""
    if whole == 0:
        return NOT_KNOWN
    return f"{part / whole:.1%}"


def newest_of(rows: Sequence[Sequence[str]]) -> str:
    """What is said under a table that shows the newest rows alone."""
    if len(rows) <= MOST_ROWS:
        return ""
    return f"The newest {MOST_ROWS} of {len(rows):,}."


def by_run(title: str, runs: Sequence[ReportedRun], of_runs: Sequence[Cells], note: str) -> Table:
    """A table of a row for each figure and a column for each run."""
    header = [""]
    header += [run.name for run in runs]
    rows = []
    for name in of_runs[0]:
        row = [name]
        row += [cells[name] for cells in of_runs]
        rows.append(row)
    return Table(title=title, header=header, rows=rows, note=note)


def shortened(text: str) -> str:
    """The beginning of a sample's text."""
    shown = printable(text[:MOST_TEXT])
    if len(text) > MOST_TEXT:
        shown += "…"
    return shown


def dotted(content: dict[str, object], prefix: str = "") -> Cells:
    """A recipe's values by dotted key."""
    values: Cells = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            values |= dotted(value, f"{key}.")
        else:
            values[key] = value_words(value)
    return values


def value_words(value: object) -> str:
    """A value of a recipe as people write it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value is None else str(value)

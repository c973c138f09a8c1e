"""The report of one run or of several: a page of HTML that holds all it shows.

Figures become words here; the template only places them, and the script beside it draws.
"""

import base64
import hashlib
import importlib.util
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from data_prep.errors import UserError, install_advice
from pretrain.reporting.charts import draw_charts
from pretrain.reporting.data_tables import data_section, evaluation
from pretrain.reporting.reported_run import ReportedRun, bytes_per_token, curves_of
from pretrain.reporting.samples import samples_section
from pretrain.reporting.tables import (
    compared,
    environment,
    happened,
    overview,
    recipes,
    reproduction,
)
from pretrain.reporting.words import Section
from pretrain.run.starts import version_of
from pretrain.view.templates import render

# By which a page is known for one of ours, near its beginning.
MADE_BY = b'<meta name="generator" content="tablefree '
BEGINNING = 4_096  # bytes of a file in which that is looked for
LIBRARY = "uplot"  # the package that holds the chart library's script and style


def library_file(name: str) -> str:
    """A file of the chart library. Raises UserError where its package is not installed."""
    found = importlib.util.find_spec(LIBRARY)
    if found is None or found.origin is None:
        raise UserError(
            "a report is drawn by uPlot, whose package is missing; "
            f"{install_advice('report')} installs it"
        )
    path = Path(found.origin).parent / "static" / name
    return path.read_text(encoding="utf-8")


def is_report(path: Path) -> bool:
    """Whether a file is a page that this module made."""
    with path.open("rb") as file:
        return MADE_BY in file.read(BEGINNING)


def own_file(name: str) -> str:
    """A file of the page that lies beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def one_axis_of_loss(runs: Sequence[ReportedRun]) -> str | None:
    """What is said where runs of different vocabularies share an axis: bits per byte alone.

    Raises UserError where these are not known of all of them.
    """
    tokenizers = {run.tokenizer or str(run.recipe.model.vocab_size) for run in runs}
    if len(tokenizers) == 1:
        return None
    for run in runs:
        if not bytes_per_token(run).is_known:
            raise UserError(
                f"{run.path}: these runs have different vocabularies, whose losses can be compared "
                "as bits per byte alone, and the bytes a token of this one are not known; give "
                "--data-dir with its data set, or report it by itself"
            )
    return (
        "These runs have different vocabularies, so a token is not the same to them: losses are "
        "drawn as bits per byte, which can be compared."
    )


def notes_of(runs: Sequence[ReportedRun]) -> list[str]:
    """What is missing, said once where it is the same for several runs."""
    named: dict[str, list[str]] = {}
    for run in runs:
        for note in run.notes:
            named.setdefault(note, []).append(run.name)
    lines = []
    for note, names in named.items():
        lines.append(f"{', '.join(names)}: {note}")
    return lines


def hash_of(script: str) -> str:
    """By which a page's policy allows a script, and no other."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def policy_of(scripts: Sequence[str]) -> str:
    """What a browser is to allow the page: its own scripts, and nothing from elsewhere."""
    hashes = " ".join(hash_of(script) for script in scripts)
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}; img-src data:"


def report_page(
    runs: Sequence[ReportedRun], first: Sequence[Section] = (), title: str | None = None
) -> str:
    """The whole page; `first` are sections before those of the runs, and their names are its title
    where there is no other.

    Raises UserError where the runs can't stand on one page.
    """
    bits_only = one_axis_of_loss(runs)
    curves = [curves_of(run) for run in runs]
    charts = draw_charts(curves, is_bits_only=bits_only is not None)
    library = library_file("uPlot.iife.js")
    axes = own_file("axes.js")
    script = own_file("report.js")
    of_sections = own_file("sections.js")
    style = library_file("uPlot.min.css") + own_file("report.css")
    sections = [
        samples_section(runs),
        compared(runs),
        happened(runs),
        evaluation(runs),
        data_section(runs),
        recipes(runs),
        environment(runs),
        reproduction(runs),
    ]
    kinds = {mark.kind for run in curves for mark in run.marks}
    notes = notes_of(runs)
    if bits_only is not None:
        notes.insert(0, bits_only)
    # compactly, with < and > spelled out, so that no name ends the script it stands in
    figures = htmlsafe_json_dumps(asdict(charts), separators=(",", ":"))
    return render(
        "report.html.jinja",
        title=title or ", ".join(run.name for run in runs),
        first=[section for section in first if not section.is_empty],
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=version_of("tablefree"),
        notes=notes,
        kinds=sorted(kinds),
        policy=policy_of([library, axes, script, of_sections]),
        style=Markup(style),
        library=Markup(library),
        axes=Markup(axes),
        script=Markup(script),
        script_of_sections=Markup(of_sections),
        charts=figures,
        overview=overview(runs),
        sections=[section for section in sections if not section.is_empty],
    )

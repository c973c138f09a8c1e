"""Pages of pretrain.report: making them, reading them, and looking at them in a browser."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain import report
from pretrain.metrics.step_columns import FIGURES, Floats, StepColumns

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

MEGABYTE = 10**6
TOKENS = 1_000  # of a step of columns_of
EVIL = "<script>document.title='obeyed'</script>"


def page_of(output: Path, *runs: Path, flags: tuple[str, ...] = ()) -> str:
    """The page of some runs, made in this process."""
    report.main([*map(str, runs), "--output", str(output), *flags])
    return output.read_text(encoding="utf-8")


def columns_of(losses: Floats) -> StepColumns:
    """A run of these losses, as it is read back."""
    table = np.full((len(losses), len(FIGURES)), np.nan)
    table[:, FIGURES.index("step")] = np.arange(len(losses))
    table[:, FIGURES.index("tokens")] = (np.arange(len(losses)) + 1) * TOKENS
    table[:, FIGURES.index("loss")] = losses
    return StepColumns(table=table)


def figures_in(page: str) -> dict[str, Any]:
    """What the page's script draws."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)
    assert found
    figures: dict[str, Any] = json.loads(found[1])
    return figures


class Words(HTMLParser):
    """The text of a page outside of its scripts and styles, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.inside.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] not in ("script", "style"):
            self.cells.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.cells)


def look_at(browser: "Browser", path: Path, **options: Any) -> tuple["Page", list[str]]:
    """A page as a browser shows it, and a list of all that it complains of or asks for."""
    page = browser.new_context(**options).new_page()
    seen: list[str] = []
    page.on("console", lambda message: seen.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: seen.append(f"error: {error}"))
    page.on("request", lambda request: seen.append(f"request: {request.url}"))
    page.goto(path.as_uri())  # until all is loaded, and drawn: the script runs before that
    seen.remove(f"request: {path.as_uri()}")
    return page, seen


def readout(page: "Page", chart: str = "loss") -> str:
    """What stands under a chart."""
    return page.inner_text(f"#chart-{chart} .legend")

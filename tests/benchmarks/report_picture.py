"""Draws the README's picture of a report: the top of the page, as a browser shows it.

    python tests/benchmarks/report_picture.py RUN_DIR... pretrain/pictures/report.png \\
        [--width 1120] [--height 800] [--from curves]

`--from` names the heading where the picture begins (overview, curves, section-1 and so on).
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from support.browser import chromium
from support.reports import page_of

MARGIN = 12  # pixels above the heading
COLOURS = 256  # few, so few bytes


def main(flags: argparse.Namespace) -> None:
    """Report the runs, look at the page, keep what is seen."""
    with tempfile.TemporaryDirectory() as home, chromium() as browser:
        path = Path(home) / "report.html"
        page_of(path, *flags.runs)
        size = {"width": flags.width, "height": flags.height}
        page = browser.new_context(viewport=size).new_page()
        page.goto(path.as_uri())
        top = page.locator(f"#{flags.heading}").evaluate("e => e.getBoundingClientRect().top")
        page.evaluate("y => scrollTo(0, y)", top - MARGIN)
        seen = Image.open(io.BytesIO(page.screenshot()))
    few = seen.convert("RGB").quantize(COLOURS, Image.Quantize.FASTOCTREE)
    few.save(flags.picture, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1120)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--from", dest="heading", default="curves")
    main(parser.parse_args())

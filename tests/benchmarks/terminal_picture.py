"""Draws the README's picture of a run on a terminal: a real run, on a real pseudo-terminal.

    pip install pillow
    python tests/benchmarks/terminal_picture.py DATASET RECIPE pretrain/pictures/terminal.png \\
        [--columns 100] [--steps 300] [--dotted.key=value ...]

What pyte's terminal shows after so many steps is drawn in DejaVu Sans Mono.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from support.runs import launch_training, steps_of
from support.terminals import Screen, running_on, screen
from support.waiting import wait_until

FONT = "/usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf"
FONT_SIZE = 15
LINE_HEIGHT = 19
MARGIN = 14
BACKGROUND = "#16181d"
COLOURS = {"default": "#d7dae0", "blue": "#6fa8dc", "brown": "#e2b55a"}  # pyte's yellow is brown
DIM = "#8a919e"


def rows_with_colours(there: Screen) -> list[list[tuple[str, str]]]:
    """Each character of the screen with its colour, down to the last row that has any."""
    rows = []
    for y in range(there.terminal.lines):
        row = there.terminal.buffer[y]
        cells = [row[x] for x in range(there.terminal.columns)]
        rows.append([(cell.data, COLOURS.get(cell.fg, DIM)) for cell in cells])
    while rows and not "".join(character for character, _ in rows[-1]).strip():
        rows.pop()
    return rows


def draw(rows: list[list[tuple[str, str]]], path: Path) -> None:
    """Write the picture."""
    font = ImageFont.truetype(FONT, FONT_SIZE)
    advance = font.getlength("x")
    size = (
        round(len(rows[0]) * advance) + 2 * MARGIN,
        len(rows) * LINE_HEIGHT + 2 * MARGIN,
    )
    image = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(image)
    for y, row in enumerate(rows):
        for x, (character, colour) in enumerate(row):
            place = (MARGIN + x * advance, MARGIN + y * LINE_HEIGHT)
            pen.text(place, character, fill=colour, font=font)
    # Few colours, so few bytes.
    image.quantize(32).save(path, optimize=True)


def main(flags: argparse.Namespace, overrides: list[str]) -> None:
    """Run, stop after so many steps, draw."""
    with tempfile.TemporaryDirectory() as home, screen(flags.columns, 40) as there:
        run_dir = Path("runs") / "small"
        dataset = flags.dataset.resolve()
        command = launch_training(1, flags.recipe, dataset, run_dir, *overrides)
        command = ["env", "-C", home, *command]
        run_dir = home / run_dir
        with running_on(there, command) as job:
            wait_until(lambda: steps_of(run_dir) >= flags.steps, "steps", 600.0, job=job)
            there.wait_for(lambda rows: "under way" not in "".join(rows), "the block")
            rows = rows_with_colours(there)
            job.send_signal(signal.SIGINT)
            job.wait(timeout=100)
    draw(rows, flags.picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("recipe")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--steps", type=int, default=300)
    main(*parser.parse_known_args())

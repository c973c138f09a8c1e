"""One page that explains a run, or several laid over one another.

    python -m pretrain.report RUN_DIR... [--output report.html] [--data-dir DATASET ...]
                              [--png DIR] [--svg DIR]

The page is one file, and asks for nothing elsewhere. What stands on it is in
pretrain/reporting/page.py, what its curves draw in pretrain/reporting/charts.py.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.commands import CommandParser, exit_code
from data_prep.errors import UserError

if TYPE_CHECKING:
    from pretrain.reporting.reported_run import ReportedRun

ABOUT = (
    "One file of HTML that explains a run, or several laid over one another: curves, cost, "
    "evaluation, data, recipe, environment, and the commands to do it again."
)
PAGE_SUFFIXES = (".html", ".htm")


def parse_arguments(arguments: Sequence[str] | None) -> Namespace:
    """The command line."""
    parser = CommandParser(prog="python -m pretrain.report", description=ABOUT)
    run_help = "directory of a run of pretrain.train, finished or not"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help=run_help)
    output_help = "the page to write (%(default)s)"
    parser.add_argument("--output", type=Path, default=Path("report.html"), help=output_help)
    data_help = "a data set that moved since training; once for each"
    parser.add_argument(
        "--data-dir", type=Path, action="append", default=[], metavar="DATASET", help=data_help
    )
    parser.add_argument("--png", type=Path, metavar="DIR", help="also write each chart as a PNG")
    parser.add_argument("--svg", type=Path, metavar="DIR", help="also write each chart as an SVG")
    return parser.parse_args(arguments)


def check_output(output: Path) -> None:
    """Raise UserError where no page may be written, or something else is."""
    from pretrain.reporting.page import is_report

    if output.suffix.lower() not in PAGE_SUFFIXES:
        raise UserError(f"--output {output}: not the name of a page; give one that ends in .html")
    if output.is_dir():
        raise UserError(f"--output {output}: is a directory; give the name of a file")
    if output.is_file() and not is_report(output):
        raise UserError(
            f"--output {output}: is there already and no report; give another name, or move it away"
        )


def check_flags(flags: Namespace) -> None:
    """Raise UserError for what can't be written or read, before a long file is read for it."""
    from pretrain.run.directory import is_run

    check_output(flags.output)
    for name, folder in (("--png", flags.png), ("--svg", flags.svg)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UserError(f"{name} {folder}: is a file; give a directory for the images")
    seen: dict[Path, Path] = {}
    for path in flags.runs:
        if path.is_file():
            raise UserError(f"{path}: is a file; give the directory of a run of pretrain.train")
        if not path.is_dir():
            raise UserError(f"{path}: no such directory; give one of a run of pretrain.train")
        if not is_run(path):
            raise UserError(f"{path}: no run of pretrain.train is there; give its --run-dir")
        if path.resolve() in seen:
            raise UserError(f"{path}: the same run as {seen[path.resolve()]}; give it once")
        seen[path.resolve()] = path


def write_figures(runs: Sequence["ReportedRun"], folders: dict[str, Path | None]) -> None:
    """Write each chart as an image into the folders that were asked for, by suffix; say which are
    left out.
    """
    from pretrain.reporting.page import one_axis_of_loss

    bits_only = one_axis_of_loss(runs)
    for suffix, folder in folders.items():
        if folder is None:
            continue
        # matplotlib, an extra, for those alone who ask for images
        from pretrain.reporting.images import draw_figures
        from pretrain.reporting.reported_run import curves_of

        curves = [curves_of(run) for run in runs]
        paths = draw_figures(curves, folder, suffix, is_bits_only=bits_only is not None)
        for path in paths:
            print(path)
        if not paths:
            print(f"note: {folder}: no image, since no step is on record", file=sys.stderr)
        elif bits_only is not None:
            print(f"note: {folder}: {bits_only}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    flags = parse_arguments(arguments)
    # These bring numpy and pydantic: nobody waits for them to see --help.
    from data_prep.files import write_durably
    from pretrain.reporting.compared import said_first
    from pretrain.reporting.page import report_page
    from pretrain.reporting.reading import read_runs, strangers

    check_flags(flags)
    runs = read_runs(flags.runs, flags.data_dir)
    page = report_page(runs)
    write_figures(runs, {".png": flags.png, ".svg": flags.svg})
    for run in runs:
        for note in run.notes:
            print(f"note: {run.path}: {note}", file=sys.stderr)
    for path in strangers(runs, flags.data_dir):
        print(f"note: --data-dir {path}: the data set of none of these runs", file=sys.stderr)
    # A path may hold bytes that are no text; they are spelled out.
    write_durably(flags.output, page.encode(errors="backslashreplace"))
    for run in runs:
        for line in said_first(run, is_alone=len(runs) == 1):
            print(line)
    print(flags.output)


if __name__ == "__main__":
    sys.exit(exit_code(main))

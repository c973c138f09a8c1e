"""Train a matrix of matched runs, and say what their differences show.

    python -m pretrain.compare --recipe R --data-dir DATASET --output-dir DIR \\
        --vary model.input_embedding=binary_code,affine_code,permuted_code,learned \\
        --vary seed=1,2,3 --baseline model.input_embedding=learned [--at-once N] \\
        [--dotted.key=value ...]

The same command goes on after any end, and adds cells where a --vary has grown. What is compared
with what says pretrain/comparing/matrix.py, how sure it is pretrain/comparing/significance.py.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.commands import exit_code, large_number
from data_prep.errors import UserError
from pretrain.config.recipe_parser import RecipeParser

if TYPE_CHECKING:
    from pretrain.comparing.matrix import Matrix

ABOUT = (
    "A matrix of matched runs over any recipe keys: figures, differences paired by seed, and how "
    "sure they are. The same command goes on, and adds cells where --vary has grown."
)
SIGNALLED = 128  # beside the number of a signal: an exit code, as shells have it


def build_parser() -> RecipeParser:
    """The command line; what it doesn't know must be a dotted recipe key."""
    more = "Any recipe key can be set for all cells with --dotted.key=value."
    parser = RecipeParser(prog="python -m pretrain.compare", description=ABOUT, epilog=more)
    parser.add_argument(
        "--recipe", required=True, metavar="NAME|FILE", help="a shipped recipe or a YAML file"
    )
    parser.add_argument(
        "--data-dir", required=True, type=Path, help="data set made by data_prep.build_shards"
    )
    parser.add_argument("--output-dir", required=True, type=Path, help="for cells and results")
    vary_help = "a key and its values; once for each key, seed among them"
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=V1,V2", help=vary_help)
    parser.add_argument(
        "--baseline", metavar="KEY=VALUE", help="what other values of that key are compared with"
    )
    parser.add_argument(
        "--at-once", type=large_number, default=1, metavar="N", help="cells (default %(default)s)"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="of a cell (default %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the matrix and its cost")
    parser.add_argument("--device", help="GPU that --dry-run estimates hours for, such as h200")
    parser.add_argument("--gpus", type=large_number, default=1, metavar="N", help="of a cell there")
    parser.add_argument("--price-per-gpu-hour", type=float, metavar="X", help="in any currency")
    return parser


def check_flags(flags: Namespace) -> None:
    """Raise UserError for flags that don't go together."""
    if flags.max_restarts < 0:
        raise UserError(f"--max-restarts {flags.max_restarts}: expected a number, 0 or more")
    if flags.device and not flags.dry_run:
        raise UserError("--device: belongs to --dry-run; cells train on this machine")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    flags, overrides = build_parser().parse_known_args(arguments)
    check_flags(flags)
    # These bring numpy: nobody waits for them to see --help.
    from pretrain.comparing.cost import dry_run_page, find_machine
    from pretrain.comparing.matrix import Asked, build_matrix

    asked = Asked(
        recipe=flags.recipe,
        data_dir=flags.data_dir,
        vary=tuple(flags.vary),
        baseline=flags.baseline,
        overrides=tuple(overrides),
    )
    matrix = build_matrix(asked)
    if flags.dry_run:
        machine = find_machine(flags.device, flags.gpus, flags.price_per_gpu_hour)
        print(dry_run_page(matrix, machine))
        return
    compare(flags, matrix)


def compare(flags: Namespace, matrix: "Matrix") -> None:
    """Train, evaluate and compare all cells. Raises UserError."""
    from data_prep.locks import lock
    from pretrain.comparing.cells import Place, check_place
    from pretrain.comparing.results import check_packages, write_results
    from pretrain.comparing.running import Runner, StoppedBySignal, share_of

    check_packages(flags.output_dir)
    place = Place(output_dir=flags.output_dir, data_dir=flags.data_dir, recipe=flags.recipe)
    share = share_of(flags.at_once)
    check_place(place, matrix.cells, share.gpus or 1)
    with lock(flags.output_dir, "comparing there", "--output-dir"):
        runner = Runner(place=place, share=share, max_restarts=flags.max_restarts)
        try:
            runner.run(matrix.cells)
        except StoppedBySignal as stopped:
            print(f"{flags.output_dir}: ended by {stopped}; the same command continues")
            sys.exit(SIGNALLED + stopped.number)
        write_results(matrix, place, runner.failed)
    if runner.failed:
        names = ", ".join(runner.failed)
        sys.exit(f"error: {flags.output_dir}: cells failed: {names}; the same command tries again")


if __name__ == "__main__":
    sys.exit(exit_code(main))

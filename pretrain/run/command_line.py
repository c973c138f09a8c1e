"""The flags of the training command. No torch: launch/pretrain.sh reads them too, before it
starts anything.
"""

import argparse
from pathlib import Path
from typing import Any

from data_prep.commands import large_number
from pretrain.config.recipe_parser import RecipeParser

ABOUT = "Train a recipe on a data set, or continue where the run stopped."


def build_parser() -> RecipeParser:
    """The command line; what it doesn't know must be a dotted recipe key."""
    epilog = (
        "Any recipe key can be set with --dotted.key=value, such as --batch.micro_batch_size=8."
    )
    parser = RecipeParser(prog="python -m pretrain.train", description=ABOUT, epilog=epilog)
    parser.add_argument(
        "--recipe", required=True, metavar="NAME|FILE", help="a shipped recipe or a YAML file"
    )
    parser.add_argument(
        "--data-dir", required=True, type=Path, help="data set made by data_prep.build_shards"
    )
    parser.add_argument(
        "--run-dir", required=True, type=Path, help="where the run lives; the same one continues it"
    )
    names = ("--deepspeed-config", "--deepspeed_config")
    default = "the one that the run began with, or the recipe's engine key"
    parser.add_argument(*names, metavar="NAME|FILE", help=f"DeepSpeed JSON (default: {default})")
    steps: dict[str, Any] = {"type": large_number, "metavar": "N"}
    parser.add_argument(
        "--stop-at-step", **steps, help="save and stop after N steps of the whole run"
    )
    parser.add_argument(
        "--branch-from", type=Path, metavar="CHECKPOINT", help="begin with another run's step-N"
    )
    parser.add_argument(
        "--profile", **steps, help="profile N steps: a trace, and the ten largest costs"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be trained, and end"
    )
    parser.add_argument("--quiet", action="store_true", help="say only what needs attention")
    # The deepspeed launcher appends it.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser

"""What was asked for of a run that is supervised: the flags of launch/pretrain.sh."""

from dataclasses import dataclass
from pathlib import Path

from data_prep.commands import large_number
from data_prep.errors import UserError
from pretrain.config.recipe_parser import RecipeParser
from pretrain.run.command_line import build_parser

DESCRIPTION = "Keeps a training run going: starts it, ends it well, starts it again when it failed."


@dataclass(frozen=True, kw_only=True)
class Job:
    """What was asked for."""

    recipe: str
    data_dir: Path
    run_dir: Path
    ranks: int | None = None  # on this machine; None: as many as suit it
    hostfile: Path | None = None  # None: Slurm's allocation, or this machine
    max_restarts: int = 0
    requeue: bool = False  # have Slurm queue the job again when its time is up
    trainer_flags: list[str]  # all those of pretrain.train


def parse(arguments: list[str] | None = None) -> Job:
    """The flags that matter here, and all those of pretrain.train. Raises UserError."""
    parser = RecipeParser(
        passed_on=build_parser().flags(), prog="launch/pretrain.sh", description=DESCRIPTION
    )
    # The hostfile's slots say how many ranks there are.
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--ranks", type=large_number, metavar="N", help="on this machine (default: its GPUs, or 2)"
    )
    where.add_argument(
        "--hostfile", type=Path, metavar="F", help="a line for each machine, as node1 slots=8"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="after failures (%(default)s)"
    )
    parser.add_argument(
        "--requeue", action="store_true", help="under Slurm: queue the job again when warned"
    )
    trainers = "as pretrain.train has it, with all its other flags"
    for name in ("--recipe", "--data-dir", "--run-dir"):
        parser.add_argument(name, required=True, help=trainers)
    flags, others = parser.parse_known_args(arguments)
    if flags.max_restarts < 0:
        raise UserError(f"--max-restarts {flags.max_restarts}: expected a number, 0 or more")
    required = ["--recipe", flags.recipe, "--data-dir", flags.data_dir, "--run-dir", flags.run_dir]
    return Job(
        recipe=flags.recipe,
        data_dir=Path(flags.data_dir),
        run_dir=Path(flags.run_dir),
        ranks=flags.ranks,
        hostfile=flags.hostfile,
        max_restarts=flags.max_restarts,
        requeue=flags.requeue,
        trainer_flags=required + others,
    )

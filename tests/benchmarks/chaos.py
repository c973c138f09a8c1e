"""A run under SIGKILLs, full disks, flipped bytes and changes of world size, held against the same
run unbroken.

    python tests/benchmarks/chaos.py [--kills 40] [--flips 4] [--full-disks 3] [--changes 6]
        [--seed 1] [--ranks 2] [--launcher forked|pretrain] [--recipe R] [--data-dir D] [--verbose]
        [--quick]

The run is trained once unbroken; then the same command is killed at random moments (in a step, in a
save, while it loads), whole or one rank alone, and started again until it is done. Two further legs
go the first part of the same way: one on a small disk that fills up during saves, one on another
number of ranks after each kill.

After every fault the newest checkpoint must be readable and no older than the last one published,
metrics.jsonl must hold one line for each step, and every line's loss, gradient norm and validation
figures must be bitwise those of the unbroken run, however often the step was trained. At the end so
must every tensor of the last checkpoint (in the leg of other world sizes losses are compared,
within 1e-4 relative). After the kill of one rank the others must end by themselves within 15 s.
Only where ranks die before they have met does the runner, in the place of a launcher that the
forked ranks lack, end the others; these are counted.

With --recipe the model is the recipe's; its steps are as many as the faults need, of as few windows
as divide over the ranks, with a save every 5. Flags such as --checkpoints.every_steps=10 say
otherwise. A checkpoint has 12 bytes a parameter; the disk that fills up, in memory, holds four of
them.

Prints a table; exit code 1 if anything was lost beyond the last save, differs or was left over. A
fault counts as one in a save if it left an unfinished staging directory behind. Unknown flags go to
the training command.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from broken_runs.attempt import Pace
from broken_runs.faults import mounted
from broken_runs.jobs import LAUNCHERS, kill_job, warm_up
from broken_runs.leavings import Line, lines_of
from broken_runs.leg import Leg, step_of
from broken_runs.legs import leg_of_kills, leg_of_world_sizes, leg_on_small_disk
from broken_runs.sizes import (
    built_in_recipe,
    bytes_of_disk,
    check_room,
    enough_data,
    for_these_faults,
)
from broken_runs.table import summary, table
from support.runs import counting_dataset

from data_prep.commands import exit_code
from data_prep.errors import UserError
from pretrain.checkpoint.layout import saved_steps
from pretrain.checkpoint.reader import Checkpoint
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe

RELATIVE = 1e-4  # by which losses on other numbers of ranks may differ: the order of sums
SAVES_OF_A_PART = 8  # how far the two further legs go
SAVES_OF_A_QUICK_PART = 4


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line; what is unknown goes to the training command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe", help="default: a tiny one, a few ten milliseconds a step, 6 MB a checkpoint"
    )
    parser.add_argument("--data-dir", type=Path, help="default: a small data set, made here")
    parser.add_argument(
        "--kills", type=int, default=40, help="half of them of the whole job, half of one rank"
    )
    parser.add_argument("--flips", type=int, default=4)
    parser.add_argument("--full-disks", type=int, default=3)
    parser.add_argument("--changes", type=int, default=6, help="of the number of ranks")
    parser.add_argument("--world-sizes", default="2,1,3", help="which are taken in turn")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--launcher", choices=sorted(LAUNCHERS), default="forked")
    parser.add_argument(
        "--directory",
        type=Path,
        help="where to write, and leave it; default: a temporary directory",
    )
    parser.add_argument("--verbose", action="store_true", help="a line for every fault")
    parser.add_argument(
        "--quick", action="store_true", help="6 kills, one flip, one full disk, one change of ranks"
    )
    flags, rest = parser.parse_known_args(arguments)
    if flags.quick:
        flags.kills = 6
        flags.flips = 1
        flags.full_disks = 1
        flags.changes = 1
        flags.world_sizes = "2,1"
    for name, typed in (("--ranks", str(flags.ranks)), ("--world-sizes", flags.world_sizes)):
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", typed):
            raise UserError(f"{name} {typed}: expected numbers of ranks, such as 2,1,3")
    flags.world_sizes = [int(size) for size in flags.world_sizes.split(",")]
    return flags, rest


@dataclass(kw_only=True)
class Plan:
    """What is run: the command, where, and the legs so far."""

    flags: argparse.Namespace
    command: list[str]
    home: Path
    recipe: Recipe
    pace: Pace = field(default_factory=Pace)
    legs: list[Leg] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def every(self) -> int:
        """How many steps lie between saves."""
        return self.recipe.checkpoints.every_steps

    @property
    def part(self) -> int:
        """How many steps the further legs go."""
        saves = SAVES_OF_A_QUICK_PART if self.flags.quick else SAVES_OF_A_PART
        return min(self.recipe.total_steps // self.every, saves) * self.every

    def leg(self, name: str, where: Path, reference: list[Line], *more: str) -> Leg:
        """Another run of the command in a directory of its own."""
        logs = self.home / f"logs of {name}"
        logs.mkdir()
        where.mkdir(exist_ok=True)
        leg = Leg(
            name=name,
            launcher=self.flags.launcher,
            flags=[*self.command, "--run-dir", str(where / "run"), *more],
            run_dir=where / "run",
            logs=logs,
            ranks=self.flags.ranks,
            reference=reference,
            pace=self.pace,
            sample=random.Random(f"{self.flags.seed} {name}"),
            verbose=self.flags.verbose,
        )
        self.legs.append(leg)
        return leg

    def part_leg(self, name: str, where: Path, reference: list[Line]) -> Leg:
        """One that goes the first part of the way."""
        return self.leg(name, where, reference[: self.part], "--stop-at-step", str(self.part))


def planned(flags: argparse.Namespace, rest: list[str], home: Path) -> Plan:
    """The recipe and data that the faults need. Raises UserError if there is no room for them."""
    keys = [flag for flag in rest if re.match(r"--[a-z_.0-9]+=", flag)]
    recipe = flags.recipe
    if recipe is None:
        recipe = str(built_in_recipe(home / "recipe.yaml", flags.kills + flags.flips, flags.quick))
    data_dir = flags.data_dir or counting_dataset(home / "dataset")
    if flags.recipe:
        ours = for_these_faults(flags, load_recipe(recipe, keys, data_dir))
        rest = [*ours, *rest]  # what was typed comes later, and holds
        keys = [*ours, *keys]
    if flags.data_dir is None:
        data_dir = enough_data(home, data_dir, load_recipe(recipe, keys, data_dir))
    resolved = load_recipe(recipe, keys, data_dir)
    check_room(flags, resolved)
    command = ["--recipe", recipe, "--data-dir", str(data_dir), *rest]
    return Plan(flags=flags, command=command, home=home, recipe=resolved)


@dataclass(frozen=True, kw_only=True)
class Unbroken:
    """What the run without a fault left."""

    lines: list[Line]
    saved: dict[int, Checkpoint]  # by step, that after the first part among them


def train_unbroken(plan: Plan) -> Unbroken:
    """The run without a fault; exits if even that has problems."""
    keep = f"--checkpoints.keep_every={plan.part}"
    leg = plan.leg("unbroken", plan.home / "unbroken", [], keep)
    attempt = leg.start()
    try:
        attempt.measure()
        leg.end(attempt)
    finally:
        kill_job(attempt.job)
    if leg.problems:
        sys.exit(1)
    plan.legs.clear()
    saved = {step_of(path): Checkpoint(path) for path in saved_steps(leg.run_dir)}
    return Unbroken(lines=lines_of(leg.run_dir), saved=saved)


def go(leg: Leg, body: Callable[[], None], expected: Checkpoint) -> None:
    """A leg to its end, whatever happens; nothing of it stays behind."""
    try:
        body()
        leg.conclude(expected)
    except RuntimeError as error:
        leg.problem(str(error))
    finally:
        if leg.attempt:
            kill_job(leg.attempt.job)


def break_it(plan: Plan, unbroken: Unbroken) -> None:
    """The leg of kills and flips, to the end of the run."""
    flags = plan.flags
    leg = plan.leg("kills", plan.home / "kills", unbroken.lines)
    go(
        leg,
        lambda: leg_of_kills(leg, flags.kills, flags.flips, plan.every),
        unbroken.saved[plan.recipe.total_steps],
    )


def fill_its_disk(plan: Plan, unbroken: Unbroken) -> None:
    """The leg on a small disk, where one can be made."""
    disk = plan.home / "disk"
    size = bytes_of_disk(plan.recipe)
    refused = mounted(disk, size)
    if refused is not None:
        plan.skipped.append(f"full disks: skipped; a small disk takes root, and memory ({refused})")
        return
    leg = plan.part_leg("small disk", disk, unbroken.lines)
    try:
        go(
            leg,
            lambda: leg_on_small_disk(leg, plan.flags.full_disks, plan.every, disk, size),
            unbroken.saved[plan.part],
        )
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def change_its_ranks(plan: Plan, unbroken: Unbroken) -> None:
    """The leg on one number of ranks after another."""
    order = plan.flags.world_sizes
    sizes = [order[i % len(order)] for i in range(plan.flags.changes + 1)]
    leg = plan.part_leg("world sizes", plan.home / "worlds", unbroken.lines)
    leg.relative = RELATIVE
    go(leg, lambda: leg_of_world_sizes(leg, sizes, plan.every), unbroken.saved[plan.part])


def run_all(flags: argparse.Namespace, rest: list[str], home: Path) -> int:
    """The unbroken run and every leg; the exit code."""
    plan = planned(flags, rest, home)
    if flags.launcher == "forked":
        warm_up()
    unbroken = train_unbroken(plan)
    total = plan.recipe.total_steps
    pace = plan.pace
    print(
        f"{total} steps of {pace.step:.3f} s, a save of {pace.save:.3f} s every {plan.every}, "
        f"{pace.load:.1f} s to load"
    )
    if flags.kills + flags.flips:
        break_it(plan, unbroken)
    if flags.full_disks:
        fill_its_disk(plan, unbroken)
    if flags.changes:
        change_its_ranks(plan, unbroken)
    records = [record for leg in plan.legs for record in leg.records]
    print(f"\n{table(records)}\n\n{summary(plan.legs, unbroken.saved[total], plan.skipped)}")
    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return 1 if any(leg.problems for leg in plan.legs) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    flags, rest = parse(arguments)
    # so that a runner that is told to end leaves nothing behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # killed processes give nothing back
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    if flags.directory:
        flags.directory.mkdir(parents=True)
        return run_all(flags, rest, flags.directory.resolve())
    home = Path(tempfile.mkdtemp(prefix="chaos."))
    try:
        return run_all(flags, rest, home)
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: sys.exit(main())))

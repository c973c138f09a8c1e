"""Train a recipe on a data set, or continue where the run stopped.

    deepspeed --module pretrain.train --recipe NAME|FILE --data-dir DATASET --run-dir RUN_DIR \\
        [--dotted.key=value ...]

The same flags work under `deepspeed pretrain/train.py`, `torchrun -m`, `mpiexec -n N python -m` and
plain `python -m`. The same command with the same run directory continues the run, or says that it
is finished.
"""

import gc
import signal
import sys
from pathlib import Path

# Ctrl-C while it imports and checks is no traceback; training has handlers of its own.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# Run by path: let `import pretrain` find the package, and keep its modules from shadowing others.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# What arithmetic refuses is refused before the imports below, which take from seconds to most of a
# minute.
if __name__ == "__main__":
    from pretrain.run.first_checks import refuse_early

    refuse_early(sys.argv[1:])
    # What is imported stays to the end: to search it for garbage over and over takes 0.9 of 3.9 s
    # of CPU time.
    gc.disable()

import os
from collections.abc import Sequence

import torch

from data_prep.errors import UserError, os_error_line, refusal
from pretrain.distributed.agree import LOG, exit_with, gather, say, together
from pretrain.distributed.devices import memory_of_rank, set_up_rank
from pretrain.distributed.world import World, world_from_environment
from pretrain.engine.process_group import leave_process_group, start_process_group
from pretrain.model.token_codes import warnings
from pretrain.run.command_line import build_parser
from pretrain.run.first_checks import describe_default_start
from pretrain.run.lifecycle import close_finished, run_training
from pretrain.run.prepare import Run, prepare
from pretrain.run.state import read_state
from pretrain.view.dry_run import DataOfRun, describe

if __name__ == "__main__":
    gc.freeze()
    gc.enable()

ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)


def show_dry_run(run: Run, world: World) -> None:
    """Print what would be trained, on rank 0."""
    if not world.is_main:
        return
    start = default_start(run.command)
    data = DataOfRun(loader=run.loader, stages=run.stages)
    print(describe(run.recipe, run.engine_config, data, world.world_size, start))
    for line in warnings(run.model_config, run.reader):
        say(world, line)


def default_start(arguments: Sequence[str]) -> str:
    """For a dry run without a launcher, which is of one rank: what launch/pretrain.sh would start
    here.
    """
    if "RANK" in os.environ:
        return ""
    return describe_default_start(arguments, torch.cuda.device_count(), memory_of_rank(ALONE)[1])


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    world = ALONE
    try:
        world = world_from_environment()
        set_up_rank(world)
        # First --help and wrong flags, which are no other rank's matter.
        flags, _ = build_parser().parse_known_args(arguments)
        LOG.is_quiet = flags.quiet
        if world.world_size > 1:  # what one rank cannot use, all are to hear of
            start_process_group(world)
        run = together(lambda: prepare(arguments, world))
        if run.dry_run:
            show_dry_run(run, world)
        elif gather(together(lambda: read_state(run.run_dir)).status)[0] == "done":
            close_finished(run, world)
        else:
            run_training(run, world)
        leave_process_group()
    except UserError as error:
        return exit_with(error, world)
    except OSError as error:
        return exit_with(refusal(error, os_error_line(error)), world)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

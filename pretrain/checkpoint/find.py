"""Which checkpoint of a run is taken: the newest whose files are all what they were, on all ranks
the same; what is wrong with the others is said.
"""

import errno
import json
import sys
from functools import partial
from pathlib import Path

from data_prep.errors import UserError, is_passing, os_error_line, refusal
from pretrain.checkpoint.layout import (
    CHECKPOINTS_NAME,
    POINTER_NAME,
    SIDECAR_NAME,
    checkpoints_dir,
    saved_steps,
    step_name,
    step_of,
    steps_in,
)
from pretrain.checkpoint.manifest import pointer_to
from pretrain.checkpoint.patience import patiently, read_patiently
from pretrain.checkpoint.reader import UNREADABLE, Checkpoint
from pretrain.distributed.agree import barrier, gather, together
from pretrain.distributed.world import World

# What says something of this process or its rights, and nothing of the file.
NO_DAMAGE = frozenset({errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def pointer_damage(pointer: Path, passed_over: list[Path]) -> str | None:
    """What is wrong with the pointer beside checkpoints, but for naming one that was passed
    over, or None.
    """
    if not pointer.exists():
        return (
            f"{pointer}: missing (removed, or a kill came before it was first written); passed over"
        )
    try:
        content = read_patiently(pointer)
        name = json.loads(content)["checkpoint"]
        if step_of(name) is None:
            return f"{pointer}: names {name!r}, which is no checkpoint's name; passed over"
        named = pointer.with_name(name)
        if not named.is_dir():
            return f"{named}: missing; passed over"
        if named not in passed_over and content != (expected := pointer_to(named)):
            return f"{pointer}: says {content.decode()}, expected {expected.decode()}; passed over"
    except UNREADABLE as error:
        return f"{pointer}: {type(error).__name__}: {error}; passed over"
    return None


def examine(path: Path, part: int, parts: int) -> str | None:
    """What is wrong with this rank's part of a checkpoint, or None.

    Raises UserError where it can't be read for a reason that says nothing of its files; a disk that
    fails is tried again first.
    """
    try:
        return patiently(lambda: Checkpoint(path).damage(part, parts))
    except UNREADABLE as error:
        if isinstance(error, OSError) and (is_passing(error) or error.errno in NO_DAMAGE):
            advice = f"mend that, or move {path} away to go on from the checkpoint before it"
            raise refusal(error, f"{os_error_line(error)}; {advice}") from None
        return f"{type(error).__name__}: {error}"


def newest_good(run_dir: Path, world: World | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose digests agree, and a line for a bad pointer and each newer one
    that was passed over.

    Ranks share the reading of the files and agree on the answer. Raises UserError on all of them
    where one can't read.
    """
    bad: dict[Path, str] = {}
    good = None
    own_paths = together(lambda: patiently(lambda: saved_steps(run_dir)))
    paths: list[Path] = gather(own_paths)[0]  # a disk shared over a network may show others less
    for path in paths:
        damage = damage_on_any_rank(path, world)
        if damage is None:
            good = together(partial(patiently, partial(Checkpoint, path)))
            break
        bad[path] = f"{path}: {damage}; passed over"
    lines = list(bad.values())
    pointer = checkpoints_dir(run_dir) / POINTER_NAME
    if paths or pointer.exists():
        damage = pointer_damage(pointer, list(bad))
        if damage is not None:
            lines.insert(0, damage)
    barrier()
    return good, lines


def damage_on_any_rank(path: Path, world: World | None) -> str | None:
    """What is wrong with a checkpoint, each rank having looked at its part; None on all of them
    where it is good.
    """
    part = world.rank if world else 0
    parts = world.world_size if world else 1
    own = together(lambda: examine(path, part, parts))
    damages = [damage for damage in gather(own) if damage is not None]
    return damages[0] if damages else None


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint rather than a run's."""
    return (path / SIDECAR_NAME).is_file()


def run_of(checkpoint: Checkpoint, run_dir: Path) -> Path | None:
    """The run that a checkpoint belongs to, where --run-dir may name either; None where it lies
    by itself.
    """
    if not is_checkpoint(run_dir):
        return run_dir
    home = checkpoint.path.absolute().parent
    return home.parent if home == checkpoints_dir(home.parent) else None


def load_for_reading(run_dir: Path, step: int | None = None) -> Checkpoint:
    """A good checkpoint of a run, for evaluation and export: the newest, or that of a step; or
    `run_dir` itself.

    Raises UserError if there is none.
    """
    if not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir}: no such directory; train first with pretrain.train")
    if is_checkpoint(run_dir):
        return open_good(run_dir, step)
    if step is not None:
        return open_good(checkpoints_dir(run_dir) / step_name(step), step)
    checkpoint, passed_over = newest_good(run_dir)
    for line in passed_over:
        print(line, file=sys.stderr)
    if checkpoint:
        return checkpoint
    if passed_over:
        raise UserError(
            f"{run_dir}: {len(passed_over)} damaged checkpoints ({passed_over[0]}); restore one"
        )
    if run_dir.name == CHECKPOINTS_NAME and saved_steps(run_dir.parent):
        raise UserError(
            f"--run-dir {run_dir}: the folder of a run's checkpoints; give the run, "
            f"{run_dir.parent}"
        )
    raise UserError(
        f"{run_dir}: no checkpoints; train with pretrain.train --run-dir {run_dir} first"
    )


def open_good(path: Path, step: int | None) -> Checkpoint:
    """One checkpoint, once all of it was found good. Raises UserError if it isn't, naming those
    beside it.
    """
    problem = examine(path, 0, 1) if path.is_dir() else "no such checkpoint"
    if problem is None:
        checkpoint = Checkpoint(path)
        if step is None or step == checkpoint.step:
            return checkpoint
        problem = f"is of step {checkpoint.step}, not of --step {step}"
    steps = [str(step_of(other.name)) for other in steps_in(path.parent)]
    there = ", ".join(steps) or "none"
    raise UserError(f"{path}: {problem}; steps there: {there}")

"""What may disappear from a run's checkpoints, and how: only files of ours, never seen half gone,
at no save's cost.

    step-00000200                      a checkpoint
    .step-00000200.tmp                 one being written
    .step-00000200.k2j8x0q_            one being copied for a branch
    .step-00000200.7f3a90c1.old.tmp    one being removed

Removing can fail for a while: NFS keeps a file that somebody has open as `.nfsXXXX`, so that its
directory is not empty. Then what is left keeps its hidden name, and the next save tries again.
"""

import os
import re
import secrets
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from data_prep.commands import unheard
from pretrain.checkpoint.layout import STEP_PREFIX, is_own_file, step_name, step_of, steps_in

LEFTOVER = re.compile(r"\.step-\d{8,}(\.[0-9a-z_]{8}|(\.[0-9a-z_]{8})?(\.old)?\.tmp)")
SET_ASIDE_PREFIX = "set-aside-"


def strangers_in(path: Path) -> list[str]:
    """What a checkpoint's directory holds that is none of its files."""
    return sorted(name for name in os.listdir(path) if not is_own_file(name))


def warn(text: str) -> None:
    """A line on what could not be removed."""
    with unheard():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def hidden_name(path: Path) -> Path:
    """A name beside a checkpoint that nothing has, under which it may be removed."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.old.tmp")


def discard(path: Path) -> None:
    """Have a checkpoint disappear by a rename, so that it is never seen half gone; of a link, the
    link alone.

    What can't be removed, or not yet, stays under a hidden name. Raises OSError where it can't be
    renamed.
    """
    if path.is_symlink():
        path.unlink()
        return
    doomed = hidden_name(path)
    os.rename(path, doomed)
    remove_leftover(doomed)


def remove_leftover(doomed: Path) -> None:
    """Remove what has a hidden name, as far as that goes now."""
    shutil.rmtree(doomed, ignore_errors=True)  # and the rest, past what can't be removed
    if doomed.exists():
        warn(f"{doomed}: not removed yet: {why_not(doomed)}; the next save tries again")


def why_not(doomed: Path) -> str:
    """What the operating system says to removing a directory."""
    try:
        shutil.rmtree(doomed)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return "it is gone now"


def leftovers_in(home: Path) -> Iterator[Path]:
    """Directories that saves, removals and branches left when they were killed, or when somebody
    held a file open.
    """
    for path in home.glob(f".{STEP_PREFIX}*"):
        if LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            yield path


def sweep(home: Path) -> None:
    """Remove leftovers, as far as that goes now. Raises nothing for them."""
    try:
        for leftover in leftovers_in(home):
            remove_leftover(leftover)
    except OSError as error:
        warn(f"{home}: leftovers can't be listed ({error.strerror}); the next save tries again")


def new_staging(final: Path) -> Path:
    """An empty directory beside a checkpoint to be, to write it in.

    It has another name than usual where a leftover can't be cleared away. Raises OSError where none
    can be made.
    """
    staging = final.with_name(f".{final.name}.tmp")
    if staging.is_dir():
        staging = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    staging.mkdir()  # and fails where it is there: no two saves write into one
    return staging


def make_way(final: Path) -> None:
    """See to it that nothing has a checkpoint's name: an older one goes, what holds anything
    else is set aside.
    """
    if final.is_symlink() or (final.is_dir() and not strangers_in(final)):
        discard(final)
    elif final.exists():
        aside = final.with_name(f"{SET_ASIDE_PREFIX}{final.name}-{secrets.token_hex(4)}")
        os.rename(final, aside)
        warn(f"{final}: held what is no part of a checkpoint; it is now {aside.name}")


def prune(
    saved: Path,
    keep_last: int,
    keep_every: int | None = None,
    passed_over: Collection[str] = (),
    in_use: Collection[str] = (),
) -> None:
    """Remove all but the newest checkpoints and those of every `keep_every`-th step; one that can't
    be is said.

    Counts from the one just saved, and without those of the names in `passed_over`, which stay:
    what is damaged must not crowd out what is good. Those of the names in `in_use` are counted, and
    stay until they are read.
    """
    try:
        steps = [step_of(path.name) or 0 for path in steps_in(saved.parent)]
    except OSError as error:
        warn(
            f"{saved.parent}: can't be listed ({error.strerror}), so nothing is removed; the next "
            "save tries again"
        )
        return
    newest = step_of(saved.name) or 0
    so_far = [step for step in steps if step <= newest and step_name(step) not in passed_over]
    for step in so_far[keep_last:]:
        is_to_stay = keep_every is not None and step % keep_every == 0
        if not is_to_stay and step_name(step) not in in_use:
            prune_one(saved.with_name(step_name(step)))


def prune_one(path: Path) -> None:
    """Remove a checkpoint that is due, unless somebody keeps other files in it."""
    try:
        strangers = [] if path.is_symlink() else strangers_in(path)
        if strangers:
            warn(
                f"{path}: kept, since it holds {strangers[0]}, which is no part of a checkpoint; "
                "move that away"
            )
        else:
            discard(path)
    except OSError as error:
        warn(f"{path}: not removed ({error.strerror}); the next save tries again")

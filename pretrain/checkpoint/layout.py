"""Where a run's checkpoints lie, what their files are called, and the disk under them. No torch.

checkpoints/step-00000200/rank-00000-of-00002.safetensors   a rank's part of every parameter
checkpoints/step-00000200/manifest.json                     see pretrain/checkpoint/manifest.py
checkpoints/step-00000200/manifest.json.xxh3_128            the manifest's digest
checkpoints/latest                                          the newest, with that digest
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import os_error_line, refusal

CHECKPOINTS_NAME = "checkpoints"
LOGS_NAME = "logs"  # beside it, stacks of ranks that stalled: pretrain/watch/watch.py
POINTER_NAME = "latest"
MANIFEST_NAME = "manifest.json"
SIDECAR_NAME = f"{MANIFEST_NAME}.xxh3_128"
STEP_PREFIX = "step-"
OWN_FILE = re.compile(r"rank-\d{5,}-of-\d{5,}\.safetensors")


def step_name(step: int) -> str:
    """The name of the checkpoint after so many steps: eight digits, more from step 100,000,000
    on.
    """
    return f"{STEP_PREFIX}{step:08d}"


def step_of(name: str) -> int | None:
    """The steps that a checkpoint's name tells, or None where it is no such name."""
    digits = name.removeprefix(STEP_PREFIX)
    is_number = digits.isascii() and digits.isdigit()
    return int(digits) if is_number and name == step_name(int(digits)) else None


def steps_in(home: Path) -> list[Path]:
    """The directories that are called as checkpoints are, newest first; none where `home` is not
    there.
    """
    names = os.listdir(home) if home.is_dir() else []
    steps = [step for step in map(step_of, names) if step is not None]
    return [home / step_name(step) for step in sorted(steps, reverse=True)]


def is_own_file(name: str) -> bool:
    """Whether a checkpoint may hold a file of this name."""
    return name in (MANIFEST_NAME, SIDECAR_NAME) or OWN_FILE.fullmatch(name) is not None


def checkpoints_dir(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / CHECKPOINTS_NAME


def disk_of(path: Path) -> tuple[Path, int]:
    """The mount point of the disk that holds a path, and the bytes free there."""
    mount = next(
        parent for parent in (path.resolve(), *path.resolve().parents) if parent.is_mount()
    )
    return mount, shutil.disk_usage(mount).free


@contextlib.contextmanager
def naming_the_disk(run_dir: Path) -> Iterator[None]:
    """What the disk of the run's directory refuses becomes a UserError that names it."""
    try:
        yield
    except OSError as error:
        mount, free = disk_of(run_dir)
        where = f"{os_error_line(error)}; the disk mounted at {mount} has {free:,} bytes free"
        raise refusal(
            error, f"{run_dir}: {where}; mend that, and the same command continues"
        ) from error


def saved_steps(run_dir: Path) -> list[Path]:
    """Directories of the checkpoints of a run, newest first."""
    return steps_in(checkpoints_dir(run_dir))

"""Checkpoints: safetensors fragments, elastic by construction, published atomically.

    checkpoints/step-00000200/rank-00000-of-00002.safetensors   the part of every parameter that a rank owned
    checkpoints/step-00000200/manifest.json                     step, recipe, fingerprint, what lies where, digests
    checkpoints/step-00000200/manifest.json.xxh3_128            the manifest's digest
    checkpoints/latest                                          names the newest checkpoint and its manifest's digest

For every parameter there are three states, all fp32: `master`, `exp_avg` and `exp_avg_sq`. A
fragment is a run of consecutive elements of the flattened parameter, stored as
`<parameter>/<state>`. Any world size can load what any other saved, and the export reads the
masters with plain safetensors.

Save (pretrain/checkpoint/saving.py): stage, digest, fsync, barrier, rename, then publish the
pointer. Load: digests first; a file that the manifest does not name, or names otherwise, makes the
directory no checkpoint, and is not opened. So do states that are no numbers. Nothing here is a
pickle.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.errors import UserError, is_passing, naming, os_error_line, refusal
from data_prep.files import digest_file
from pretrain.checkpoint.patience import patiently, read_patiently
from pretrain.checkpoint.retention import (
    MANIFEST_NAME,
    OWN_FILE,
    SIDECAR_NAME,
    step_name,
    step_of,
    steps_in,
)
from pretrain.distributed.ranks import barrier, gather, together
from pretrain.distributed.world import World
from pretrain.modeling_tablefree import TableFreeConfig, TableFreeForCausalLM, checkpoint_parameters

FORMAT = "tablefree-checkpoint"
FORMAT_VERSION = 1
POINTER_NAME = "latest"
BLOCK_BYTES = 4 << 20
# What damage raises; of OSErrors, those that `examine` takes for it.
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    SafetensorError,
)
# What says something of this process or its rights, and nothing of the file.
NO_DAMAGE = frozenset({errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A run of consecutive elements of one flattened parameter, in every state."""

    name: str
    start: int
    states: dict[str, Tensor]  # master, exp_avg, exp_avg_sq: fp32, one dimension, equal lengths


def checkpoints_dir(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


class Checkpoint:
    """A checkpoint on disk: what its manifest says, and reads of any range of any parameter.

    Raises one of UNREADABLE if the manifest is damaged, or names files that no checkpoint has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming(path / MANIFEST_NAME):
            sidecar = (path / SIDECAR_NAME).read_bytes()
            if sidecar != (expected := sidecar_of(path)):
                digest, said = (
                    expected.decode().split()[0],
                    sidecar.decode(errors="replace").strip(),
                )
                raise ValueError(f"{MANIFEST_NAME}: digest {digest}, {SIDECAR_NAME} says {said}")
            content = json.loads((path / MANIFEST_NAME).read_bytes())
        if content.get("format") != FORMAT or content.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{MANIFEST_NAME} is not of format {FORMAT} {FORMAT_VERSION}")
        self.manifest: dict[str, Any] = content
        self.step: int = content["step"]
        self.optimizer_step: int = content["optimizer_step"]
        self.files: list[dict[str, Any]] = content["files"]
        self.shapes: dict[str, list[int]] = content["parameters"]
        self._where: dict[str, list[tuple[int, int, str]]] = {name: [] for name in self.shapes}
        for file in self.files:
            # so that none outside of this directory is ever opened
            if not OWN_FILE.fullmatch(file["name"]):
                raise ValueError(
                    f"{MANIFEST_NAME} names {file['name']!r}, which is no file of a checkpoint"
                )
            for name, (start, count) in file["fragments"].items():
                self._where[name].append((start, count, file["name"]))
        self._open: dict[str, Any] = {}

    def damage(self, part: int = 0, parts: int = 1) -> str | None:
        """What is wrong with every `parts`-th file from `part` on, or None when all digests agree.

        Raises OSError where a file can't be read.
        """
        if self.path.name != step_name(self.step):
            return f"its {MANIFEST_NAME} is of step {self.step}: it was renamed"
        named = {MANIFEST_NAME, SIDECAR_NAME, *(file["name"] for file in self.files)}
        for stranger in sorted(set(os.listdir(self.path)) - named):
            return f"{stranger} is not named in {MANIFEST_NAME}"
        for file in self.files[part::parts]:
            with naming(self.path / file["name"]):
                if (found := self._damage_of(file)) is not None:
                    return found
        return None

    def _damage_of(self, file: dict[str, Any]) -> str | None:
        """What is wrong with one file, or None."""
        name, path = file["name"], self.path / file["name"]
        if path.is_symlink() and path.resolve().parent != self.path.resolve():
            return f"{name} is a link that leads out of the checkpoint"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != file["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes, expected {file['bytes']:,}"
        if (digest := digest_file(path)) != file["xxh3_128"]:
            return f"{name} differs from its digest: {digest}, expected {file['xxh3_128']}"
        opened = self._file(name)  # raises unless its header is one of safetensors
        keys = opened.keys()
        for key in keys:
            # of the mapped file, which was read just now
            if not is_finite(opened.get_slice(key)[:]):
                return (
                    f"{key} holds what is no number: the weights were spoilt before they were saved"
                )
        return None

    def read(self, name: str, state: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of a flattened parameter's state, fp32, whichever
        files hold them.
        """
        pieces = []
        for first, length, file_name in sorted(self._where[name]):
            low, high = max(start, first), min(start + count, first + length)
            if low < high:
                stored = self._file(file_name).get_slice(f"{name}/{state}")
                # of the mapped file: not copied yet
                pieces.append(stored[low - first : high - first])
        filled = sum(map(len, pieces))
        if filled != count:
            raise UserError(
                f"{self.path}: holds {filled:,} of {count:,} elements of {name}; the checkpoint "
                "is damaged"
            )
        return pieces[0] if len(pieces) == 1 else torch.cat([torch.empty(0), *pieces])

    def parameter(self, name: str, state: str = "master") -> Tensor:
        """A whole parameter in its shape, fp32."""
        shape = self.shapes[name]
        return self.read(name, state, 0, torch.Size(shape).numel()).view(shape)

    def _file(self, file_name: str) -> Any:
        if file_name not in self._open:
            self._open[file_name] = safe_open(self.path / file_name, "pt")
        return self._open[file_name]


def is_finite(values: Tensor) -> bool:
    """Whether a vector holds numbers alone: no NaN, no infinity. NumPy, since torch would take
    all cores for it.
    """
    return all(np.isfinite(block.cpu().numpy()).all() for block in values.split(BLOCK_BYTES // 4))


def sidecar_of(path: Path) -> bytes:
    """What a checkpoint's manifest makes the sidecar say, in the form that `xxh128sum --check`
    reads.
    """
    return f"{digest_file(path / MANIFEST_NAME)}  {MANIFEST_NAME}\n".encode()


def pointer_to(path: Path) -> bytes:
    """What a checkpoint makes the pointer say."""
    content = {"checkpoint": path.name, "manifest_xxh3_128": digest_file(path / MANIFEST_NAME)}
    return json.dumps(content).encode()


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
    part, parts = (world.rank, world.world_size) if world else (0, 1)
    bad: dict[Path, str] = {}
    good = None
    own_paths = together(lambda: patiently(lambda: saved_steps(run_dir)))
    paths: list[Path] = gather(own_paths)[0]
    for path in paths:
        own = together(lambda path=path: examine(path, part, parts))  # type: ignore[misc]
        damages = [damage for damage in gather(own) if damage is not None]
        if not damages:
            good = together(lambda path=path: patiently(lambda: Checkpoint(path)))  # type: ignore[misc]
            break
        bad[path] = f"{path}: {damages[0]}; passed over"
    pointer = checkpoints_dir(run_dir) / POINTER_NAME
    damage = pointer_damage(pointer, list(bad)) if paths or pointer.exists() else None
    barrier()
    return good, [*filter(None, [damage]), *bad.values()]


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
    if checkpoint is None:
        if passed_over:
            raise UserError(
                f"{run_dir}: {len(passed_over)} damaged checkpoints ({passed_over[0]}); restore one"
            )
        if saved_steps(run_dir.parent) and run_dir.name == checkpoints_dir(run_dir.parent).name:
            raise UserError(
                f"--run-dir {run_dir}: the folder of a run's checkpoints; give the run, "
                f"{run_dir.parent}"
            )
        raise UserError(
            f"{run_dir}: no checkpoints; train with pretrain.train --run-dir {run_dir} first"
        )
    return checkpoint


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
    there = ", ".join(str(step_of(other.name)) for other in steps_in(path.parent)) or "none"
    raise UserError(f"{path}: {problem}; steps there: {there}")


def load_model(checkpoint: Checkpoint) -> TableFreeForCausalLM:
    """The training class holding the fp32 masters, without DeepSpeed."""
    model = TableFreeForCausalLM(TableFreeConfig.from_dict(checkpoint.manifest["model_config"]))
    with torch.no_grad():
        for name, parameter in checkpoint_parameters(model):
            parameter.copy_(checkpoint.parameter(name))
    return model

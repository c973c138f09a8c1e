"""Checkpoints: safetensors fragments, elastic by construction, published atomically.

    checkpoints/step-00000200/rank-00000-of-00002.safetensors   the part of every parameter that a rank owned
    checkpoints/step-00000200/manifest.json                     step, recipe, fingerprint, what lies where, digests
    checkpoints/latest                                          names the newest checkpoint and its manifest's digest

For every parameter there are three states, all fp32: `master`, `exp_avg` and `exp_avg_sq`. A fragment is a run
of consecutive elements of the flattened parameter, stored as `<parameter>/<state>`. Any world size can load what
any other saved, and the export reads the masters with plain safetensors.

Save: stage, digest, fsync, barrier, rename, then publish the pointer. Load: digests first.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_prep.errors import UserError
from data_prep.shards import digest_file, fsync_directory, write_durably
from pretrain.distributed import World, barrier, gather, together
from pretrain.modeling_tablefree import TableFreeConfig, TableFreeForCausalLM

FORMAT = "tablefree-checkpoint"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
POINTER_NAME = "latest"
STEP_PREFIX = "step-"


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
    """A checkpoint on disk: what its manifest says, and reads of any range of any parameter."""

    def __init__(self, path: Path) -> None:
        self.path = path
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
            for name, (start, count) in file["fragments"].items():
                self._where[name].append((start, count, file["name"]))
        self._open: dict[str, Any] = {}

    def damage(self, part: int = 0, parts: int = 1) -> str | None:
        """What is wrong with every `parts`-th file from `part` on, or None when all digests agree."""
        for file in self.files[part::parts]:
            path = self.path / file["name"]
            if not path.is_file():
                return f"{file['name']} is missing"
            if path.stat().st_size != file["bytes"]:
                return f"{file['name']} has {path.stat().st_size:,} bytes, expected {file['bytes']:,}"
            if digest_file(path) != file["xxh3_128"]:
                return f"{file['name']} differs from its digest"
        return None

    def read(self, name: str, state: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of a flattened parameter's state, fp32, whichever files hold them."""
        result = torch.empty(count, dtype=torch.float32)
        filled = 0
        for first, length, file_name in self._where[name]:
            low, high = max(start, first), min(start + count, first + length)
            if low < high:
                stored = self._file(file_name).get_slice(f"{name}/{state}")
                result[low - start : high - start] = stored[low - first : high - first]
                filled += high - low
        if filled != count:
            raise UserError(f"{self.path}: holds {filled:,} of {count:,} elements of {name}; the checkpoint is damaged")
        return result

    def parameter(self, name: str, state: str = "master") -> Tensor:
        """A whole parameter in its shape, fp32."""
        shape = self.shapes[name]
        return self.read(name, state, 0, torch.Size(shape).numel()).view(shape)

    def _file(self, file_name: str) -> Any:
        if file_name not in self._open:
            self._open[file_name] = safe_open(self.path / file_name, "pt")
        return self._open[file_name]


def write_fragments(path: Path, fragments: list[Fragment]) -> dict[str, Any]:
    """Write one rank's file and flush it to disk; returns its entry in the manifest."""
    tensors = {
        f"{fragment.name}/{state}": values.cpu().contiguous()
        for fragment in fragments
        for state, values in fragment.states.items()
    }
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "xxh3_128": digest_file(path),
        "fragments": {f.name: [f.start, f.states["master"].numel()] for f in fragments},
    }


def save_checkpoint(run_dir: Path, step: int, fragments: list[Fragment], about: dict[str, Any], world: World) -> Path:
    """Save on all ranks; the checkpoint exists, whole, once its directory has its final name.

    `about` is what the manifest says beside step and files. Raises UserError on every rank if any rank fails
    (a full disk, say); what was saved before stays as it was.
    """
    home = checkpoints_dir(run_dir)
    final = home / f"{STEP_PREFIX}{step:08d}"
    staging = home / f".{final.name}.tmp"

    def clear_staging() -> None:
        if world.is_main:
            home.mkdir(parents=True, exist_ok=True)
            for leftover in home.glob(".*.tmp"):
                shutil.rmtree(leftover)
            staging.mkdir()

    def write_own_file() -> dict[str, Any]:
        name = f"rank-{world.rank:05d}-of-{world.world_size:05d}.safetensors"
        try:
            return write_fragments(staging / name, fragments)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{staging}: checkpoint of step {step} not written: {error}") from None

    together(clear_staging)
    entries = gather(together(write_own_file))

    def complete() -> None:
        if world.is_main:
            manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": step, **about, "files": entries}
            write_durably(staging / MANIFEST_NAME, json.dumps(manifest, indent=1).encode())
            fsync_directory(staging)
            publish(staging, final)

    together(complete)
    return final


def publish(staging: Path, final: Path) -> None:
    """Give a complete checkpoint its final name and point to it."""
    if final.exists():
        shutil.rmtree(final)
    os.rename(staging, final)
    fsync_directory(final.parent)
    pointer = {"checkpoint": final.name, "manifest_xxh3_128": digest_file(final / MANIFEST_NAME)}
    write_durably(final.parent / POINTER_NAME, json.dumps(pointer).encode())


def prune_checkpoints(run_dir: Path, keep_last: int) -> None:
    """Remove all but the newest checkpoints; each disappears by a rename, so none is ever seen half gone.

    Counts from the published one: what is newer was passed over as damaged, and must not crowd out what is good.
    """
    published = read_pointer(run_dir).get("checkpoint")
    for path in [path for path in saved_steps(run_dir) if not published or path.name <= published][keep_last:]:
        doomed = path.with_name(f".{path.name}.tmp")
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def saved_steps(run_dir: Path) -> list[Path]:
    """Directories of the checkpoints of a run, newest first."""
    return sorted(checkpoints_dir(run_dir).glob(STEP_PREFIX + "[0-9]" * 8), reverse=True)


def read_pointer(run_dir: Path) -> dict[str, str]:
    """What `latest` says: the newest checkpoint and its manifest's digest; empty if it can't be read."""
    try:
        pointer = json.loads((checkpoints_dir(run_dir) / POINTER_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return pointer if isinstance(pointer, dict) else {}


def open_checkpoint(run_dir: Path, path: Path) -> Checkpoint:
    """Read a checkpoint's manifest and hold it against the pointer. Raises ValueError or OSError if it is damaged."""
    pointer = read_pointer(run_dir)
    if pointer.get("checkpoint") == path.name and digest_file(path / MANIFEST_NAME) != pointer["manifest_xxh3_128"]:
        raise ValueError(f"{MANIFEST_NAME} differs from the digest in {POINTER_NAME}")
    return Checkpoint(path)


def examine(run_dir: Path, path: Path, part: int, parts: int) -> str | None:
    """What is wrong with this rank's part of a checkpoint, or None."""
    try:
        return open_checkpoint(run_dir, path).damage(part, parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def newest_good(run_dir: Path, world: World | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose digests agree, and a line for each newer one that was passed over.

    Ranks share the reading of the files and agree on the answer.
    """
    part, parts = (world.rank, world.world_size) if world else (0, 1)
    passed_over: list[str] = []
    paths: Iterable[Path] = gather(saved_steps(run_dir))[0]
    published = read_pointer(run_dir).get("checkpoint")
    if published and not (checkpoints_dir(run_dir) / published).is_dir():
        passed_over.append(f"{checkpoints_dir(run_dir) / published}: missing; passed over")
    for path in paths:
        found = examine(run_dir, path, part, parts)
        damages = [damage for damage in gather(found) if damage is not None]
        if not damages:
            return open_checkpoint(run_dir, path), passed_over
        passed_over.append(f"{path}: {damages[0]}; passed over")
    barrier()
    return None, passed_over


def load_for_reading(run_dir: Path) -> Checkpoint:
    """The newest good checkpoint of a run, for evaluation and export. Raises UserError if there is none."""
    if not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir}: no such directory; train first with pretrain.train")
    checkpoint, passed_over = newest_good(run_dir)
    for line in passed_over:
        print(line, file=sys.stderr)
    if checkpoint is None:
        found = f"{len(passed_over)} damaged checkpoints ({passed_over[0]})" if passed_over else "no checkpoints"
        raise UserError(f"{run_dir}: {found}; train with pretrain.train --run-dir {run_dir} first")
    return checkpoint


def load_model(checkpoint: Checkpoint) -> TableFreeForCausalLM:
    """The training class holding the fp32 masters, without DeepSpeed."""
    model = TableFreeForCausalLM(TableFreeConfig.from_dict(checkpoint.manifest["model_config"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.parameter(name))
    return model

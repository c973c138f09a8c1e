"""Checkpoints: safetensors fragments, elastic by construction, published atomically.

    checkpoints/step-00000200/rank-00000-of-00002.safetensors   the part of every parameter that a rank owned
    checkpoints/step-00000200/manifest.json                     step, recipe, fingerprint, what lies where, digests
    checkpoints/step-00000200/manifest.json.xxh3_128            the manifest's digest
    checkpoints/latest                                          names the newest checkpoint and its manifest's digest

For every parameter there are three states, all fp32: `master`, `exp_avg` and `exp_avg_sq`. A fragment is a run
of consecutive elements of the flattened parameter, stored as `<parameter>/<state>`. Any world size can load what
any other saved, and the export reads the masters with plain safetensors.

Save: stage, digest, fsync, barrier, rename, then publish the pointer. Load: digests first; a file that the manifest
does not name, or names otherwise, makes the directory no checkpoint, and is not opened. Nothing here is a pickle.
"""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.errors import UserError
from data_prep.shards import digest_file, fsync_directory, write_durably
from pretrain.distributed import Group, SharedError, World, barrier, gather, together
from pretrain.modeling_tablefree import TableFreeConfig, TableFreeForCausalLM

FORMAT = "tablefree-checkpoint"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SIDECAR_NAME = f"{MANIFEST_NAME}.xxh3_128"
POINTER_NAME = "latest"
STEP_PREFIX = "step-"
BLOCK_BYTES = 4 << 20
UNREADABLE = (  # what damage raises
    OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError,
)  # fmt: skip
Callback = Callable[[], None] | None


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

    Raises ValueError or OSError if the manifest is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        sidecar = (path / SIDECAR_NAME).read_bytes()
        if sidecar != sidecar_of(path):
            said = sidecar.decode(errors="replace").strip()
            raise ValueError(f"{MANIFEST_NAME}: digest {digest_file(path / MANIFEST_NAME)}, {SIDECAR_NAME} says {said}")
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
        if self.path.name != f"{STEP_PREFIX}{self.step:08d}":
            return f"its {MANIFEST_NAME} is of step {self.step}: it was renamed"
        named = {MANIFEST_NAME, SIDECAR_NAME, *(file["name"] for file in self.files)}
        for stranger in sorted(set(os.listdir(self.path)) - named):
            return f"{stranger} is not named in {MANIFEST_NAME}"
        for file in self.files[part::parts]:
            path = self.path / file["name"]
            if not path.is_file():
                return f"{file['name']} is missing"
            if path.stat().st_size != file["bytes"]:
                return f"{file['name']} has {path.stat().st_size:,} bytes, expected {file['bytes']:,}"
            if (digest := digest_file(path)) != file["xxh3_128"]:
                return f"{file['name']} differs from its digest: {digest}, expected {file['xxh3_128']}"
            self._file(file["name"])  # raises unless its header is one of safetensors
        return None

    def read(self, name: str, state: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of a flattened parameter's state, fp32, whichever files hold them."""
        pieces = []
        for first, length, file_name in sorted(self._where[name]):
            low, high = max(start, first), min(start + count, first + length)
            if low < high:
                stored = self._file(file_name).get_slice(f"{name}/{state}")
                pieces.append(stored[low - first : high - first])  # of the mapped file: not copied yet
        filled = sum(map(len, pieces))
        if filled != count:
            raise UserError(f"{self.path}: holds {filled:,} of {count:,} elements of {name}; the checkpoint is damaged")
        return pieces[0] if len(pieces) == 1 else torch.cat([torch.empty(0), *pieces])

    def parameter(self, name: str, state: str = "master") -> Tensor:
        """A whole parameter in its shape, fp32."""
        shape = self.shapes[name]
        return self.read(name, state, 0, torch.Size(shape).numel()).view(shape)

    def _file(self, file_name: str) -> Any:
        if file_name not in self._open:
            self._open[file_name] = safe_open(self.path / file_name, "pt")
        return self._open[file_name]


def sidecar_of(path: Path) -> bytes:
    """What a checkpoint's manifest makes the sidecar say, in the form that `xxh128sum --check` reads."""
    return f"{digest_file(path / MANIFEST_NAME)}  {MANIFEST_NAME}\n".encode()


def pointer_to(path: Path) -> bytes:
    """What a checkpoint makes the pointer say."""
    content = {"checkpoint": path.name, "manifest_xxh3_128": digest_file(path / MANIFEST_NAME)}
    return json.dumps(content).encode()


def safetensors_blocks(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file of fp32 vectors, a few MB at a time and as they lie in memory."""
    header, end = {}, 0
    for name, values in tensors.items():
        begin, end = end, end + values.nbytes
        header[name] = {"dtype": "F32", "shape": [len(values)], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for values in tensors.values():
        for block in values.split(BLOCK_BYTES // 4):
            yield block.cpu().contiguous().view(torch.uint8).numpy().data


def write_fragments(path: Path, fragments: list[Fragment], on_block: Callback = None) -> dict[str, Any]:
    """Write one rank's file, digested on the way, and flush it to disk; returns its entry in the manifest."""
    tensors = {f"{f.name}/{state}": values for f in fragments for state, values in f.states.items()}
    digest, on_its_way = xxhash.xxh3_128(), 0
    with path.open("wb") as file:
        for block in safetensors_blocks(tensors):
            digest.update(block)
            file.write(block)
            if on_block:
                on_block()
            if file.tell() - on_its_way > BLOCK_BYTES:  # have the disk begin, so that little is left to the fsync
                os.posix_fadvise(file.fileno(), on_its_way, 0, os.POSIX_FADV_DONTNEED)
                on_its_way = file.tell()
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return {
        "name": path.name,
        "bytes": size,
        "xxh3_128": digest.hexdigest(),
        "fragments": {f.name: [f.start, f.states["master"].numel()] for f in fragments},
    }


def disk_of(path: Path) -> tuple[Path, int]:
    """The mount point of the disk that holds a path, and the bytes free there."""
    mount = next(parent for parent in (path.resolve(), *path.resolve().parents) if parent.is_mount())
    return mount, shutil.disk_usage(mount).free


def save_checkpoint(
    run_dir: Path,
    step: int,
    fragments: list[Fragment],
    about: dict[str, Any],
    world: World,
    group: Group = None,
    on_block: Callback = None,
) -> Path:
    """Save on all ranks; the checkpoint exists, whole, once its directory has its final name.

    `about` is what the manifest says beside step and files; `on_block` is called as writing moves on. Raises UserError
    on every rank if any rank fails (a full disk, say), naming disk and bytes; what was saved before stays as it was.
    """
    home = checkpoints_dir(run_dir)
    final = home / f"{STEP_PREFIX}{step:08d}"
    staging = home / f".{final.name}.tmp"
    needed = sum(gather(sum(values.nbytes for f in fragments for values in f.states.values()), group))

    def clear_staging() -> None:
        if world.is_main:
            home.mkdir(parents=True, exist_ok=True)
            for leftover in home.glob(".*.tmp"):
                shutil.rmtree(leftover)
            staging.mkdir()
            if disk_of(home)[1] < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def complete() -> None:
        if world.is_main:
            manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": step, **about, "files": entries}
            write_durably(staging / MANIFEST_NAME, json.dumps(manifest, indent=1).encode())
            write_durably(staging / SIDECAR_NAME, sidecar_of(staging))
            publish(staging, final)

    own_file = staging / f"rank-{world.rank:05d}-of-{world.world_size:05d}.safetensors"
    try:
        together(clear_staging, group)
        entries = gather(together(lambda: write_fragments(own_file, fragments, on_block), group), group)
        together(complete, group)
    except UserError as error:
        if world.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        mount, free = disk_of(home)
        raise SharedError(
            f"{final}: not written: {error}; it needs {needed:,} bytes, the disk mounted at {mount} has {free:,} free; "
            f"make room or mend that, and the same command continues"
        ) from None
    return final


def publish(staging: Path, final: Path) -> None:
    """Give a complete checkpoint its final name and point to it."""
    if final.exists():
        remove(final)
    os.rename(staging, final)
    fsync_directory(final.parent)
    write_durably(final.parent / POINTER_NAME, pointer_to(final))


def remove(path: Path) -> None:
    """Have a checkpoint disappear by a rename, so that it is never seen half gone."""
    doomed = path.with_name(f".{path.name}.old.tmp")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def prune_checkpoints(saved: Path, keep_last: int, keep_every: int | None = None) -> None:
    """Remove all but the newest checkpoints and those of every `keep_every`-th step.

    Counts from the one just saved: what is newer was passed over as damaged, and must not crowd out what is good.
    """
    run_dir = saved.parent.parent
    for path in [path for path in saved_steps(run_dir) if path.name <= saved.name][keep_last:]:
        if keep_every is None or int(path.name.removeprefix(STEP_PREFIX)) % keep_every:
            remove(path)


def saved_steps(run_dir: Path) -> list[Path]:
    """Directories of the checkpoints of a run, newest first."""
    return sorted(checkpoints_dir(run_dir).glob(STEP_PREFIX + "[0-9]" * 8), reverse=True)


def pointer_damage(pointer: Path, passed_over: list[Path]) -> str | None:
    """What is wrong with the pointer beside checkpoints, but for naming one that was passed over, or None."""
    if not pointer.exists():
        return f"{pointer}: missing (removed, or a kill came before it was first written); passed over"
    try:
        content = pointer.read_bytes()
        named = pointer.with_name(json.loads(content)["checkpoint"])
        if not named.is_dir():
            return f"{named}: missing; passed over"
        if named not in passed_over and content != (expected := pointer_to(named)):
            return f"{pointer}: says {content.decode()}, expected {expected.decode()}; passed over"
    except UNREADABLE as error:
        return f"{pointer}: {type(error).__name__}: {error}; passed over"
    return None


def examine(path: Path, part: int, parts: int) -> str | None:
    """What is wrong with this rank's part of a checkpoint, or None."""
    try:
        return Checkpoint(path).damage(part, parts)
    except UNREADABLE as error:
        return f"{type(error).__name__}: {error}"


def newest_good(run_dir: Path, world: World | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose digests agree, and a line for a bad pointer and each newer one that was passed over.

    Ranks share the reading of the files and agree on the answer.
    """
    part, parts = (world.rank, world.world_size) if world else (0, 1)
    bad: dict[Path, str] = {}
    good = None
    paths: list[Path] = gather(saved_steps(run_dir))[0]
    for path in paths:
        damages = [damage for damage in gather(examine(path, part, parts)) if damage is not None]
        if not damages:
            good = Checkpoint(path)
            break
        bad[path] = f"{path}: {damages[0]}; passed over"
    pointer = checkpoints_dir(run_dir) / POINTER_NAME
    damage = pointer_damage(pointer, list(bad)) if paths or pointer.exists() else None
    barrier()
    return good, [*filter(None, [damage]), *bad.values()]


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

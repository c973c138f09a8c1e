"""Checkpoints: safetensors fragments, elastic by construction, published atomically.

For every parameter there are three states, all fp32: `master`, `exp_avg` and `exp_avg_sq`. A
fragment is a run of consecutive elements of the flattened parameter, stored as
`<parameter>/<state>`. Any world size can load what any other saved, and the export reads the
masters with plain safetensors. Files and names: pretrain/checkpoint/layout.py.

Save (pretrain/checkpoint/saving.py): stage, digest, fsync, barrier, rename, then publish the
pointer. Load (pretrain/checkpoint/find.py): digests first; a file that the manifest does not name,
or names otherwise, makes the directory no checkpoint, and is not opened. So do states that are no
numbers. Nothing here is a pickle.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.errors import UserError, naming
from pretrain.checkpoint.layout import MANIFEST_NAME, SIDECAR_NAME, step_name
from pretrain.checkpoint.manifest import CheckpointManifest, SavedFile, sidecar_of
from pretrain.checkpoint.safetensors_file import BLOCK_NUMBERS, StoredTensor
from pretrain.modeling_tablefree import TableFreeConfig, TableFreeForCausalLM, checkpoint_parameters

BLOCK_BYTES = 4 << 20
# What damage raises; of OSErrors, those that `find.examine` takes for it.
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    SafetensorError,
)


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A run of consecutive elements of one flattened parameter, in every state."""

    name: str
    start: int
    states: dict[str, Tensor]  # master, exp_avg, exp_avg_sq: fp32, one dimension, equal lengths


class Checkpoint:
    """A checkpoint on disk: what its manifest says, and reads of any range of any parameter.

    Raises one of UNREADABLE if the manifest is damaged, or names files that no checkpoint has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming(path / MANIFEST_NAME):
            sidecar = (path / SIDECAR_NAME).read_bytes()
            expected = sidecar_of(path)
            if sidecar != expected:
                digest = expected.decode().split()[0]
                said = sidecar.decode(errors="replace").strip()
                raise ValueError(f"{MANIFEST_NAME}: digest {digest}, {SIDECAR_NAME} says {said}")
            content = (path / MANIFEST_NAME).read_bytes()
        self.manifest = CheckpointManifest.from_json(content)
        self._where: dict[str, list[tuple[int, int, str]]] = {name: [] for name in self.shapes}
        for file in self.manifest.files:
            for name, (start, count) in file.fragments.items():
                self._where[name].append((start, count, file.name))
        self._open: dict[str, Any] = {}

    @property
    def step(self) -> int:
        """How many steps of the run made it."""
        return self.manifest.step

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of every trained parameter, by its name in checkpoints."""
        return self.manifest.parameters

    def damage(self, part: int = 0, parts: int = 1) -> str | None:
        """What is wrong with every `parts`-th file from `part` on, or None when all digests agree.

        Raises OSError where a file can't be read.
        """
        if self.path.name != step_name(self.step):
            return f"its {MANIFEST_NAME} is of step {self.step}: it was renamed"
        named = {MANIFEST_NAME, SIDECAR_NAME, *(file.name for file in self.manifest.files)}
        for stranger in sorted(set(os.listdir(self.path)) - named):
            return f"{stranger} is not named in {MANIFEST_NAME}"
        for file in self.manifest.files[part::parts]:
            with naming(self.path / file.name):
                found = self._damage_of(file)
            if found is not None:
                return found
        return None

    def _damage_of(self, file: SavedFile) -> str | None:
        """What is wrong with one file, or None."""
        path = self.path / file.name
        if path.is_symlink() and path.resolve().parent != self.path.resolve():
            return f"{file.name} is a link that leads out of the checkpoint"
        if not path.is_file():
            return f"{file.name} is missing"
        if path.stat().st_size != file.bytes:
            return f"{file.name} has {path.stat().st_size:,} bytes, expected {file.bytes:,}"
        seen = read_through(path)
        if seen.xxh3_128 != file.xxh3_128:
            return f"{file.name} differs from its digest: {seen.xxh3_128}, expected {file.xxh3_128}"
        opened = self._file(file.name)  # raises unless its header is one of safetensors
        keys = list(opened.keys())  # a safetensors file, no dict
        del opened
        self.release()
        # Only a file that is spoilt is read once more, to tell where.
        for key in [] if seen.is_finite else keys:
            finite = is_finite(self._file(file.name).get_slice(key)[:])
            self.release()
            if not finite:
                return (
                    f"{key} holds what is no number: the weights were spoilt before they were saved"
                )
        return None

    def read(self, name: str, state: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of a flattened parameter's state, whichever files hold
        them: fp32, (count,). Raises UserError where some are in none.
        """
        pieces: list[Tensor] = []
        for first, length, file_name in sorted(self._where[name]):
            low = max(start, first)
            high = min(start + count, first + length)
            if low < high:
                stored = self._file(file_name).get_slice(f"{name}/{state}")
                pieces.append(stored[low - first : high - first])  # still mapped, not copied
        filled = sum(map(len, pieces))
        if filled != count:
            raise UserError(
                f"{self.path}: holds {filled:,} of {count:,} elements of {name}; the checkpoint "
                "is damaged"
            )
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat([torch.empty(0), *pieces])  # of no piece at all, where count is 0

    def parameter(self, name: str, state: str = "master") -> Tensor:
        """A whole parameter in its shape, fp32."""
        shape = self.shapes[name]
        return self.read(name, state, 0, torch.Size(shape).numel()).view(shape)

    def stored(self, name: str) -> StoredTensor:
        """A parameter's fp32 master, which is read some millions of numbers at a time."""
        shape = tuple(self.shapes[name])
        return StoredTensor(shape=shape, blocks=lambda: self._blocks(name, math.prod(shape)))

    def _blocks(self, name: str, count: int) -> Iterator[Tensor]:
        for start in range(0, count, BLOCK_NUMBERS):
            yield self.read(name, "master", start, min(BLOCK_NUMBERS, count - start))
            self.release()

    def release(self) -> None:
        """Give back the memory of what was read: a mapped file's counts as this process's.

        What was read and is still held stays.
        """
        self._open.clear()

    def _file(self, file_name: str) -> Any:
        if file_name not in self._open:
            self._open[file_name] = safe_open(self.path / file_name, "pt")
        return self._open[file_name]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one reading of a file of fragments shows."""

    xxh3_128: str
    is_finite: bool  # all numbers behind its header, taken for fp32, are numbers


def read_through(path: Path) -> Seen:
    """Read a safetensors file of fp32 once, for its digest and its numbers: a large one that is not
    in the cache comes from the disk each time that it is read. Raises OSError.
    """
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(BLOCK_BYTES))
    position = 0  # of the block in the file
    data_begin = 0
    finite = True
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # reads ahead further
        while count := read_whole(file, buffer):
            block = buffer[:count]
            digest.update(block)
            if position == 0:  # the header's length, 8 bytes, then the header, then numbers
                data_begin = 8 + int.from_bytes(block[:8], "little")
            numbers = block[min(count, max(0, data_begin - position)) :]
            whole = len(numbers) - len(numbers) % 4
            finite &= bool(np.isfinite(np.frombuffer(numbers[:whole], np.float32)).all())
            position += count
    return Seen(xxh3_128=digest.hexdigest(), is_finite=finite)


def read_whole(file: FileIO, buffer: memoryview) -> int:
    """Fill a buffer, as far as the file goes: one read may give less. Returns the bytes in it."""
    count = 0
    while count < len(buffer) and (got := file.readinto(buffer[count:])):
        count += got
    return count


def is_finite(values: Tensor) -> bool:
    """Whether an fp32 vector holds numbers alone: no NaN, no infinity.

    By NumPy: torch would take all cores for it, which train meanwhile.
    """
    blocks = values.split(BLOCK_BYTES // values.element_size())
    return all(np.isfinite(block.cpu().numpy()).all() for block in blocks)


def load_model(checkpoint: Checkpoint) -> TableFreeForCausalLM:
    """The training class holding the fp32 masters, without DeepSpeed."""
    model = TableFreeForCausalLM(TableFreeConfig.from_dict(checkpoint.manifest.model_config))
    with torch.no_grad():
        for name, parameter in checkpoint_parameters(model):
            parameter.copy_(checkpoint.parameter(name))
            checkpoint.release()
    return model

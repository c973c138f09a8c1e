"""Saving a checkpoint: on all ranks, into a staging directory that gets its name when all of it is
on the disk.

What a checkpoint is, and how it is read, is in pretrain/checkpoint/reader.py. A disk or a file
server that fails once is tried again (pretrain/checkpoint/patience.py); one that goes on failing
ends the run by a failure, a full one by what to do about it.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from data_prep.errors import USER_ERROR_EXIT_CODE, RetryableError, UserError, naming
from data_prep.files import fsync_directory, write_durably
from pretrain.checkpoint.layout import (
    MANIFEST_NAME,
    POINTER_NAME,
    SIDECAR_NAME,
    checkpoints_dir,
    disk_of,
    step_name,
)
from pretrain.checkpoint.manifest import (
    CheckpointManifest,
    SavedFile,
    pointer_to,
    sidecar_of,
)
from pretrain.checkpoint.patience import patiently
from pretrain.checkpoint.reader import BLOCK_BYTES, Fragment, is_finite
from pretrain.checkpoint.retention import make_way, new_staging, sweep
from pretrain.distributed.agree import Group, SharedError, gather, together
from pretrain.distributed.world import World

Callback = Callable[[], None] | None


@dataclass(frozen=True, kw_only=True)
class Savers:
    """The ranks that save together, and how they meet."""

    world: World
    group: Group = None  # of their own, where training exchanges meanwhile; None: the default one
    on_block: Callback = None  # called as writing moves on


def safetensors_blocks(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file of fp32 vectors, a few MB at a time and as they lie in
    memory.

    The format: https://github.com/huggingface/safetensors (an 8-byte length, a JSON header, data).
    """
    header = {}
    end = 0
    for name, values in tensors.items():
        begin = end
        end += values.nbytes
        header[name] = {"dtype": "F32", "shape": [len(values)], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8 bytes
    yield len(text).to_bytes(8, "little") + text
    for values in tensors.values():
        for block in values.split(BLOCK_BYTES // values.element_size()):
            yield block.cpu().contiguous().view(torch.uint8).numpy().data


def write_fragments(
    path: Path, fragments: Sequence[Fragment], on_block: Callback = None
) -> SavedFile:
    """Write one rank's file, digested on the way, and flush it to disk; its entry in the manifest.

    Raises OSError, naming the file.
    """
    tensors = {f"{f.name}/{state}": values for f in fragments for state, values in f.states.items()}
    digest = xxhash.xxh3_128()
    on_its_way = 0  # bytes that the disk was told to begin with
    with naming(path), path.open("wb") as file:
        for block in safetensors_blocks(tensors):
            digest.update(block)
            file.write(block)
            if on_block:
                on_block()
            # Have the disk begin, so that little is left to the fsync.
            if file.tell() - on_its_way > BLOCK_BYTES:
                os.posix_fadvise(file.fileno(), on_its_way, 0, os.POSIX_FADV_DONTNEED)
                on_its_way = file.tell()
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return SavedFile(
        name=path.name,
        bytes=size,
        xxh3_128=digest.hexdigest(),
        fragments={f.name: [f.start, f.states["master"].numel()] for f in fragments},
    )


def save_checkpoint(
    run_dir: Path, fragments: Sequence[Fragment], manifest: CheckpointManifest, savers: Savers
) -> Path:
    """Save on all ranks; the checkpoint exists, whole, once its directory has its final name.

    `manifest` lacks its files, which are added here. Raises UserError on every rank if any rank
    fails (a full disk, say, naming disk and bytes), with the exit code of a RetryableError where
    its disk fails or its state is no numbers; what was saved before stays as it was.
    """
    world = savers.world
    group = savers.group
    final = checkpoints_dir(run_dir) / step_name(manifest.step)
    together(lambda: refuse_what_is_no_number(final, fragments), group)
    own_bytes = sum(values.nbytes for f in fragments for values in f.states.values())
    needed = sum(gather(own_bytes, group))
    staging = None
    try:
        own_staging = together(
            lambda: prepare_staging(final, needed) if world.is_main else None, group
        )
        staging = gather(own_staging, group)[0]
        own_file = staging / f"rank-{world.rank:05d}-of-{world.world_size:05d}.safetensors"
        own_entry = together(
            lambda: patiently(lambda: write_fragments(own_file, fragments, savers.on_block)), group
        )
        whole = replace(manifest, files=tuple(gather(own_entry, group)))
        together(lambda: complete(staging, final, whole) if world.is_main else None, group)
    except UserError as error:
        if staging and world.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        raise SharedError(why_not_written(final, needed, error), error.exit_code) from None
    return final


def refuse_what_is_no_number(final: Path, fragments: Sequence[Fragment]) -> None:
    """Raise `RetryableError` for weights or moments that hold NaN or infinity: nothing could be
    trained from them.
    """
    for fragment in fragments:
        for state, values in fragment.states.items():
            if not is_finite(values):
                raise RetryableError(
                    f"{final}: not written: {fragment.name}/{state} holds what is no number, so "
                    "training diverged or a device failed; the checkpoints before it stay, and "
                    "the same command goes on from the newest"
                )


def prepare_staging(final: Path, needed: int) -> Path:
    """Clear away what saves before left, and make a directory to write in. Raises OSError for
    too small a disk.
    """
    home = final.parent
    patiently(lambda: home.mkdir(parents=True, exist_ok=True))
    sweep(home)
    staging = patiently(lambda: new_staging(final))
    if disk_of(home)[1] < needed:
        staging.rmdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return staging


def complete(staging: Path, final: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest over the files of all ranks, and publish."""

    def write_manifest() -> None:
        write_durably(staging / MANIFEST_NAME, manifest.to_json())
        write_durably(staging / SIDECAR_NAME, sidecar_of(staging))

    patiently(write_manifest)
    patiently(lambda: publish(staging, final))


def publish(staging: Path, final: Path) -> None:
    """Give a complete checkpoint its final name and point to it."""
    # Where it is gone, an attempt before this one renamed it, whatever the file server answered.
    if staging.is_dir():
        make_way(final)
        os.rename(staging, final)
    fsync_directory(final.parent)
    write_durably(final.parent / POINTER_NAME, pointer_to(final))


def why_not_written(final: Path, needed: int, error: UserError) -> str:
    """The line on a save that failed."""
    if error.exit_code != USER_ERROR_EXIT_CODE:
        return (
            f"{final}: not written: {error}; the checkpoint before it stays, and the same command "
            "continues"
        )
    mount, free = disk_of(final.parent)
    return (
        f"{final}: not written: {error}; it needs {needed:,} bytes, the disk mounted at {mount} "
        f"has {free:,} free; make room or mend that, and the same command continues"
    )

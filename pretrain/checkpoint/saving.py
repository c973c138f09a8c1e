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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from data_prep.errors import USER_ERROR_EXIT_CODE, RetryableError, UserError, naming
from data_prep.files import fsync_directory, write_durably
from pretrain.checkpoint.patience import patiently
from pretrain.checkpoint.reader import (
    BLOCK_BYTES,
    FORMAT,
    FORMAT_VERSION,
    POINTER_NAME,
    Fragment,
    checkpoints_dir,
    disk_of,
    is_finite,
    pointer_to,
    sidecar_of,
)
from pretrain.checkpoint.retention import (
    MANIFEST_NAME,
    SIDECAR_NAME,
    make_way,
    new_staging,
    step_name,
    sweep,
)
from pretrain.distributed.ranks import Group, SharedError, gather, together
from pretrain.distributed.world import World

Callback = Callable[[], None] | None


def safetensors_blocks(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file of fp32 vectors, a few MB at a time and as they lie in
    memory.
    """
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


def write_fragments(
    path: Path, fragments: list[Fragment], on_block: Callback = None
) -> dict[str, Any]:
    """Write one rank's file, digested on the way, and flush it to disk; returns its entry in the
    manifest.
    """
    tensors = {f"{f.name}/{state}": values for f in fragments for state, values in f.states.items()}
    digest, on_its_way = xxhash.xxh3_128(), 0
    with naming(path), path.open("wb") as file:
        for block in safetensors_blocks(tensors):
            digest.update(block)
            file.write(block)
            if on_block:
                on_block()
            # have the disk begin, so that little is left to the fsync
            if file.tell() - on_its_way > BLOCK_BYTES:
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

    `about` is what the manifest says beside step and files; `on_block` is called as writing moves
    on. Raises UserError on every rank if any rank fails (a full disk, say, naming disk and bytes),
    with the exit code of a RetryableError where its disk fails or its state is no numbers; what was
    saved before stays as it was.
    """
    final = checkpoints_dir(run_dir) / step_name(step)
    together(lambda: refuse_what_is_no_number(final, fragments), group)
    needed = sum(
        gather(sum(values.nbytes for f in fragments for values in f.states.values()), group)
    )
    staging = None
    try:
        own_staging = together(
            lambda: prepare_staging(final, needed) if world.is_main else None, group
        )
        staging = gather(own_staging, group)[0]
        own_file = staging / f"rank-{world.rank:05d}-of-{world.world_size:05d}.safetensors"
        own_entry = together(
            lambda: patiently(lambda: write_fragments(own_file, fragments, on_block)), group
        )
        manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": step, **about}
        manifest["files"] = gather(own_entry, group)
        together(lambda: complete(staging, final, manifest) if world.is_main else None, group)
    except UserError as error:
        if staging and world.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        raise SharedError(why_not_written(final, needed, error), error.exit_code) from None
    return final


def refuse_what_is_no_number(final: Path, fragments: list[Fragment]) -> None:
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


def complete(staging: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest over the files of all ranks, and publish."""

    def write_manifest() -> None:
        write_durably(staging / MANIFEST_NAME, json.dumps(manifest, indent=1).encode())
        write_durably(staging / SIDECAR_NAME, sidecar_of(staging))

    patiently(write_manifest)
    patiently(lambda: publish(staging, final))


def publish(staging: Path, final: Path) -> None:
    """Give a complete checkpoint its final name and point to it."""
    # else an attempt before this one renamed it, whatever the file server answered
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

"""Staging: a copy of the data set on a node's local disk, made once.

It is for clusters whose shared disk is slow.

    <stage_dir>/<fingerprint>/             the data set; a file gets its name when it is whole and
                                           on the disk
    <stage_dir>/<fingerprint>.uid-<uid>/   the same, of a user who found another's copy there, and
                                           not a whole one

Every node reads all shards, since each step draws its windows from all of them. Ranks of a node
take turns at a lock, without a time limit: the first copies what is not there, the others find it.
A node that is done waits for the others DEEPSPEED_TIMEOUT minutes, 10 unless that is set; if one of
them fails, all end with its line.

Users of a node share a copy: the one who made it keeps it in order, others read it where it is
whole. The digests of all of it are checked after that, by pretrain/data/data_check.py.
"""

import contextlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep.errors import UserError, explained
from data_prep.files import digest_file, fsync_directory, write_durably
from data_prep.locks import lock
from data_prep.manifest import MANIFEST_NAME, check_links
from data_prep.shards import (
    SHARD_HEADER_BYTES,
    TOKENIZER_NAME,
    ShardReader,
    read_tokenizer,
    shard_header,
)
from pretrain.data.digests import digests_of

COPIES_AT_ONCE = 4


def staged(reader: ShardReader, stage_dir: Path) -> ShardReader:
    """The data set in its local copy, which is made, or mended, first.

    Raises UserError if there is no room for it.
    """
    home = home_of_copy(reader, stage_dir)
    if is_ours(home):
        with lock(home, "copying the data set there", "data.stage_dir", wait=True):
            check_links(home, reader.manifest)
            copy_data_set(reader, home)
    return ShardReader(home)


def is_ours(directory: Path) -> bool:
    """Whether this user made a directory, or may do as if."""
    try:
        return os.geteuid() in (0, directory.stat().st_uid)
    except (FileNotFoundError, PermissionError):
        return False


def home_of_copy(reader: ShardReader, stage_dir: Path) -> Path:
    """Where the copy is, or is to be made: another user's is taken only where it is whole.

    Raises UserError if this user may neither read a whole one nor make one.
    """
    shared = stage_dir / reader.manifest.fingerprint
    own = stage_dir / f"{reader.manifest.fingerprint}.uid-{os.geteuid()}"
    with contextlib.suppress(PermissionError):
        shared.mkdir(parents=True, exist_ok=True)
    if is_ours(shared):
        return shared
    if not own.exists() and is_whole(reader, shared):
        return shared
    problem = f"data.stage_dir {stage_dir}: you may not make a copy of the data there"
    advice = (
        f"give a directory of your own, such as {stage_dir}-$USER, or have its owner chmod 1777 "
        f"{stage_dir}"
    )
    with explained(PermissionError, problem, advice):
        own.mkdir(parents=True, exist_ok=True)
    return own


def is_whole(reader: ShardReader, home: Path) -> bool:
    """Whether a copy holds every file in its full size, and may be read."""
    try:
        # Which is written last.
        has_manifest = (home / MANIFEST_NAME).read_bytes() == reader.manifest.to_bytes()
        check_links(home, reader.manifest)
        return has_manifest and not missing_files(reader, home)
    except (UserError, FileNotFoundError, PermissionError):
        return False


def missing_files(reader: ShardReader, home: Path) -> dict[str, int]:
    """Files that a copy lacks, has in another size, or with another header; and their bytes."""
    missing = {}
    for shard in reader.manifest.shards:
        headers = {shard.path: shard_header(shard.tokens), shard.index_path: b""}
        for path, header in headers.items():
            copy = home / path
            size = (reader.data_dir / path).stat().st_size
            is_there = copy.is_file() and copy.stat().st_size == size
            if not is_there or not first_bytes(copy).startswith(header):
                missing[path] = size
    return missing


def first_bytes(path: Path) -> bytes:
    """As many bytes of a file as a shard's header has."""
    with path.open("rb", buffering=0) as file:
        return file.read(SHARD_HEADER_BYTES)


def copy_data_set(reader: ShardReader, home: Path) -> None:
    """Copy what is not there yet in its full size.

    Shards and indexes come first, then the tokenizer, and last the manifest.
    """
    digests = digests_of(reader.manifest.shards)
    missing = missing_files(reader, home)
    needed = sum(missing.values())
    free = shutil.disk_usage(home).free
    if needed > free:
        raise UserError(
            f"data.stage_dir {home.parent}: {needed:,} bytes to copy, {free:,} are free; make "
            "room, give a larger disk, or leave data.stage_dir out"
        )

    def copy_one(path: str) -> None:
        copy_checked(reader.data_dir, home, path, digests[path])

    with ThreadPoolExecutor(COPIES_AT_ONCE) as threads:
        for _ in threads.map(copy_one, missing):
            pass  # what one of them raised, asking for its result raises
    last = {}
    for name, held in read_tokenizer(reader.data_dir / TOKENIZER_NAME).items():
        last[f"{TOKENIZER_NAME}/{name}"] = held
    last[MANIFEST_NAME] = (reader.data_dir / MANIFEST_NAME).read_bytes()
    for path, content in last.items():
        copy = home / path
        if not copy.is_file() or copy.read_bytes() != content:
            write_durably(copy, content)


def copy_checked(data_dir: Path, home: Path, path: str, digest: str) -> None:
    """Copy one file under a name of its own, check what arrived, then give it its name."""
    copy = home / f"{path}.tmp"
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.unlink(missing_ok=True)  # what a kill left there; or a link, which copying would follow
    shutil.copyfile(data_dir / path, copy)
    with copy.open("rb") as written:
        os.fsync(written.fileno())
    if digest_file(copy) != digest:
        copy.unlink()
        raise UserError(
            f"{data_dir / path}: differs from its digest; run python -m data_prep.verify on "
            f"{data_dir}"
        )
    copy.rename(home / path)
    fsync_directory(copy.parent)

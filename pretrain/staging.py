"""Staging: a copy of the data set on a node's local disk, made once, for clusters whose shared disk is slow.

    <stage_dir>/<fingerprint>/       the data set; its manifest is copied last, so its existence means complete

Every node reads all shards, since each step draws its windows from all of them. Ranks of a node take turns at a lock:
the first copies, the others find the copy. No process group exists yet, so none can time out.
"""

import fcntl
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep.errors import UserError
from data_prep.shards import MANIFEST_NAME, TOKENIZER_NAME, ShardReader, digest_file, fsync_directory, write_durably

COPIES_AT_ONCE = 4


def staged(reader: ShardReader, stage_dir: Path) -> ShardReader:
    """The data set in its local copy, which is made first if need be. Raises UserError if there is no room for it."""
    home = stage_dir / reader.manifest.fingerprint
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / MANIFEST_NAME).is_file():
            copy_data_set(reader, home)
    return ShardReader(home)


def copy_data_set(reader: ShardReader, home: Path) -> None:
    """Copy what is not there yet: shards and indexes, then the tokenizer, the manifest last."""
    files: dict[str, str] = {}
    for shard in reader.manifest.shards:
        files |= {shard.path: shard.xxh3_128, shard.index_path: shard.index_xxh3_128}
    missing = {path: digest for path, digest in files.items() if not (home / path).is_file()}
    needed = sum((reader.data_dir / path).stat().st_size for path in missing)
    free = shutil.disk_usage(home).free
    if needed > free:
        raise UserError(
            f"data.stage_dir {home.parent}: {needed:,} bytes to copy, {free:,} are free; make room, give a larger "
            f"disk, or leave data.stage_dir out"
        )
    with ThreadPoolExecutor(COPIES_AT_ONCE) as threads:
        list(threads.map(lambda item: copy_checked(reader.data_dir, home, *item), missing.items()))
    for file in [*sorted((reader.data_dir / TOKENIZER_NAME).glob("*")), reader.data_dir / MANIFEST_NAME]:
        write_durably(home / file.relative_to(reader.data_dir), file.read_bytes())


def copy_checked(data_dir: Path, home: Path, path: str, digest: str) -> None:
    """Copy one file under a name of its own, check what arrived, then give it its name."""
    copy = home / f"{path}.tmp"
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(data_dir / path, copy)
    if digest_file(copy) != digest:
        copy.unlink()
        raise UserError(f"{data_dir / path}: differs from its digest; run python -m data_prep.verify on {data_dir}")
    copy.rename(home / path)
    fsync_directory(copy.parent)

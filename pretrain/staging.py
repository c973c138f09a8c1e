"""Staging: a copy of the data set on a node's local disk, made once, for clusters whose shared disk is slow.

    <stage_dir>/<fingerprint>/       the data set; a file gets its name when it is whole and on the disk

Every node reads all shards, since each step draws its windows from all of them. Ranks of a node take turns at a lock,
without a time limit: the first copies what is not there, the others find it. A node that is done waits for the others
DEEPSPEED_TIMEOUT minutes, 10 unless that is set; if one of them fails, all end with its line.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep.errors import UserError
from data_prep.shards import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    ShardReader,
    check_links,
    digest_file,
    fsync_directory,
    lock,
    read_tokenizer,
    write_durably,
)

COPIES_AT_ONCE = 4


def staged(reader: ShardReader, stage_dir: Path) -> ShardReader:
    """The data set in its local copy, which is made, or mended, first. Raises UserError if there is no room for it."""
    home = stage_dir / reader.manifest.fingerprint
    with lock(home, "copying the data set there", "data.stage_dir", wait=True):
        check_links(home, reader.manifest)
        copy_data_set(reader, home)
    copy = ShardReader(home)
    try:
        for shard in copy.manifest.shards:
            copy.tokens(shard)
    except UserError as error:
        damage = str(error).rpartition("; ")[0]  # what follows is help for a data set
        raise UserError(f"data.stage_dir {stage_dir}: {damage}; remove {home}, and it is copied again") from None
    return copy


def copy_data_set(reader: ShardReader, home: Path) -> None:
    """Copy what is not there yet in its full size: shards and indexes, then the tokenizer and the manifest."""
    files: dict[str, str] = {}
    for shard in reader.manifest.shards:
        files |= {shard.path: shard.xxh3_128, shard.index_path: shard.index_xxh3_128}
    sizes = {path: (reader.data_dir / path).stat().st_size for path in files}
    missing = [path for path in files if not (home / path).is_file() or (home / path).stat().st_size != sizes[path]]
    needed = sum(sizes[path] for path in missing)
    free = shutil.disk_usage(home).free
    if needed > free:
        raise UserError(
            f"data.stage_dir {home.parent}: {needed:,} bytes to copy, {free:,} are free; make room, give a larger "
            f"disk, or leave data.stage_dir out"
        )
    with ThreadPoolExecutor(COPIES_AT_ONCE) as threads:
        list(threads.map(lambda path: copy_checked(reader.data_dir, home, path, files[path]), missing))
    last = {f"{TOKENIZER_NAME}/{name}": held for name, held in read_tokenizer(reader.data_dir / TOKENIZER_NAME).items()}
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
        raise UserError(f"{data_dir / path}: differs from its digest; run python -m data_prep.verify on {data_dir}")
    copy.rename(home / path)
    fsync_directory(copy.parent)

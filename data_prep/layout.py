"""Where the files of a data set lie, and whether a path is one of these.

    shards/<split>/<source>/<unit>.npy             token ids
    shards/<split>/<source>/<unit>.documents.npy   document index
    units/<source>/<unit>.json                     record of a finished work unit

A manifest comes from wherever its data set does, so its paths are not taken on trust: each must be
the one that this layout gives, and no link on the way may lead out. Two links are somebody's own
doing and are followed: the data set's directory, and `shards/` in it, so that shards can lie on a
larger disk.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

SPLITS = ("train", "validation")
SHARDS_NAME = "shards"
UNITS_NAME = "units"
# of a source or a unit: it names a directory or file, and no other
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SHARD_SUFFIX, INDEX_SUFFIX, RECORD_SUFFIX = ".npy", ".documents.npy", ".json"
UNIT = r"\d{5,}-[A-Za-z0-9._-]*-\d{5,}"  # file, its name, part: what builds name a unit
WRITTEN = re.compile(  # what builds write in these folders, whole or not
    rf"{SHARDS_NAME}/({'|'.join(SPLITS)})/{NAME.pattern}/{UNIT}(\.documents)?\.npy(\.tmp)?"
    rf"|{UNITS_NAME}/{NAME.pattern}/{UNIT}\.json(\.tmp)?"
)


def shard_path(split: str, source: str, unit: str) -> str:
    """Where a unit's shard of a split lies in the data set."""
    return f"{SHARDS_NAME}/{split}/{source}/{unit}{SHARD_SUFFIX}"


def record_path(source: str, unit: str) -> str:
    """Where the record of a finished unit lies in the data set."""
    return f"{UNITS_NAME}/{source}/{unit}{RECORD_SUFFIX}"


def is_name(text: str) -> bool:
    """Whether a source or a unit can have this name."""
    return NAME.fullmatch(text) is not None


def is_shard_path(path: str, split: str, source: str) -> bool:
    """Whether the layout gives this path to a shard of a split and source."""
    unit = path.rpartition("/")[2].removesuffix(SHARD_SUFFIX)
    is_other = f"{unit}{SHARD_SUFFIX}".endswith(INDEX_SUFFIX)
    return (
        split in SPLITS
        and is_name(source)
        and is_name(unit)
        and not is_other
        and path == shard_path(split, source, unit)
    )


def is_written_by_builds(path: str) -> bool:
    """Whether builds write files of this path (relative to the data set); others are somebody's
    own.
    """
    return WRITTEN.fullmatch(path) is not None


def links_out(home: Path, paths: Iterable[str]) -> Iterator[Path]:
    """Those of some paths (relative to a directory of ours, with forward slashes) that a link leads
    out of it.

    Each directory is listed once, so that many files cost no look at each. What is not there leads
    nowhere.
    """
    wanted: dict[str, set[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        wanted.setdefault(folder, set()).add(name)
    roots = (os.path.realpath(home), os.path.realpath(home / SHARDS_NAME))

    def is_outside(path: Path | str) -> bool:
        real = os.path.realpath(path)
        return not any(real == root or real.startswith(root.rstrip("/") + "/") for root in roots)

    for folder, names in wanted.items():
        directory = home / folder
        if is_outside(directory):
            yield directory
        elif directory.is_dir():
            with os.scandir(directory) as entries:
                links = sorted(
                    entry.name for entry in entries if entry.name in names and entry.is_symlink()
                )
            yield from (directory / name for name in links if is_outside(directory / name))

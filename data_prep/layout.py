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
# Of a source or a unit: it names a directory or file, and no other.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SHARD_SUFFIX = ".npy"
INDEX_SUFFIX = ".documents.npy"
RECORD_SUFFIX = ".json"
UNIT = r"\d{5,}-[A-Za-z0-9._-]*-\d{5,}"  # file, its name, part: what builds name a unit
ANY_SPLIT = "|".join(SPLITS)
# What builds write in these folders, whole or not.
WRITTEN_SHARD = rf"{SHARDS_NAME}/({ANY_SPLIT})/{NAME.pattern}/{UNIT}(\.documents)?\.npy(\.tmp)?"
WRITTEN_RECORD = rf"{UNITS_NAME}/{NAME.pattern}/{UNIT}\.json(\.tmp)?"
WRITTEN = re.compile(f"{WRITTEN_SHARD}|{WRITTEN_RECORD}")


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
    _, _, name = path.rpartition("/")
    unit = name.removesuffix(SHARD_SUFFIX)
    if split not in SPLITS or not is_name(source) or not is_name(unit):
        return False
    # A unit named `x.documents` would have its shard where the index of unit `x` lies.
    is_index = f"{unit}{SHARD_SUFFIX}".endswith(INDEX_SUFFIX)
    return not is_index and path == shard_path(split, source, unit)


def is_written_by_builds(path: str) -> bool:
    """Whether builds write files of this path, relative to the data set; others are not ours."""
    return WRITTEN.fullmatch(path) is not None


def links_out(home: Path, paths: Iterable[str]) -> Iterator[Path]:
    """Those of some paths of a data set that a link leads out of it.

    Paths are relative to `home`, with forward slashes. Each directory is listed once, so that many
    files cost no look at each. What is not there leads nowhere.
    """
    roots = (os.path.realpath(home), os.path.realpath(home / SHARDS_NAME))
    for folder, names in _by_folder(paths).items():
        directory = home / folder
        if _is_outside(directory, roots):
            yield directory
        elif directory.is_dir():
            for name in _links_of(directory, names):
                if _is_outside(directory / name, roots):
                    yield directory / name


def _by_folder(paths: Iterable[str]) -> dict[str, set[str]]:
    """The names of files, by the folder that they lie in."""
    names: dict[str, set[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        names.setdefault(folder, set()).add(name)
    return names


def _links_of(directory: Path, names: set[str]) -> list[str]:
    """Which of some files of a directory are links."""
    with os.scandir(directory) as entries:
        return sorted(entry.name for entry in entries if entry.name in names and entry.is_symlink())


def _is_outside(path: Path, roots: Iterable[str]) -> bool:
    """Whether a path leads to none of some directories, nor to what lies in them."""
    real = os.path.realpath(path)
    for root in roots:
        inside = root.rstrip("/") + "/"  # of the root directory, one slash alone
        if real == root or real.startswith(inside):
            return False
    return True

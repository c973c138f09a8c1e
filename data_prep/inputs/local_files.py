"""Files on this machine that a path or glob names, and whether all are there that should be.

What a glob leaves out in silence is text that nobody misses: links that lead nowhere are errors,
gaps in numbered parts warnings.
"""

import functools
import glob
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from data_prep.errors import UserError, printable

PART = re.compile(r"(.*?)(\d{4,})-of-(\d{4,})(.*)", re.DOTALL)  # train-00003-of-00010.parquet
# Of each part, after its number: train-00003-of-00010-d964455e17e96d5a.parquet.
OWN_HASH = re.compile(r"[0-9a-f]{8,}")
PARTS_NAMED = 3  # of those that are missing


def matching_files(base: Path, pattern: str, where: str) -> dict[str, Path]:
    """The files that a path (relative to `base`) or glob names, and where they lie; sorted by name.

    Raises UserError for a link that leads nowhere, and for a name or folder that is not UTF-8: no
    manifest, and no reader of parquet, can name it.
    """
    if os.path.lexists(base / pattern):
        found = [pattern]
    else:
        refuse_closed_folders(base, pattern, where)
        matches = glob.glob(pattern, root_dir=base, recursive=True)
        found = sorted(set(matches))  # ** may find one twice
    paths = {}
    for name in found:
        path = (base / name).absolute()
        refuse_dangling(path, name, where)
        if not path.is_file():
            continue
        if not is_utf8(str(path)):
            raise UserError(f"{where}: {escaped(str(path))}: its name is not UTF-8; rename it")
        paths[name] = path
    return paths


def refuse_dangling(path: Path, name: str, where: str) -> None:
    """Raise UserError for a link that leads nowhere."""
    if path.is_symlink() and not path.exists():
        target = escaped(os.readlink(path))
        problem = f"is a link that leads nowhere (to {target})"
        raise UserError(
            f"{where}: {escaped(name)}: {problem}; bring back what it leads to, or remove it"
        )


def refuse_closed_folders(base: Path, pattern: str, where: str) -> None:
    """Raise UserError for a folder that a glob would pass over.

    That is one that can't be listed, or a link to none.
    """
    parts = Path(pattern).parts
    for end in range(1, len(parts)):
        beginning = parts[:end]
        if "**" in beginning:
            break  # below it, any link that leads nowhere may be of something else
        folder = str(Path(*beginning))
        if not glob.has_magic(folder):
            continue
        for name in glob.glob(folder, root_dir=base):
            path = base / name
            refuse_dangling(path, name, where)
            may_be_listed = os.access(path, os.R_OK | os.X_OK, effective_ids=True)
            if path.is_dir() and not may_be_listed:
                raise UserError(
                    f"{where}: {escaped(name)}: may not be listed; check its permissions"
                )


def is_utf8(name: str) -> bool:
    """Whether a name that the operating system gave is text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def escaped(name: str) -> str:
    """A name in letters that can be printed anywhere: bytes that are not UTF-8 as \\xNN."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


class Family(NamedTuple):
    """Numbered parts of one whole, by what they share: their names but for their own numbers."""

    head: str
    total: str  # as written
    tail: str  # with * for the part's own hash

    def name_of(self, number: int, width: int) -> str:
        """The name of a part, whose number is written in so many digits."""
        return f"{self.head}{number:0{width}d}-of-{self.total}{self.tail}"

    def missing(self, numbers: set[int]) -> list[int]:
        """The parts that are not among the numbers; they count from 0, or from 1."""
        count = int(self.total)
        if len(numbers) >= count:
            return []
        is_from_1 = count in numbers and 0 not in numbers
        first = 1 if is_from_1 else 0
        whole = range(first, first + count)
        return [number for number in whole if number not in numbers]


def warn_of_gaps(names: Iterable[str], where: str) -> None:
    """Say which numbered parts are not among the files that a glob found.

    Their names hold -0000N-of-0000M, counted from 0 or 1.
    """
    families: dict[Family, set[int]] = {}
    widths: dict[Family, int] = {}
    for name in names:
        match = PART.fullmatch(name)
        if not match:
            continue
        head, number, total, rest = match.groups()
        family = Family(head, total, tail=OWN_HASH.sub("*", rest))
        numbers = families.setdefault(family, set())
        numbers.add(int(number))
        widths[family] = len(number)
    for family, numbers in families.items():
        missing = family.missing(numbers)
        if not missing:
            continue
        width = widths[family]
        named = ", ".join(family.name_of(number, width) for number in missing[:PARTS_NAMED])
        unnamed = len(missing) - PARTS_NAMED
        more = f" and {unnamed:,} more" if unnamed > 0 else ""
        count = int(family.total)
        text = (
            f"{len(missing):,} of {count:,} parts are not there: {named}{more}; fetch them unless "
            "that is meant"
        )
        print(f"warning: {where}: {text}", file=sys.stderr)


def warn_of_one_file_twice(paths: Mapping[str, Path], where: str) -> None:
    """Say which files of a source, by name and path, are one.

    The text of such a link or hard link would count twice.
    """
    names: dict[tuple[int, int], str] = {}  # by device and inode
    for name, path in paths.items():
        about = path.stat()
        place = (about.st_dev, about.st_ino)
        first_name = names.setdefault(place, name)
        has_place = about.st_ino != 0  # some file systems give no number
        if first_name != name and has_place and about.st_size:
            text = (
                f"{name} and {first_name} are one file (a link), so its text counts twice; name "
                "one of the two"
            )
            print(printable(f"warning: {where}: {text}"), file=sys.stderr)


def refuse_inside(output_dir: Path, files: Iterable[str], where: str) -> None:
    """Raise UserError for a file inside of the output directory.

    What is built would be taken for input next time.
    """
    home = Path(os.path.realpath(output_dir))

    @functools.cache  # many files lie in one folder
    def is_inside(folder: str) -> bool:
        return Path(os.path.realpath(folder)).is_relative_to(home)

    for file in files:
        local = file.removeprefix("file://")
        if "://" in local:
            continue
        places = [local]
        if os.path.islink(local):
            places.append(os.path.realpath(local))
        if any(is_inside(os.path.dirname(place)) for place in places):
            problem = f"{local} lies inside --output-dir {output_dir}, which holds what is built"
            raise UserError(
                f"{where}: {problem}; name other files, or choose an --output-dir elsewhere"
            )

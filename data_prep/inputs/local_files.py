"""Files on this machine that a path or glob names, and whether all are there that should be.

What a glob leaves out in silence is text that nobody misses: links that lead nowhere are errors,
gaps in numbered parts warnings.
"""

import glob
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from data_prep.errors import UserError, printable

PART = re.compile(r"(.*?)(\d{4,})-of-(\d{4,})(.*)", re.DOTALL)  # train-00003-of-00010.parquet
# of each part, after its number: train-00003-of-00010-d964455e17e96d5a.parquet
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
        found = sorted(set(glob.glob(pattern, root_dir=base, recursive=True)))
    paths = {}
    for name in found:
        path = (base / name).absolute()
        refuse_dangling(path, name, where)
        if path.is_file():
            if not is_utf8(str(path)):
                raise UserError(f"{where}: {escaped(str(path))}: its name is not UTF-8; rename it")
            paths[name] = path
    return paths


def refuse_dangling(path: Path, name: str, where: str) -> None:
    """Raise UserError for a link that leads nowhere."""
    if path.is_symlink() and not path.exists():
        problem = f"is a link that leads nowhere (to {escaped(os.readlink(path))})"
        raise UserError(
            f"{where}: {escaped(name)}: {problem}; bring back what it leads to, or remove it"
        )


def refuse_closed_folders(base: Path, pattern: str, where: str) -> None:
    """Raise UserError for a folder that a glob would pass over: one that can't be listed, or a
    link to none.
    """
    parts = Path(pattern).parts
    for end in range(1, len(parts)):
        folder = str(Path(*parts[:end]))
        if "**" in parts[:end] or not glob.has_magic(folder):
            continue  # below **, any link that leads nowhere may be of something else
        for name in glob.glob(folder, root_dir=base):
            refuse_dangling(base / name, name, where)
            if (base / name).is_dir() and not os.access(
                base / name, os.R_OK | os.X_OK, effective_ids=True
            ):
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


def warn_of_gaps(names: Iterable[str], where: str) -> None:
    """Say which numbered parts (-0000N-of-0000M, counted from 0 or 1) are not among the files
    that a glob found.
    """
    families: dict[tuple[str, str, str], set[int]] = {}
    widths: dict[tuple[str, str, str], int] = {}
    for name in names:
        if match := PART.fullmatch(name):
            family = (match[1], match[3], OWN_HASH.sub("*", match[4]))
            families.setdefault(family, set()).add(int(match[2]))
            widths[family] = len(match[2])
    for family, numbers in families.items():
        head, total, tail = family
        count = int(total)
        first = 1 if count in numbers and 0 not in numbers else 0
        if len(numbers) >= count:
            continue
        missing = [number for number in range(first, first + count) if number not in numbers]
        named = ", ".join(
            f"{head}{number:0{widths[family]}d}-of-{total}{tail}"
            for number in missing[:PARTS_NAMED]
        )
        more = f" and {len(missing) - PARTS_NAMED:,} more" if len(missing) > PARTS_NAMED else ""
        text = (
            f"{len(missing):,} of {count:,} parts are not there: {named}{more}; fetch them unless "
            "that is meant"
        )
        print(f"warning: {where}: {text}", file=sys.stderr)


def warn_of_one_file_twice(paths: Mapping[str, Path], where: str) -> None:
    """Say which files of a source, by name and path, are one: a link or a hard link, whose text
    would count twice.
    """
    names: dict[tuple[int, int], str] = {}
    for name, path in paths.items():
        about = path.stat()
        place = about.st_dev, about.st_ino
        if about.st_size and about.st_ino and place in names:
            text = (
                f"{name} and {names[place]} are one file (a link), so its text counts twice; name "
                "one of the two"
            )
            print(printable(f"warning: {where}: {text}"), file=sys.stderr)
        names.setdefault(place, name)


def refuse_inside(output_dir: Path, files: Iterable[str], where: str) -> None:
    """Raise UserError for a file inside of the output directory: what is built would be taken
    for input next time.
    """
    home = os.path.realpath(output_dir)
    is_inside: dict[str, bool] = {}
    for file in files:
        local = file.removeprefix("file://")
        if "://" in local:
            continue
        for place in {local, os.path.realpath(local) if os.path.islink(local) else local}:
            folder = os.path.dirname(place)
            if folder not in is_inside:  # many files lie in one folder
                is_inside[folder] = f"{os.path.realpath(folder)}/".startswith(
                    home.rstrip("/") + "/"
                )
            if is_inside[folder]:
                problem = (
                    f"{local} lies inside --output-dir {output_dir}, which holds what is built"
                )
                raise UserError(
                    f"{where}: {problem}; name other files, or choose an --output-dir elsewhere"
                )

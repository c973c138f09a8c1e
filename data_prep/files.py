"""Files that outlive a kill and a power cut: written beside, flushed, renamed; and their digests.

Nothing here writes through a symbolic link that somebody left in the place of a temporary file.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from data_prep.errors import naming


def fsync_directory(path: Path) -> None:
    """Make a file, or the renames inside a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming_the_target(target: Path, beside: str) -> Iterator[None]:
    """An OSError inside about what is written beside, at a path that begins so, names the target:
    the user knows of no other.
    """
    try:
        with naming(target):
            yield
    except OSError as error:
        if isinstance(error.filename, str) and error.filename.startswith(beside):
            error.filename = str(target)
        raise


def try_place(path: Path) -> None:
    """Whether a file can be written at a path, before what is to be in it is worked for.

    Writes a file without a name into the nearest directory that is there, and leaves nothing.
    Raises OSError naming the path.
    """
    home = path.parent
    while not home.exists():
        home = home.parent
    with naming_the_target(path, str(home)), tempfile.TemporaryFile(dir=home) as file:
        file.write(b"x")
        file.flush()


def write_durably(path: Path, content: bytes | memoryview, suffix: str = ".tmp") -> None:
    """Write beside, fsync, rename: a reader sees the old file or the whole new one, never a part.

    Processes that may write the same file at the same time need suffixes of their own. A link at
    `path` is replaced, its target kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + suffix)
    with naming_the_target(path, str(staged)):
        # What a kill left there; or a link, which opening would follow.
        staged.unlink(missing_ok=True)
        with staged.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
        fsync_directory(path.parent)


def replace_directory(directory: Path, write: Callable[[Path], object]) -> None:
    """Write a directory beside, flush it, then put it in place of the old one.

    A link to a directory keeps its place. The old one goes once the new one has its name. If that
    fails, or is interrupted, the old one is put back; a kill just then leaves it beside, as
    `.NAME.old.RANDOM`.
    """
    home = directory.resolve()
    home.parent.mkdir(parents=True, exist_ok=True)
    old = home.with_name(f".{home.name}.old.{secrets.token_hex(4)}")
    with (
        naming_the_target(directory, str(home.with_name(f".{home.name}."))),
        tempfile.TemporaryDirectory(prefix=f".{home.name}.", dir=home.parent) as scratch,
    ):
        staged = Path(scratch, "new")
        staged.mkdir()
        write(staged)
        for path in staged.iterdir():
            fsync_directory(path)
        fsync_directory(staged)
        try:
            if home.exists():
                os.rename(home, old)
            os.rename(staged, home)
        except BaseException:  # a Ctrl-C between the two as well
            if old.exists() and not home.exists():
                os.rename(old, home)
            raise
        fsync_directory(home.parent)
    if old.exists():
        shutil.rmtree(old)


def digest_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, as 32 hexadecimal digits."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()

"""One process at a time in a directory: a lock that ends with its process, however that ends.

    .lock          held by `flock`; empty
    .lock.holder   where the file system has no `flock`: made by one process alone, with its host,
                   its number and a heartbeat (the file's time, renewed every HEARTBEAT_S)

A holder's file stays behind when its process is killed. It is taken over once it is known to be
left: its process is gone on this machine, or, on another one, its heartbeat is older than
LEFT_AFTER_S by the clock of the file system.
"""

import atexit
import contextlib
import errno
import fcntl
import json
import os
import platform
import secrets
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

from data_prep.errors import UserError

LOCK_NAME = ".lock"
HOLDER_NAME = f"{LOCK_NAME}.holder"
NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what file systems without it answer
HEARTBEAT_S = 15.0
LEFT_AFTER_S = 180.0  # of a process on another machine; an NFS server may be away for two minutes
POLL_S = 0.5


class Lock:
    """A directory held for this process, until `close` or its end."""

    def close(self) -> None:
        """Let others in."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Flock(Lock):
    """Held by `flock`, which the kernel gives back when the process ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def close(self) -> None:
        """Let others in."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lock(directory: Path, work: str, flag: str, wait: bool = False) -> Lock:
    """Hold a directory for this process; with `wait`, once nobody else does.

    Raises UserError if another process of this machine, or of one that shares its locks, is at work
    there. A link in the lock's place is refused: its target is neither opened nor emptied.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK_NAME
    taken = UserError(
        f"{directory}: another process is {work}; wait for it, or give another {flag}"
    )
    operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        descriptor = _open_no_link(path)
        try:
            fcntl.flock(descriptor, operation)
            if _is_still(path, descriptor):
                return _Flock(descriptor)
            # Whoever held it has removed the file meanwhile: what is locked is nobody's.
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            raise taken from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in NO_FLOCK:
                raise
            return _hold_by_file(directory, error, taken, wait)
        except BaseException:
            os.close(descriptor)
            raise


def _open_no_link(path: Path) -> int:
    """The lock's file, made if need be; neither emptied nor followed."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    raise _is_a_link(path)


def _is_a_link(path: Path) -> UserError:
    return UserError(
        f"{path}: is a symbolic link, expected a lock of this project's; remove the link"
    )


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether a path names the file that is open."""
    with contextlib.suppress(FileNotFoundError):
        named = path.lstat()
        opened = os.fstat(descriptor)
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)
    return False


class _HolderFile(Lock):
    """Held by a file that one process alone can make, and renews while it lives."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.content = content
        self._pid = os.getpid()
        self._ended = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()
        atexit.register(self.close)  # a lock that ends with its process

    def _beat(self) -> None:
        """Renew the file's time; say it once, should another process have taken over."""
        while not self._ended.wait(HEARTBEAT_S):
            if _read(self.path) not in (self.content, None):
                problem = "another process took over here; end one of the two"
                print(f"warning: {self.path}: {problem}", file=sys.stderr)
                return
            # A server may be away for a while: the next beat will do.
            with contextlib.suppress(OSError):
                os.utime(self.path, follow_symlinks=False)

    def close(self) -> None:
        """Let others in."""
        is_holder = os.getpid() == self._pid  # a fork's exit is not the holder's
        if self._ended.is_set() or not is_holder:
            return
        self._ended.set()
        atexit.unregister(self.close)
        if _read(self.path) == self.content:
            self.path.unlink(missing_ok=True)


def _hold_by_file(directory: Path, reason: OSError, taken: UserError, wait: bool) -> _HolderFile:
    """The lock of file systems without `flock`; says so."""
    path = directory / HOLDER_NAME
    pid = os.getpid()
    about = {
        "host": platform.node(),
        "machine": _machine(),
        "pid": pid,
        "started": _started(pid),
        "nonce": secrets.token_hex(8),
    }
    content = json.dumps(about).encode()
    while not _create(path, content):
        if path.is_symlink():
            raise _is_a_link(path)
        left = _left_by(path)
        if left is not None:
            if _take_away(path, left):
                gone = f"left by {_name_of(left)}, which is gone; taken over"
                print(f"note: {path}: {gone}", file=sys.stderr)
        elif wait:
            time.sleep(POLL_S)
        else:
            raise taken
    instead = "held by a file with host, process and heartbeat instead"
    print(f"note: {path}: no flock here ({reason.strerror}); {instead}", file=sys.stderr)
    return _HolderFile(path, content)


def _create(path: Path, content: bytes) -> bool:
    """Make a file that is not there yet; whether it was this process that made it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    return True


def _read(path: Path) -> bytes | None:
    """What a holder's file says; None if it can't be read, or is a link."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            return file.read()
    return None


def _holder(content: bytes) -> dict[str, Any]:
    """Who a holder's file names; nothing, where it is torn."""
    with contextlib.suppress(ValueError, RecursionError):
        about = json.loads(content)
        if isinstance(about, dict):
            return about
    return {}


def _name_of(content: bytes) -> str:
    about = _holder(content)
    return f"process {about.get('pid', '?')} on {about.get('host', 'an unknown host')}"


def _machine() -> str:
    """What tells processes that see each other's numbers.

    That is the host, its start, and the namespace of processes.
    """
    facts = [platform.node()]
    with contextlib.suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        facts.append(os.readlink("/proc/self/ns/pid").strip())
    return " ".join(facts)


def _left_by(path: Path) -> bytes | None:
    """What a holder's file says, if its process is known to be gone; None if it may be at work."""
    content = _read(path)
    if content is None:
        return None
    about = _holder(content)
    pid = about.get("pid")
    if about.get("machine") == _machine() and isinstance(pid, int) and pid > 0:
        is_left = not _is_alive(pid, about.get("started"))
    else:
        is_left = _age_s(path) > LEFT_AFTER_S
    return content if is_left else None


def _is_alive(pid: int, started: object) -> bool:
    """Whether a process of this machine runs, and began when it said: numbers are given again."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's
        pass
    return started is None or _started(pid) in (started, None)


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None where that isn't told."""
    with contextlib.suppress(OSError, IndexError):
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        # The second field is the name, in brackets; it may hold spaces.
        _, _, behind_name = text.rpartition(")")
        return behind_name.split()[19]  # field 22 in proc(5)
    return None


def _age_s(path: Path) -> float:
    """Seconds since a file was written, by the clock of its file system; 0 if it is gone."""
    probe = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        _create(probe, b"")
        return probe.stat().st_mtime - path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _take_away(path: Path, left: bytes) -> bool:
    """Remove a file that was left; not the one that another process made in its place just now."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return False
    is_the_one = _read(aside) == left
    if not is_the_one:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()
    return is_the_one

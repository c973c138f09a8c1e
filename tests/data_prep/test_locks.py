"""One process at a time in a directory; also where the file system has no `flock`.

No such file system can be had here, so that `flock` itself is made to answer as it does there.
"""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import locks
from data_prep.errors import UserError
from data_prep.locks import HOLDER_NAME, LOCK_NAME, lock

HOLD = """
import fcntl, sys, time
from pathlib import Path
from data_prep.locks import lock
def flock(*arguments):
    raise OSError(38, "Function not implemented")
fcntl.flock = flock
held = lock(Path(sys.argv[1]), "at work", "DIR")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def holder(directory: Path, seconds: float = 60) -> subprocess.Popen[str]:
    """A process that holds a directory on a file system without flock."""
    command = [sys.executable, "-c", HOLD, str(directory), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    process.stdout.close()
    return process


@pytest.fixture
def _no_flock(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    number = getattr(request, "param", errno.ENOSYS)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    return


no_flock = pytest.mark.usefixtures("_no_flock")


@pytest.mark.parametrize("target", ["a file", "nothing"])
def test_a_link_in_the_lock_s_place_is_neither_followed_nor_emptied(
    tmp_path: Path, target: str
) -> None:
    other = tmp_path / "other"
    if target == "a file":
        other.write_text("another's")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / LOCK_NAME).symlink_to(other)
    with pytest.raises(UserError, match=rf"{LOCK_NAME}: is a symbolic link, .*; remove the link"):
        lock(tmp_path / "a", "at work", "DIR")
    assert other.exists() == (target == "a file")
    assert not other.exists() or other.read_text() == "another's"


def test_a_lock_s_file_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("somebody's")
    with lock(tmp_path, "at work", "DIR"):
        assert (tmp_path / LOCK_NAME).read_text() == "somebody's"


def test_a_file_that_its_holder_has_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who opened it before that must not think to hold it beside the next one."""
    flock, removed = fcntl.flock, []

    def remove_first(descriptor: int, how: int) -> None:
        if not removed:
            (tmp_path / LOCK_NAME).unlink()
            removed.append(True)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with (
        lock(tmp_path, "at work", "DIR"),
        pytest.raises(UserError, match="another process is at work"),
    ):
        lock(tmp_path, "at work", "DIR")


@pytest.mark.parametrize("without_flock", [False, True])
def test_waiting_for_a_lock(
    tmp_path: Path, request: pytest.FixtureRequest, without_flock: bool
) -> None:
    if without_flock:
        request.getfixturevalue("_no_flock")
    held = lock(tmp_path, "at work", "DIR")
    got = threading.Event()

    def wait() -> None:
        with lock(tmp_path, "at work", "DIR", wait=True):
            got.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not got.wait(0.2)
    held.close()
    waiting.join(30)
    assert got.is_set()


@no_flock
@pytest.mark.parametrize("_no_flock", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], indirect=True)
def test_without_flock_a_file_holds_the_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock(tmp_path, "at work", "DIR"):
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"note: {tmp_path / HOLDER_NAME}: no flock here (")
        about = json.loads((tmp_path / HOLDER_NAME).read_bytes())
        assert about["pid"] == os.getpid()
        assert about["host"]
        with pytest.raises(
            UserError, match="another process is at work; wait for it, or give another DIR"
        ):
            lock(tmp_path, "at work", "DIR")
    assert not (tmp_path / HOLDER_NAME).exists()
    lock(tmp_path, "at work", "DIR").close()


@no_flock
@pytest.mark.parametrize("_no_flock", [errno.EIO, errno.EBADF], indirect=True)
def test_other_errors_of_flock_stay_errors(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"Input/output error|Bad file descriptor"):
        lock(tmp_path, "at work", "DIR")
    assert not (tmp_path / HOLDER_NAME).exists()


@no_flock
def test_what_a_killed_process_left_is_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = holder(tmp_path)
    with pytest.raises(UserError, match="another process is at work"):
        lock(tmp_path, "at work", "DIR")
    process.kill()
    process.wait()
    assert (tmp_path / HOLDER_NAME).exists()
    with lock(tmp_path, "at work", "DIR"):
        said = capsys.readouterr().err
        assert f"left by process {process.pid} on " in said
        assert "which is gone; taken over" in said
        assert json.loads((tmp_path / HOLDER_NAME).read_bytes())["pid"] == os.getpid()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_NAME]


@no_flock
def test_a_process_that_ends_gives_its_directory_back(tmp_path: Path) -> None:
    assert holder(tmp_path, 0).wait() == 0
    assert not (tmp_path / HOLDER_NAME).exists()


@no_flock
@pytest.mark.parametrize(("age_s", "is_left"), [(10.0, False), (locks.LEFT_AFTER_S + 60, True)])
@pytest.mark.parametrize("kind", ["another machine", "a torn file", "not ours"])
def test_a_holder_of_another_machine_is_known_by_its_heartbeat(
    tmp_path: Path, kind: str, age_s: float, is_left: bool
) -> None:
    about = json.dumps({"host": "elsewhere", "machine": "elsewhere 1", "pid": os.getpid()})
    content = {"another machine": about, "a torn file": about[:20], "not ours": "[" * 100_000}[kind]
    path = tmp_path / HOLDER_NAME
    path.write_text(content)
    os.utime(path, (time.time() - age_s,) * 2)
    if is_left:
        lock(tmp_path, "at work", "DIR").close()
    else:
        with pytest.raises(UserError, match="another process is at work"):
            lock(tmp_path, "at work", "DIR")
        assert path.read_text() == content
    assert {path.name for path in tmp_path.iterdir()} <= {LOCK_NAME, HOLDER_NAME}


@no_flock
def test_a_number_given_again_is_another_process(tmp_path: Path) -> None:
    """As after a kill, when the holder's number is that of another process now."""
    held = lock(tmp_path, "at work", "DIR")
    content = (tmp_path / HOLDER_NAME).read_bytes()
    held.close()
    (tmp_path / HOLDER_NAME).write_text(json.dumps(json.loads(content) | {"started": "1"}))
    lock(tmp_path, "at work", "DIR").close()


@no_flock
def test_a_holder_lives_by_its_heartbeat_and_says_when_it_was_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.05)
    path = tmp_path / HOLDER_NAME
    held = lock(tmp_path, "at work", "DIR")
    os.utime(path, (0, 0))
    while path.stat().st_mtime == 0:  # until it is renewed; else the test's own time runs out
        time.sleep(0.02)
    path.write_text("another's")
    said = ""
    while "took over" not in said:
        said += capsys.readouterr().err
        time.sleep(0.02)
    held.close()
    assert path.read_text() == "another's"
    assert f"warning: {path}: another process took over here; end one of the two" in said


@no_flock
def test_a_link_in_the_holder_s_place(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("another's")
    (tmp_path / HOLDER_NAME).symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="is a symbolic link"):
        lock(tmp_path, "at work", "DIR")
    assert (tmp_path / "other").read_text() == "another's"

"""Trackio's runs: one goes on where nothing is to be taken back, else a new one names the old."""

import re
import sqlite3
import subprocess
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hand_made_runs import trained_step
from support.runs import environment, run_command
from support.sink_readers import read_trackio, trackio_in
from support.waiting import wait_until

from pretrain.metrics.told import AboutRun, told

ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+[/\w?=&.-]*")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where trackio keeps its projects: read when it is imported."""
    found = tmp_path_factory.mktemp("trackio")
    with trackio_in(found):
        yield found


@pytest.fixture
def about(tmp_path: Path) -> AboutRun:
    return AboutRun(
        run_dir=tmp_path, config={"seed": 1}, restarts=frozenset(), bytes_per_token=None
    )


def write(about: AboutRun, begin: int, past_last: int, loss: float) -> int:
    """A start from a step on; the first step that it wrote."""
    from pretrain.metrics.trackio_sink import TrackioSink

    sink = TrackioSink(about)
    first = sink.begin(begin)
    for step in range(first, past_last):
        sink.write(told(trained_step(step, loss), about))
    sink.close()
    return first


def test_a_run_goes_on_in_its_run_of_trackio_where_nothing_is_to_be_taken_back(
    about: AboutRun,
) -> None:
    assert write(about, 0, 8, loss=1.0) == 0
    assert write(about, 8, 12, loss=2.0) == 8
    assert write(about, 15, 16, loss=3.0) == 12  # more was trained than is drawn
    (run,) = read_trackio(about.run_dir)
    losses = [1.0] * 8 + [2.0] * 4 + [3.0] * 4
    assert run.figures["train/loss"] == list(enumerate(losses))


def test_what_trackio_cannot_take_back_is_begun_as_a_run_that_names_the_old_one(
    about: AboutRun,
) -> None:
    assert write(about, 0, 8, loss=1.0) == 0
    assert write(about, 5, 9, loss=2.0) == 0
    older, newer = read_trackio(about.run_dir)
    assert older.figures["train/loss"] == list(enumerate([1.0] * 8))
    assert newer.figures["train/loss"] == list(enumerate([2.0] * 9))
    assert f'"continues": "{older.name}"' in newer.config
    assert older.name != newer.name
    assert newer.name.startswith(f"{about.name}-")


def test_a_run_of_trackio_that_lacks_a_step_is_left_for_a_new_one(
    about: AboutRun, home: Path
) -> None:
    write(about, 0, 8, loss=1.0)
    with sqlite3.connect(home / "tablefree.db") as database:
        (run,) = read_trackio(about.run_dir)
        database.execute("DELETE FROM metrics WHERE run_name = ? AND step = 3", (run.name,))
    database.close()
    assert write(about, 8, 9, loss=2.0) == 0
    assert len(read_trackio(about.run_dir)) == 2


def test_steps_that_trackio_drops_are_not_dropped_in_silence(
    about: AboutRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    def fail(*what: object, **more: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(SQLiteStorage, "bulk_log", fail)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # trackio's own, of which there is to be none
        says = r"some steps were not written \(trackio.*full.*\); a new run of it is to have all"
        with pytest.raises(OSError, match=says):
            write(about, 0, 8, loss=1.0)
    monkeypatch.undo()


def test_trackio_says_nothing_and_others_are_still_heard(
    about: AboutRun, capfd: pytest.CaptureFixture[str]
) -> None:
    write(about, 0, 8, loss=1.0)
    write(about, 8, 9, loss=1.0)
    write(about, 5, 9, loss=1.0)
    print("ours")
    assert capfd.readouterr().out == "ours\n"


def test_trackio_itself_shows_the_run(about: AboutRun, home: Path, tmp_path: Path) -> None:
    """The command of the README."""
    write(about, 0, 8, loss=1.0)
    (run,) = read_trackio(about.run_dir)
    env = environment(TRACKIO_DIR=str(home), PYTHONUNBUFFERED="1")
    listed = run_command("trackio", "list", "runs", "--project", "tablefree", TRACKIO_DIR=str(home))
    assert run.name in listed.stdout
    log = tmp_path / "log"
    with log.open("wb") as output:
        command = ["trackio", "show", "--project", "tablefree"]
        server = subprocess.Popen(command, env=env, stdout=output, stderr=output)
    try:
        wait_until(lambda: ADDRESS.search(log.read_text()) is not None, "its address", log=log)
        address = ADDRESS.search(log.read_text())
        assert address is not None
        with urllib.request.urlopen(address[0], timeout=60) as answer:
            assert answer.status == 200
    finally:
        server.terminate()
        server.wait()

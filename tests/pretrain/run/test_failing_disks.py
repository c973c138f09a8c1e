"""Disks and file servers that fail: once, which costs a moment, and for good, which ends a run by a
failure.

Errors are raised where the system would raise them, in ranks that are real otherwise.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked_ranks import Ended, be_a_rank, run_ranks, train_on
from support.hand_made_runs import manifest_of, trained_step
from support.runs import losses, write_recipe

from data_prep.commands import exit_code
from data_prep.errors import PASSING_ERRORS, RetryableError, UserError, explained, naming
from data_prep.files import write_durably
from pretrain.checkpoint import patience
from pretrain.checkpoint import reader as checkpoint
from pretrain.checkpoint.find import load_for_reading, newest_good
from pretrain.checkpoint.layout import saved_steps
from pretrain.checkpoint.patience import patiently
from pretrain.checkpoint.reader import Fragment
from pretrain.checkpoint.saving import Savers, save_checkpoint
from pretrain.distributed.agree import together
from pretrain.distributed.world import World
from pretrain.metrics import metrics_file
from pretrain.metrics.metrics_file import MetricsFile, flush_metrics
from pretrain.metrics.records import read_lines
from pretrain.run.state import read_state

ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)
STATES = ("master", "exp_avg", "exp_avg_sq")


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "WAITS_S", (0.0, 0.0, 0.0))


def error_of(number: int, path: object = None) -> OSError:
    """An error of the operating system, as it raises it."""
    return OSError(number, os.strerror(number), *([] if path is None else [str(path)]))


class Failing:
    """An action that fails so many times, then gives 7."""

    def __init__(self, number: int, times: int) -> None:
        self.number, self.times, self.calls = number, times, 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.times:
            raise error_of(self.number, "/data/x")
        return 7


# Which errors


@pytest.mark.parametrize("number", sorted(PASSING_ERRORS))
def test_what_may_pass_is_tried_again_and_said(
    number: int, no_waits: None, capsys: pytest.CaptureFixture[str]
) -> None:
    action = Failing(number, 3)
    assert patiently(action) == 7
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert all(
        f"/data/x: {os.strerror(number)}; the disk or its server failed; trying again in 0 s" in s
        for s in said
    )


@pytest.mark.parametrize("number", sorted(PASSING_ERRORS))
def test_what_does_not_pass_is_a_failure_and_no_bad_input(number: int, no_waits: None) -> None:
    action = Failing(number, 99)
    with pytest.raises(UserError, match=f"/data/x: {os.strerror(number)}") as raised:
        together(lambda: patiently(action))
    assert action.calls == 4
    assert raised.value.exit_code == 1
    assert exit_code(action) == 1  # type: ignore[arg-type]
    with pytest.raises(RetryableError), explained(OSError, "x", "y"):
        action()


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT]
)
def test_what_a_user_can_mend_is_raised_at_once_and_bad_input(number: int) -> None:
    action = Failing(number, 99)
    with pytest.raises(UserError) as raised:
        together(lambda: patiently(action))
    assert action.calls == 1
    assert raised.value.exit_code == 2
    assert exit_code(action) == 2  # type: ignore[arg-type]


def test_an_error_of_a_write_or_a_flush_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        raise error_of(errno.EIO)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error") as raised:
        write_durably(tmp_path / "state.json", b"{}")
    assert raised.value.filename == str(tmp_path / "state.json")
    with pytest.raises(OSError, match="No such file") as raised, naming(tmp_path):
        (tmp_path / "absent").open()
    assert raised.value.filename == str(tmp_path / "absent")  # the system's own name is kept


@pytest.mark.parametrize("name", ["metrics.jsonl", "state.json"])
def test_an_error_of_a_read_names_the_file(
    name: str, tmp_path: Path, no_waits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_bytes(_: Path) -> bytes:
        raise error_of(errno.EIO)

    (tmp_path / name).write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(OSError, match="Input/output error") as raised:
        read_lines(tmp_path / name) if name.endswith("l") else read_state(tmp_path)
    assert raised.value.filename == str(tmp_path / name)


# metrics.jsonl


def test_a_line_of_metrics_that_went_half_way_is_written_anew(
    tmp_path: Path, no_waits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, fails = metrics_file.write_all, iter([False, True, True, False, False, False])

    def write_all(file: Any, content: bytes) -> None:
        if next(fails):
            honest(file, content[: len(content) // 2])
            raise error_of(errno.ESTALE)
        honest(file, content)

    monkeypatch.setattr(metrics_file, "write_all", write_all)
    metrics = MetricsFile(tmp_path, 0)
    steps = [trained_step(step, step / 7) for step in range(3)]
    for step in steps:
        metrics.append(step)
    metrics.close()
    assert metrics.path.read_text() == "".join(json.dumps(step.to_line()) + "\n" for step in steps)


def test_lines_whose_flush_failed_are_written_once_more_before_the_next_flush(
    tmp_path: Path, no_waits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = tmp_path / "metrics.jsonl", b'{"step": 0}\n{"step": 1}\n'
    path.write_bytes(content)
    written: list[bytes] = []
    honest, fails = metrics_file.write_all, iter([True, False])

    def fsync(_: int) -> None:
        if next(fails):
            raise error_of(errno.EIO)

    def write_all(file: Any, lines: bytes) -> None:
        written.append(lines)
        honest(file, lines)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(metrics_file, "write_all", write_all)
    flush_metrics(tmp_path)
    assert written == [content]
    assert path.read_bytes() == content


# Checkpoints that can't be read


def save(run_dir: Path, step: int, value: float = 1.0) -> Path:
    fragment = Fragment(
        name="a", start=0, states={state: torch.full((4,), value) for state in STATES}
    )
    return save_checkpoint(run_dir, [fragment], manifest_of(step, {"a": [4]}), Savers(world=ALONE))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_one_read_error_is_no_damage_and_one_that_stays_is_a_failure_that_names_the_file(
    number: int, tmp_path: Path, no_waits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    honest, fails = checkpoint.read_through, [1]

    def read_through(path: Path) -> checkpoint.Seen:
        if path.suffix == ".safetensors" and path.parent == newest and fails[0]:
            fails[0] -= 1
            raise error_of(number)  # as a read does, it names no file
        return honest(path)

    monkeypatch.setattr(checkpoint, "read_through", read_through)
    good, said = newest_good(tmp_path)
    assert good is not None
    assert (good.step, said) == (2, [])
    fails[0] = 99
    what = f"{newest}/rank-00000-of-00001.safetensors: {os.strerror(number)}; .* move {newest} away"
    with pytest.raises(UserError, match=what) as raised:
        load_for_reading(tmp_path)
    assert raised.value.exit_code == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ENOMEM])
def test_what_says_nothing_of_a_file_is_no_damage_of_it(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    honest = checkpoint.read_through

    def read_through(path: Path) -> checkpoint.Seen:
        if path.suffix == ".safetensors" and path.parent == newest:
            raise error_of(number, path)
        return honest(path)

    monkeypatch.setattr(checkpoint, "read_through", read_through)
    with pytest.raises(UserError, match=os.strerror(number)) as raised:
        newest_good(tmp_path)
    assert raised.value.exit_code == 2


# Whole runs


def be_a_rank_on_a_failing_disk(arguments: list[str], variables: dict[str, str], log: Path) -> None:
    """Body of a forked rank in which flushes fail: so many of each name of FAILING, on rank 0
    once it saves.
    """
    left = {name: int(times) for name, times in json.loads(variables["FAILING"]).items()}
    number, honest = int(variables["ERROR"]), os.fsync
    began = [] if variables["RANK"] == "0" else [log]

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        began.extend([path] if path.name == "metrics.jsonl" else [])
        names = [name for name in left if name in path.name and left[name] and began]
        if names:
            left[names[0]] -= 1
            raise error_of(number)
        honest(descriptor)

    os.fsync = fsync
    patience.WAITS_S = (0.01, 0.01, 0.01)
    be_a_rank(arguments, variables, log)


def run_on_a_failing_disk(
    ranks: int,
    failing: dict[str, int],
    recipe: Path,
    data: Path,
    run_dir: Path,
    number: int = errno.EIO,
) -> Ended:
    variables = {"FAILING": json.dumps(failing), "ERROR": str(number)}
    return run_ranks(ranks, recipe, data, run_dir, body=be_a_rank_on_a_failing_disk, **variables)


FILES = (
    "metrics.jsonl",
    "rank-00000-of-0000",
    "manifest.json.tmp",
    "xxh3_128.tmp",
    "latest.tmp",
    "state.json.tmp",
)


@pytest.fixture(scope="module")
def unbroken(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("unbroken")
    train_on(1, write_recipe(home / "r.yaml"), tiny_data, home / "run")
    return home / "run"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_outlasts_a_disk_that_fails_once_for_each_of_its_files(
    ranks: int, unbroken: Path, tiny_data: Path, tmp_path: Path
) -> None:
    failing = {**dict.fromkeys(FILES, 1), "checkpoints": 1}
    ended = run_on_a_failing_disk(
        ranks, failing, write_recipe(tmp_path / "r.yaml"), tiny_data, tmp_path / "run"
    )
    assert ended.exit_codes == [0] * ranks, ended.output
    for name in failing:
        place = name.removesuffix(".tmp")
        tries = [
            line
            for line in ended.output.splitlines()
            if place in line and "trying again in 0.01 s" in line
        ]
        assert tries, (name, ended.output)
    assert newest_good(tmp_path / "run")[1] == []
    assert [path.name for path in saved_steps(tmp_path / "run")] == [
        "step-00000020",
        "step-00000015",
    ]
    if ranks == 1:
        assert losses(tmp_path / "run") == losses(unbroken)


@pytest.mark.parametrize("name", FILES)
def test_a_disk_that_goes_on_failing_ends_a_run_by_a_failure_that_names_the_file(
    name: str, unbroken: Path, tiny_data: Path, tmp_path: Path
) -> None:
    recipe, run_dir = write_recipe(tmp_path / "r.yaml"), tmp_path / "run"
    ended = run_on_a_failing_disk(1, {name: 99}, recipe, tiny_data, run_dir)
    assert ended.exit_codes == [1], ended.output
    assert "Traceback" not in ended.output
    (said,) = [line for line in ended.output.splitlines() if line.startswith("error:")]
    assert name.removesuffix(".tmp") in said
    assert "Input/output error" in said
    train_on(1, recipe, tiny_data, run_dir)
    assert losses(run_dir) == losses(unbroken)


def test_a_failure_of_one_rank_is_one_of_all(tiny_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    ended = run_on_a_failing_disk(
        2, {"rank-00001": 99}, recipe, tiny_data, tmp_path / "run", errno.ETIMEDOUT
    )
    assert ended.exit_codes == [1, 1], ended.output
    (said,) = {line for line in ended.output.splitlines() if line.startswith("error:")}
    assert "step-00000005: not written: " in said
    assert (
        "rank-00001-of-00002.safetensors: Connection timed out; the disk or its server failed"
        in said
    )

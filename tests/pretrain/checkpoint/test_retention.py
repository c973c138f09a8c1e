"""What may disappear from a run's checkpoints: files of ours alone, and none at the cost of a
save.
"""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.hand_made_runs import manifest_of

from pretrain.checkpoint.find import newest_good
from pretrain.checkpoint.layout import checkpoints_dir, is_own_file, saved_steps, step_name, step_of
from pretrain.checkpoint.reader import Checkpoint, Fragment
from pretrain.checkpoint.retention import discard, leftovers_in, prune, sweep
from pretrain.checkpoint.saving import Savers, save_checkpoint
from pretrain.checkpoint.writer import AroundSaves, CheckpointWriter
from pretrain.config.recipe import CheckpointsRecipe
from pretrain.distributed.world import World

ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)
SHAPES = {"a": [4]}


def state_of(step: int) -> list[Fragment]:
    states = {state: torch.full((4,), float(step)) for state in ("master", "exp_avg", "exp_avg_sq")}
    return [Fragment(name="a", start=0, states=states)]


def save(run_dir: Path, step: int) -> Path:
    return save_checkpoint(run_dir, state_of(step), manifest_of(step, SHAPES), Savers(world=ALONE))


def save_all(run_dir: Path, *steps: int, keep_last: int = 1) -> list[int]:
    """Save steps as training does, pruning; the steps that are there then, newest first."""
    with CheckpointWriter(
        run_dir, CheckpointsRecipe(every_steps=1, keep_last=keep_last), ALONE, AroundSaves()
    ) as writer:
        for step in steps:
            writer.save(state_of(step), manifest_of(step, SHAPES))
    return steps_there(run_dir)


def steps_there(run_dir: Path) -> list[int]:
    return [Checkpoint(path).step for path in saved_steps(run_dir)]


# Names


@pytest.mark.parametrize("step", [0, 7, 99_999_999, 100_000_000, 12_345_678_901])
def test_every_step_has_one_name(step: int) -> None:
    assert step_of(step_name(step)) == step
    assert len(step_name(step)) >= len("step-") + 8


@pytest.mark.parametrize(
    "name",
    [
        "step-7",
        "step-0000007",
        "step-000000007",
        "step-00000007.x",
        "step--0000001",
        "step-0000000a",
        "latest",
    ],
)
def test_what_is_no_name_of_a_step_is_none(name: str) -> None:
    assert step_of(name) is None


def test_steps_of_nine_digits_are_found_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    steps = (99_999_998, 99_999_999, 100_000_000, 100_000_001)
    assert save_all(tmp_path, *steps, keep_last=3) == [100_000_001, 100_000_000, 99_999_999]
    good, said = newest_good(tmp_path)
    assert good is not None
    assert (good.step, said) == (100_000_001, [])
    assert save_all(tmp_path, 100_000_002) == [100_000_002]


# What is not ours


def test_what_somebody_keeps_beside_checkpoints_stays(tmp_path: Path) -> None:
    home = checkpoints_dir(tmp_path)
    for name in (".notes.tmp", ".step-notes.tmp", ".step-00000001.notes", "step-best", "step-1"):
        (home / name).mkdir(parents=True)
        (home / name / "notes.md").write_text("mine")
    (home / ".backup.tmp").write_text("mine")
    before = sorted(home.rglob("*"))
    assert save_all(tmp_path, 1, 2, 3) == [3]
    assert [path for path in before if not path.exists()] == []


@pytest.mark.parametrize("name", ["notes.md", "evaluation", "optimizer.pt", "rank-0.safetensors"])
def test_a_checkpoint_in_which_somebody_keeps_a_file_is_not_removed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not is_own_file(name)
    mine = save(tmp_path, 1) / name
    mine.write_text("mine")
    save_all(tmp_path, 2, 3)
    assert mine.read_text() == "mine"
    assert [path.name for path in saved_steps(tmp_path)] == ["step-00000003", "step-00000001"]
    assert (
        f"{mine.parent}: kept, since it holds {name}, which is no part of a checkpoint"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_has_the_name_of_a_checkpoint_to_be_is_set_aside(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoints_dir(tmp_path) / step_name(2)
    mine = path / "notes.md" if kind == "directory" else path
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    save(tmp_path, 2)
    assert Checkpoint(path).damage() is None
    (aside,) = checkpoints_dir(tmp_path).glob("set-aside-step-00000002-*")
    assert (aside / "notes.md" if kind == "directory" else aside).read_text() == "mine"
    assert f"it is now {aside.name}" in capsys.readouterr().err
    assert steps_there(tmp_path) == [2]


def test_what_was_passed_over_as_damaged_stays_and_pushes_out_nothing_until_it_is_saved_anew(
    tmp_path: Path,
) -> None:
    for step in (1, 5, 9):
        save(tmp_path, step)
    for step in (5, 9):
        next((checkpoints_dir(tmp_path) / step_name(step)).glob("*.safetensors")).unlink()
    good, _ = newest_good(tmp_path)
    assert good is not None
    recipe = CheckpointsRecipe(every_steps=1, keep_last=2)
    with CheckpointWriter(tmp_path, recipe, ALONE, AroundSaves()) as writer:
        assert writer.pass_over_newer(good.step) == [step_name(9), step_name(5)]
        assert writer.pass_over_newer(good.step) == []  # said once
        for step, there in ((6, [9, 6, 5, 1]), (7, [9, 7, 6, 5]), (9, [9, 7, 5]), (12, [12, 9, 5])):
            writer.save(state_of(step), manifest_of(step, SHAPES))
            writer.wait()
            assert steps_there(tmp_path) == there


# Links to a larger disk


def test_of_a_link_only_the_link_goes(tmp_path: Path) -> None:
    large = tmp_path / "large" / step_name(1)
    large.parent.mkdir()
    run_dir = tmp_path / "run"
    save(run_dir, 1).rename(large)
    (checkpoints_dir(run_dir) / step_name(1)).symlink_to(large)
    assert newest_good(run_dir)[0].step == 1  # type: ignore[union-attr]
    assert save_all(run_dir, 2) == [2]
    assert Checkpoint(large).damage() is None


def test_the_directory_of_checkpoints_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    checkpoints_dir(run_dir).symlink_to(tmp_path / "large")
    assert save_all(run_dir, 1, 2, 3) == [3]
    assert sorted(os.listdir(tmp_path / "large")) == ["latest", "step-00000003"]
    assert checkpoints_dir(run_dir).is_symlink()


def test_a_link_in_place_of_a_checkpoint_s_file_may_not_lead_out_of_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (file,) = save(tmp_path, 2).glob("*.safetensors")
    outside = tmp_path / "outside"
    file.rename(outside)
    file.symlink_to(outside)
    good, (said,) = newest_good(tmp_path)
    assert good is not None
    assert good.step == 1
    assert said.endswith(
        f"step-00000002: {file.name} is a link that leads out of the checkpoint; passed over"
    )


# Leftovers, and what can't be removed


def test_leftovers_of_all_kinds_go_with_the_next_save(tmp_path: Path) -> None:
    home = checkpoints_dir(tmp_path)
    for name in (
        ".step-00000005.tmp", ".step-00000005.0a1b2c3d.tmp", ".step-00000004.old.tmp",
        ".step-00000004.0a1b2c3d.old.tmp", ".step-00000003.k2j8x0q_", ".step-100000000.tmp",
    ):  # fmt: skip
        (home / name / "new").mkdir(parents=True)
    assert len(list(leftovers_in(home))) == 6
    save(tmp_path, 6)
    assert sorted(os.listdir(home)) == ["latest", "step-00000006"]


@pytest.fixture
def busy() -> Iterator[list[Path]]:
    """Directories of this list have something mounted on them, so that they can't be removed
    until it is unmounted.
    """
    mounted: list[Path] = []
    yield mounted
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def keep_busy(path: Path, busy: list[Path]) -> None:
    """Like a file that a reader on NFS has open: what holds it can be renamed, and not be
    removed.
    """
    path.mkdir(parents=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "tmpfs", str(path)], capture_output=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"mounting takes root: {made.stderr.decode().strip()}")
    busy.append(path)


def release(path: Path, busy: list[Path]) -> None:
    subprocess.run(["umount", str(path)], check=True)
    busy.remove(path)


def test_a_checkpoint_that_cannot_be_removed_ends_no_save_and_goes_when_it_can(
    tmp_path: Path, busy: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    held = save(tmp_path, 1) / "rank-00001-of-00002.safetensors"  # a name of ours, but a directory
    keep_busy(held, busy)
    assert save_all(tmp_path, 2, 3) == [3]
    said = capsys.readouterr().err
    assert "Device or resource busy; the next save tries again" in said
    assert "Traceback" not in said
    (doomed,) = leftovers_in(checkpoints_dir(tmp_path))
    assert os.listdir(doomed) == [held.name]  # what could be removed was
    busy[:] = [doomed / held.name]
    release(busy[0], busy)
    assert save_all(tmp_path, 4) == [4]
    assert sorted(os.listdir(checkpoints_dir(tmp_path))) == ["latest", "step-00000004"]


def test_a_directory_that_cannot_be_listed_ends_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = save(tmp_path, 1)

    def fails(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "listdir", fails)
    monkeypatch.setattr(Path, "glob", fails)
    sweep(saved.parent)
    prune(saved, 1)
    assert capsys.readouterr().err.count("Stale file handle") == 2


def test_a_leftover_of_the_same_step_that_cannot_be_removed_ends_no_save(
    tmp_path: Path, busy: list[Path]
) -> None:
    keep_busy(checkpoints_dir(tmp_path) / ".step-00000002.tmp" / "held", busy)
    assert save_all(tmp_path, 2, 3) == [3]
    assert newest_good(tmp_path)[1] == []


def test_a_directory_that_cannot_even_be_renamed_is_said_and_kept(
    tmp_path: Path, busy: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    keep_busy(checkpoints_dir(tmp_path) / step_name(1), busy)
    saved = save(tmp_path, 2)
    prune(saved, 1)
    assert (
        f"{saved.with_name(step_name(1))}: not removed (Device or resource busy)"
        in capsys.readouterr().err
    )
    with pytest.raises(OSError, match="busy"):
        discard(saved.with_name(step_name(1)))

"""Whatever happens to the files of a checkpoint is found before a step is trained, and the one
before is taken.

Checkpoints of a real run of two ranks: flips, truncations and deletions by the hundred, pickles,
full disks, kills.
"""

import ast
import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked_ranks import fork_server, run_ranks, train_on
from support.hand_made_runs import manifest_of
from support.runs import REPOSITORY, losses, write_recipe

from data_prep.errors import UserError
from data_prep.files import digest_file
from pretrain.checkpoint.find import newest_good
from pretrain.checkpoint.layout import checkpoints_dir, saved_steps
from pretrain.checkpoint.manifest import pointer_to, sidecar_of
from pretrain.checkpoint.reader import Checkpoint, Fragment
from pretrain.checkpoint.writer import CheckpointWriter
from pretrain.config.recipe import CheckpointsRecipe
from pretrain.distributed.world import World
from pretrain.run.saving import around_saves

ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)
SAMPLES = 600


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml")


@pytest.fixture(scope="module")
def two_saved(recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, stopped after its second checkpoint, of step 10. Put it back as it
    was.
    """
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    train_on(2, recipe, tiny_data, run_dir, "--stop-at-step", "10")
    return run_dir


# By the hundred


def damage(file: Path, sample: random.Random) -> str:
    """Do something to a file; says what."""
    content = file.read_bytes()
    kind = sample.choice(["flip", "flip", "truncate", "delete", "append", "zeros"])
    place = sample.randrange(len(content))
    if kind == "delete":
        file.unlink()
        return kind
    if kind == "flip":
        bit = 1 << sample.randrange(8)
        content = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
    elif kind == "zeros":  # a block that never reached the disk; where there were none
        block = content[place : place + 512]
        content = (
            content[:place]
            + (bytes(len(block)) if any(block) else b"\1" * len(block))
            + content[place + 512 :]
        )
    else:
        content = (
            content[:place] if kind == "truncate" else content + sample.randbytes(1 + place % 9)
        )
    file.write_bytes(content)
    return f"{kind} at {place}"


def test_hundreds_of_flips_truncations_and_deletions_are_all_found_and_the_checkpoint_before_taken(
    two_saved: Path,
) -> None:
    pointer = checkpoints_dir(two_saved) / "latest"
    newest, before = saved_steps(two_saved)
    files = [pointer, *sorted(newest.iterdir())]
    assert [file.name for file in files] == [
        "latest", "manifest.json", "manifest.json.xxh3_128",
        "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors",
    ]  # fmt: skip
    assert newest_good(two_saved)[0].path == newest  # type: ignore[union-attr]
    sample, done = random.Random(7), 0
    for file in [files[i % len(files)] for i in range(SAMPLES)]:
        whole = file.read_bytes()
        what = f"{file.name}: {damage(file, sample)}"
        checkpoint, said = newest_good(two_saved)
        assert checkpoint is not None, what
        assert checkpoint.path == (newest if file == pointer else before), what
        assert len(said) == 1, (what, said)
        assert (
            said[0].startswith(f"{pointer}: " if file == pointer else f"{newest}: ")
            or "missing" in said[0]
        ), said
        assert said[0].endswith("; passed over"), said
        file.write_bytes(whole)
        done += 1
    assert done >= 500
    assert newest_good(two_saved)[1] == []


def test_files_of_two_checkpoints_that_are_exchanged_are_found(
    two_saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(two_saved, tmp_path / "run")
    newest, before = saved_steps(tmp_path / "run")
    for file in sorted(path.name for path in newest.iterdir()):
        for name in (file, *(["manifest.json"] if file.endswith("xxh3_128") else [])):
            shutil.copyfile(before / name, newest / name)
        checkpoint, said = newest_good(tmp_path / "run")
        assert checkpoint is not None
        assert checkpoint.path == before
        assert len(said) == 1
        shutil.copytree(two_saved / "checkpoints" / newest.name, newest, dirs_exist_ok=True)
    assert newest_good(tmp_path / "run")[1] == []


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("step-00000010/manifest.json", "manifest.json: digest "),
        ("step-00000010/rank-00001-of-00002.safetensors", "rank-00001-of-00002.safetensors has "),
        ("latest", "latest: JSONDecodeError"),
    ],
)
def test_the_command_says_what_it_passed_over_and_trains_on_bitwise_as_before(
    file: str, says: str, two_saved: Path, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(two_saved, run_dir)
    expected = losses(run_dir)
    path = checkpoints_dir(run_dir) / file
    path.write_bytes(path.read_bytes()[:-7])
    output = train_on(2, recipe, tiny_data, run_dir, "--stop-at-step", "11")
    said = [line for line in output.splitlines() if "passed over" in line]
    assert len(said) == 1, output
    assert says in said[0]
    taken = "step-00000010" if file == "latest" else "step-00000005"
    assert f"continuing from {checkpoints_dir(run_dir) / taken}" in output
    assert losses(run_dir)[:10] == expected
    assert newest_good(run_dir)[1] == []  # all is well again


# Pickles


class LeavesAMark:
    """Loading its pickle makes a directory."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


OPENED: list[str] = []  # by Python, in this process
sys.addaudithook(lambda event, values: OPENED.append(str(values[0])) if event == "open" else None)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_beside_the_files_is_never_opened(
    kind: str, two_saved: Path, tmp_path: Path
) -> None:
    run_dir, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(two_saved, run_dir)
    newest, before = saved_steps(run_dir)
    smuggled = newest / "mp_rank_00_model_states.pt"
    if kind == "torch":
        torch.save(LeavesAMark(mark), smuggled)
    else:
        smuggled.write_bytes(pickle.dumps(LeavesAMark(mark)))
    OPENED.clear()
    checkpoint, said = newest_good(run_dir)
    assert str(newest / "manifest.json") in OPENED  # so the hook sees what is opened
    assert str(smuggled) not in OPENED
    assert checkpoint is not None
    assert checkpoint.path == before
    assert said == [f"{newest}: {smuggled.name} is not named in manifest.json; passed over"]
    assert not mark.exists()
    pickle.loads(smuggled.read_bytes()) if kind == "pickle" else torch.load(
        smuggled, weights_only=False
    )
    assert mark.exists()  # it would have been seen


def test_a_pickle_in_place_of_a_file_is_not_unpickled_even_with_all_digests_made_to_agree(
    two_saved: Path, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(two_saved, run_dir)
    newest, before = saved_steps(run_dir)
    file = newest / "rank-00000-of-00002.safetensors"
    file.write_bytes(pickle.dumps(LeavesAMark(mark)))
    assert "has " in newest_good(run_dir)[1][0]
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][0] |= {"bytes": file.stat().st_size, "xxh3_128": digest_file(file)}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    (newest / "manifest.json.xxh3_128").write_bytes(sidecar_of(newest))
    (newest.parent / "latest").write_bytes(pointer_to(newest))
    output = train_on(1, recipe, tiny_data, run_dir, "--stop-at-step", "6")
    assert f"{newest}: SafetensorError: " in output
    assert f"continuing from {before}" in output
    assert not mark.exists()


def test_nothing_of_the_trainer_can_read_a_pickle() -> None:
    readers = {
        "pickle",
        "cloudpickle",
        "dill",
        "joblib",
        "marshal",
        "shelve",
        "torch.load",
        "torch.save",
    }
    for path in (REPOSITORY / "pretrain").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
            names += (
                ["pickle"] if isinstance(node, ast.keyword) and node.arg == "allow_pickle" else []
            )
            assert not readers & set(names), f"{path}: line {node.lineno}"  # type: ignore[attr-defined]


# Saves that end in the middle: a full disk, a kill

MEGABYTES = 48


def fragments_of(step: int) -> list[Fragment]:
    """A state of so many megabytes that tells its step."""
    size = MEGABYTES * 1_000_000 // 12
    states = {
        state: torch.full((size,), float(step)) for state in ("master", "exp_avg", "exp_avg_sq")
    }
    return [Fragment(name="weight", start=0, states=states)]


def save_as_told(run_dir: Path, orders: Connection) -> None:
    """Body of a forked process: a writer that saves the steps it is told, and answers with the
    error or "saved".
    """
    writer = CheckpointWriter(
        run_dir, CheckpointsRecipe(every_steps=1, keep_last=1), ALONE, around_saves(run_dir)
    )
    while step := orders.recv():
        fragments = fragments_of(step)
        orders.send("begins")
        try:
            shapes = {"weight": [len(fragments)]}
            writer.save(fragments, manifest_of(step, shapes, optimizer_step=step))
            writer.wait()
            orders.send("saved")
        except UserError as error:
            orders.send(str(error))


class Saver:
    """A process that saves when told, and can be stopped or killed meanwhile."""

    def __init__(self, run_dir: Path) -> None:
        self.orders, theirs = fork_server().Pipe()
        self.process = fork_server().Process(target=save_as_told, args=(run_dir, theirs))
        self.process.start()
        theirs.close()

    def begin(self, step: int) -> None:
        """Have it save; returns once its state is there."""
        self.orders.send(step)
        assert self.orders.recv() == "begins"

    def signal(self, number: int) -> None:
        """Send it a signal, and see to it that a stop has happened."""
        assert self.process.pid
        os.kill(self.process.pid, number)
        tasks = Path(f"/proc/{self.process.pid}/task")  # a thread stops once it has left the kernel
        while number == signal.SIGSTOP and {
            stat.read_text().rpartition(")")[2].split()[0] for stat in tasks.glob("*/stat")
        } != {"T"}:
            pass

    def close(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.join()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory, whose size `mount -o remount` changes."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(mount)], capture_output=True
    )
    if made.returncode != 0:
        pytest.skip(f"mounting a small disk takes root: {made.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def resize(mount: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(mount)], check=True)


def test_a_disk_that_fills_up_at_any_point_of_a_save_leaves_the_checkpoint_before_whole(
    small_disk: Path,
) -> None:
    run_dir = small_disk / "run"
    saver = Saver(run_dir)
    try:
        saver.begin(5)
        assert saver.orders.recv() == "saved"
        good = saved_steps(run_dir)[0]
        own_file = good.with_name(".step-00000010.tmp") / "rank-00000-of-00001.safetensors"
        total = (good / own_file.name).stat().st_size
        # what is left to a save once it has checked the disk: a part of the tensors, or pages for
        # what comes after them
        rooms = [(0.06 * i, 0) for i in range(16)] + [(1.0, pages) for pages in range(4)]
        met = []
        while rooms:
            part, pages = rooms[0]
            saver.begin(10)
            while not own_file.exists() and not saver.orders.poll():
                pass
            saver.signal(signal.SIGSTOP)
            disk = os.statvfs(small_disk)
            written = own_file.stat().st_size if own_file.exists() else total
            used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
            resize(
                small_disk,
                f"size={used + int(part * (total - written)) // 4096 * 4096 + pages * 4096}",
            )
            saver.signal(signal.SIGCONT)
            answer = saver.orders.recv()
            resize(small_disk, "size=200m")
            if answer == "saved":  # it was faster than we were: once more
                shutil.rmtree(saved_steps(run_dir)[0])
                saver.begin(5)
                assert saver.orders.recv() == "saved"
                continue
            rooms.pop(0)
            met.append(written)
            assert "No space left on device" in answer
            assert (
                f"it needs {MEGABYTES * 1_000_000:,} bytes, the disk mounted at {small_disk} has "
                in answer
            )
            checkpoint, said = newest_good(run_dir)
            assert checkpoint is not None
            assert said == []
            # it lacked nothing but the pointer
            assert checkpoint.step == 5 or (checkpoint.step, part) == (10, 1.0)
            assert float(checkpoint.read("weight", "exp_avg", 0, 1)) == checkpoint.step
            assert Checkpoint(good).damage() is None
        assert len(met) == 20
        saver.begin(10)
        assert saver.orders.recv() == "saved"
        assert newest_good(run_dir)[0].step == 10  # type: ignore[union-attr]
    finally:
        saver.close()


@pytest.mark.parametrize(("ranks", "limit"), [(1, "size=1800k"), (2, "nr_inodes=22")])
def test_the_command_ends_with_one_line_on_a_full_disk_and_continues_once_there_is_room(
    ranks: int, limit: str, recipe: Path, tiny_data: Path, two_saved: Path, small_disk: Path
) -> None:
    run_dir = small_disk / "run"
    # too few bytes, which is seen beforehand; too few files, which is not
    resize(small_disk, limit)
    flags = ("--stop-at-step", "10", "--checkpoints.keep_last=1")
    ended = run_ranks(ranks, recipe, tiny_data, run_dir, *flags)
    assert ended.exit_codes == [2] * ranks
    (line,) = {line for line in ended.output.splitlines() if line.startswith("error:")}
    assert f"the disk mounted at {small_disk} has " in line
    assert "No space left on device" in line
    assert json.loads((run_dir / "state.json").read_text())["status"] == "failed"
    checkpoint, said = newest_good(run_dir)
    assert (checkpoint.step if checkpoint else None, said) == (5, [])
    resize(small_disk, "size=20m,nr_inodes=1000")
    output = train_on(ranks, recipe, tiny_data, run_dir, *flags)
    assert f"continuing from {checkpoints_dir(run_dir)}/step-00000005" in output
    assert losses(run_dir) == (
        losses(two_saved) if ranks == 2 else pytest.approx(losses(two_saved), rel=1e-4)
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_fills_between_saves_is_one_line_too(
    ranks: int, recipe: Path, tiny_data: Path, two_saved: Path, small_disk: Path
) -> None:
    run_dir, flags = small_disk / "run", ("--stop-at-step", "10", "--checkpoints.every_steps=10")
    train_on(
        ranks, recipe, tiny_data, run_dir, "--stop-at-step", "2", "--checkpoints.every_steps=10"
    )
    disk = os.statvfs(small_disk)
    used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
    resize(small_disk, f"size={used + 4096 * 3}")  # room for its state, not for long lines
    line = {"step": 0, "padding": "x" * 4096}
    (run_dir / "metrics.jsonl").write_text(
        "".join(json.dumps({**line, "step": step}) + "\n" for step in range(2))
    )
    ended = run_ranks(ranks, recipe, tiny_data, run_dir, *flags)
    assert ended.exit_codes[0] == 2, ended.output
    assert 0 not in ended.exit_codes
    (said,) = {line for line in ended.output.splitlines() if line.startswith("error:")}
    assert f"error: {run_dir}/checkpoints/step-00000010: not written: " in said
    assert "No space left on device; it needs " in said
    assert f"the disk mounted at {small_disk} has " in said
    resize(small_disk, "size=20m")
    output = train_on(ranks, recipe, tiny_data, run_dir, *flags)
    assert f"continuing from {checkpoints_dir(run_dir)}/step-00000002" in output


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_is_full_when_a_run_goes_on_is_one_line_too(
    ranks: int, recipe: Path, tiny_data: Path, small_disk: Path
) -> None:
    run_dir = small_disk / "run"
    train_on(ranks, recipe, tiny_data, run_dir, "--stop-at-step", "5")
    with contextlib.suppress(OSError), (small_disk / "other").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    ended = run_ranks(ranks, recipe, tiny_data, run_dir)
    assert ended.exit_codes[0] == 2, ended.output
    assert "Traceback" not in ended.output
    (said,) = [line for line in ended.output.splitlines() if line.startswith("error")]
    assert f"error: {run_dir}: " in said
    assert f"No space left on device; the disk mounted at {small_disk} has " in said
    (small_disk / "other").unlink()
    output = train_on(ranks, recipe, tiny_data, run_dir, "--stop-at-step", "7")
    assert f"continuing from {checkpoints_dir(run_dir)}/step-00000005" in output


def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    sample, step = random.Random(3), 1
    killed_within = 0
    for _ in range(8):
        saver = Saver(tmp_path)
        saver.begin(step)
        assert saver.orders.recv() == "saved"
        saver.begin(step + 1)
        time.sleep(sample.uniform(0, 0.12))
        killed_within += not saver.orders.poll()
        saver.close()
        checkpoint, said = newest_good(tmp_path)
        assert checkpoint is not None
        assert said == []
        assert checkpoint.step in (step, step + 1)
        assert float(checkpoint.read("weight", "master", 7, 1)) == checkpoint.step
        step = checkpoint.step + 1
    assert killed_within >= 2

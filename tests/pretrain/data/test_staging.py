import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from support.forked_ranks import run_ranks, train_on
from support.runs import losses, write_recipe

from data_prep.errors import UserError
from data_prep.shards import ShardReader
from pretrain.config.recipe import DataRecipe
from pretrain.data.data_check import DataCheck
from pretrain.data.staging import staged
from pretrain.distributed.world import World


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def test_ranks_train_from_one_copy_as_from_the_data_set_itself(
    tiny_data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", train_tokens=4 * 6 * 32)
    stage = f"--data.stage_dir={tmp_path / 'local'}"
    train_on(2, recipe, tiny_data, tmp_path / "plain")
    train_on(2, recipe, tiny_data, tmp_path / "staged", stage)
    (copy,) = (tmp_path / "local").iterdir()
    assert copy.name == ShardReader(tiny_data).manifest.fingerprint
    assert contents(copy) == contents(tiny_data)
    assert losses(tmp_path / "staged") == losses(tmp_path / "plain")


def test_a_copy_is_made_once_and_a_broken_off_one_is_completed(
    tiny_data: Path, tmp_path: Path
) -> None:
    reader = ShardReader(tiny_data)
    copy = staged(reader, tmp_path).data_dir
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("*.npy")}
    # as a kill leaves it: some files whole, one in the making, no manifest
    (copy / "manifest.json").unlink()
    first = next(iter(times))
    first.rename(first.with_name(first.name + ".tmp"))
    again = staged(reader, tmp_path)
    assert contents(again.data_dir) == contents(tiny_data)
    kept = {path: path.stat().st_mtime_ns for path in times if path != first}
    assert kept == {path: time for path, time in times.items() if path != first}


def test_a_staged_copy_whose_files_went_missing_or_short_is_mended(
    tiny_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    (data / "tokenizer").mkdir()
    (data / "tokenizer" / "tokenizer.json").write_text("{}")
    reader = ShardReader(data)
    copy = staged(reader, tmp_path / "local").data_dir
    first, second, *others = sorted(copy.rglob("*.npy"))
    times = {path: path.stat().st_mtime_ns for path in others}
    first.unlink()
    os.truncate(second, second.stat().st_size - 1)
    (copy / "tokenizer" / "tokenizer.json").unlink()
    (copy / "manifest.json").write_text("{}")
    staged(reader, tmp_path / "local")
    assert contents(copy) == contents(data)
    assert times == {path: path.stat().st_mtime_ns for path in others}


def test_a_staged_shard_with_a_damaged_header_is_copied_again(
    tiny_data: Path, tmp_path: Path
) -> None:
    reader = ShardReader(tiny_data)
    copy = staged(reader, tmp_path).data_dir
    shard = copy / reader.manifest.shards[0].path
    shard.write_bytes(b"X" + shard.read_bytes()[1:])
    assert contents(staged(reader, tmp_path).data_dir) == contents(tiny_data)


# Several users of a node

OTHER_USER = 65_534  # nobody


@pytest.fixture
def open_to_all(tiny_data: Path) -> Iterator[Path]:
    """A directory that every user can enter, with a data set in it that all can read, and a
    stage that all can fill.
    """
    if os.geteuid():
        pytest.skip("becoming another user needs root")
    with TemporaryDirectory() as home:
        os.chmod(home, 0o755)
        shutil.copytree(tiny_data, Path(home, "data"))
        Path(home, "stage").mkdir()
        os.chmod(Path(home, "stage"), 0o1777)
        yield Path(home)


def as_another_user(action: Callable[[], object]) -> str:
    """What an action gives in a process of another user, or the line that it ends with."""
    answers = multiprocessing.get_context("fork").SimpleQueue()

    def body() -> None:
        os.setgroups([])
        os.setresgid(OTHER_USER, OTHER_USER, OTHER_USER)
        os.setresuid(OTHER_USER, OTHER_USER, OTHER_USER)
        try:
            answers.put(str(action()))
        except UserError as error:
            answers.put(str(error))

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join()
    assert process.exitcode == 0
    return str(answers.get())


def stage_as_another_user(data: Path, stage: Path) -> str:
    """Where another user reads the data from, or the line that they get."""
    reader = ShardReader(data)
    return as_another_user(lambda: staged(reader, stage).data_dir)


def test_a_copy_of_another_user_that_differs_is_not_trained_on_whatever_data_verify_says(
    open_to_all: Path,
) -> None:
    data, stage = open_to_all / "data", open_to_all / "stage"
    copy = staged(ShardReader(data), stage).data_dir
    shard = copy / ShardReader(data).manifest.shards[0].path
    content = shard.read_bytes()
    shard.write_bytes(content[:-64] + bytes(64))
    reader = ShardReader(copy)
    alone = World(rank=0, world_size=1, local_rank=0, local_world_size=1)

    def check() -> None:
        with DataCheck(reader, data, stage / "run", DataRecipe(verify="never"), alone) as own:
            own.finish()

    assert as_another_user(check).startswith(f"{shard}: differs from its digest: ")
    assert "another user staged it: give another data.stage_dir" in as_another_user(check)
    assert shard.read_bytes() != content
    check()  # who made it may leave that out
    shard.write_bytes(content)
    assert as_another_user(check) == "None"


def test_a_whole_copy_of_another_user_is_read_where_it_is(open_to_all: Path) -> None:
    data, stage = open_to_all / "data", open_to_all / "stage"
    copy = staged(ShardReader(data), stage).data_dir
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    os.chmod(stage, 0o755)  # nor need it be open to all then
    assert stage_as_another_user(data, stage) == str(copy)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


@pytest.mark.parametrize("damage", ["truncated", "no manifest", "unreadable"])
def test_beside_a_copy_of_another_user_that_is_not_whole_one_of_their_own_is_made_and_kept(
    damage: str, open_to_all: Path
) -> None:
    data, stage = open_to_all / "data", open_to_all / "stage"
    copy = staged(ShardReader(data), stage).data_dir
    if damage == "truncated":
        os.truncate(next(copy.rglob("*.npy")), 200)
    elif damage == "no manifest":
        (copy / "manifest.json").unlink()
    else:
        os.chmod(copy, 0o700)
    own = Path(stage_as_another_user(data, stage))
    assert own == copy.with_name(f"{copy.name}.uid-{OTHER_USER}")
    assert contents(own) == contents(data)
    os.chmod(copy, 0o755)
    staged(ShardReader(data), stage)  # the first user's is whole again
    assert stage_as_another_user(data, stage) == str(own)


def test_where_another_user_may_not_write_the_line_says_what_to_do(open_to_all: Path) -> None:
    data, stage = open_to_all / "data", open_to_all / "stage"
    os.chmod(stage, 0o755)
    line = stage_as_another_user(data, stage)
    assert line.startswith(
        f"data.stage_dir {stage}: you may not make a copy of the data there (Permission denied); "
    )
    assert f"chmod 1777 {stage}" in line


def test_a_damaged_file_is_not_staged(tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    shard = data / ShardReader(data).manifest.shards[1].path
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"{shard}: differs from its digest"):
        staged(ShardReader(data), tmp_path / "local")
    (copy,) = (tmp_path / "local").iterdir()
    assert not (copy / "manifest.json").exists()
    assert shard.name not in [path.name for path in copy.glob(f"**/{shard.parent.name}/*")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode or os.geteuid():
        pytest.skip("mounting needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_too_small_is_one_line_with_the_bytes_needed(
    tiny_data: Path, small_disk: Path, tmp_path: Path
) -> None:
    (small_disk / "full").write_bytes(bytes(60_000))
    recipe = write_recipe(tmp_path / "r.yaml")
    ended = run_ranks(1, recipe, tiny_data, tmp_path / "run", f"--data.stage_dir={small_disk}")
    assert ended.exit_codes == [2]
    (line,) = [line for line in ended.output.splitlines() if line.startswith("error:")]
    assert f"data.stage_dir {small_disk}: " in line
    assert "bytes to copy" in line
    assert not (tmp_path / "run").exists()

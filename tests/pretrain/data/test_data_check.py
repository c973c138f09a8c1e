"""The digests of the data under a run: nothing is trained on bytes that are not the data set's."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.forked_ranks import run_ranks, train_on
from support.runs import counting_dataset, losses, write_recipe

from data_prep.files import digest_file
from data_prep.shards import SHARD_HEADER_BYTES, ShardReader
from pretrain.config.load import load_recipe
from pretrain.data.data_check import CHECKED_NAME, largest_first
from pretrain.data.digests import check_shards
from pretrain.run.state import read_state


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return counting_dataset(tmp_path / "data")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "tiny.yaml", train_tokens=4 * 6 * 32)


def zero(path: Path) -> None:
    """As a disk leaves a file whose blocks were never written: header and size are good, all ids
    0.
    """
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(SHARD_HEADER_BYTES)
        file.write(bytes(size - SHARD_HEADER_BYTES))


def flip_the_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def keep_times(path: Path, damage: Callable[[Path], None]) -> None:
    """Damage that leaves no trace in the file system: below it, on the disk."""
    times = path.stat()
    damage(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def error_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize(
    ("ranks", "name", "damage"),
    [
        (1, "train/up/00000.npy", zero),
        (2, "train/more/00000.npy", flip_the_last_bit),
        (1, "validation/up/00000.npy", zero),
        (1, "train/up/00000.documents.npy", flip_the_last_bit),
        (1, "train/more/00000.documents.npy", Path.unlink),
    ],
)
def test_no_step_is_trained_on_a_file_that_is_not_as_it_was_built(
    ranks: int, name: str, damage: Callable[[Path], None], data: Path, recipe: Path, tmp_path: Path
) -> None:
    bad = data / "shards" / name
    damage(bad)
    ended = run_ranks(ranks, recipe, data, tmp_path / "run")
    assert ended.exit_codes == [2] * ranks
    (line,) = error_lines(ended.output)
    assert line.startswith(f"error: {bad}: ")
    assert line.endswith(f"; python -m data_prep.verify {data} --repair builds it again")
    assert "Traceback" not in ended.output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert read_state(tmp_path / "run").status == "failed"


def test_digests_are_checked_once_and_again_when_a_file_changes(
    data: Path, recipe: Path, tmp_path: Path
) -> None:
    run_dir, shard = tmp_path / "run", data / "shards" / "train" / "up" / "00000.npy"
    good = shutil.copytree(data, tmp_path / "good")
    train_on(1, recipe, data, run_dir, "--stop-at-step=1")
    (stamp,) = (run_dir / CHECKED_NAME).iterdir()
    written = stamp.stat().st_ino
    keep_times(shard, zero)  # which nobody looks for
    train_on(1, recipe, data, run_dir, "--stop-at-step=2")
    assert stamp.stat().st_ino == written
    os.utime(shard)
    ended = run_ranks(1, recipe, data, run_dir)
    assert ended.exit_codes == [2]
    assert f"{shard}: differs from its digest" in ended.output
    shutil.copyfile(good / shard.relative_to(data), shard)
    train_on(1, recipe, data, run_dir)
    assert stamp.stat().st_ino != written


def test_always_finds_what_the_file_system_does_not_show_and_never_looks_at_nothing(
    data: Path, recipe: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    train_on(1, recipe, data, run_dir, "--stop-at-step=1")
    keep_times(data / "shards" / "train" / "up" / "00000.npy", zero)
    assert run_ranks(1, recipe, data, run_dir, "--data.verify=always").exit_codes == [2]
    train_on(1, recipe, data, run_dir, "--data.verify=never", "--stop-at-step=2")
    train_on(1, recipe, data, tmp_path / "other", "--data.verify=never", "--stop-at-step=1")
    assert not (tmp_path / "other" / CHECKED_NAME).exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"stamp": null}', b"\xff", b"[" * 100_000])
def test_a_damaged_stamp_has_the_data_checked_again(
    content: bytes, data: Path, recipe: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    train_on(1, recipe, data, run_dir, "--stop-at-step=1")
    (stamp,) = (run_dir / CHECKED_NAME).iterdir()
    good = stamp.read_bytes()
    stamp.write_bytes(content)
    train_on(1, recipe, data, run_dir, "--stop-at-step=2")
    assert stamp.read_bytes() == good


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_zeroed_file_of_a_staged_copy_is_copied_again_and_said(
    ranks: int, data: Path, recipe: Path, tmp_path: Path
) -> None:
    stage = f"--data.stage_dir={tmp_path / 'local'}"
    train_on(ranks, recipe, data, tmp_path / "plain")
    train_on(ranks, recipe, data, tmp_path / "run", stage, "--stop-at-step=1")
    copy = tmp_path / "local" / ShardReader(data).manifest.fingerprint
    bad = copy / "shards" / "train" / "up" / "00000.npy"
    zero(bad)
    output = train_on(ranks, recipe, data, tmp_path / "run", stage)
    assert (
        f"warning: {bad}: differed from its digest; 1 such files were copied again from {data}"
        in output
    )
    assert digest_file(bad) == digest_file(data / bad.relative_to(copy))
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_where_the_data_set_is_bad_too_a_staged_file_is_not_mended(
    data: Path, recipe: Path, tmp_path: Path
) -> None:
    stage = f"--data.stage_dir={tmp_path / 'local'}"
    train_on(1, recipe, data, tmp_path / "run", stage, "--stop-at-step=1")
    copy = tmp_path / "local" / ShardReader(data).manifest.fingerprint
    name = "shards/train/up/00000.npy"
    zero(copy / name)
    zero(data / name)
    ended = run_ranks(1, recipe, data, tmp_path / "run", stage)
    assert ended.exit_codes == [2]
    (line,) = error_lines(ended.output)
    assert line.startswith(f"error: {data / name}: differs from its digest; ")


def test_ranks_of_a_node_share_the_files(data: Path) -> None:
    sizes = {f"shard {number}": number * number for number in range(50)}
    parts = [largest_first(sizes, part, 8) for part in range(8)]
    assert sorted(path for part in parts for path in part) == sorted(sizes)
    read = [sum(sizes[path] for path in part) for part in parts]
    assert max(read) - min(read) <= max(sizes.values())
    assert sorted(largest_first(sizes, 0, 1)) == sorted(sizes)


def test_a_recipe_without_the_key_checks_once(recipe: Path) -> None:
    assert load_recipe(str(recipe)).data.verify == "once"


def test_some_shards_can_be_checked_alone(data: Path) -> None:
    reader = ShardReader(data)
    zero(data / "shards" / "train" / "up" / "00000.npy")
    check_shards(reader, reader.manifest.shards_of("validation"))
    with pytest.raises(Exception, match=r"up/00000\.npy: differs from its digest"):
        check_shards(reader, reader.manifest.shards_of("train"))

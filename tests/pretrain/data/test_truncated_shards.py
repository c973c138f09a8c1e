"""A shard that is truncated under a running job: a line that names it, where reading on would be
deadly.
"""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.forked_ranks import arguments_of, be_a_rank, end_of, logs_of, start_ranks
from support.runs import counting_dataset, steps_of, write_recipe
from support.waiting import wait_until

from data_prep.errors import UserError
from data_prep.shards import ShardReader
from launch.outcome import Standing, describe_failure
from pretrain.data import stream
from pretrain.data.loader import TrainingLoader, ValidationWindows
from pretrain.run.state import RunState, read_state

LONG = f"--train_tokens={10**6 * 6 * 32}"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return counting_dataset(tmp_path / "data")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(
        tmp_path / "tiny.yaml",
        checkpoints={"every_steps": 10**6},
        validation={"every_steps": 10**6},
    )


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("left", [0, 128, 200])
def test_a_mapped_shard_that_was_cut_is_named_by_the_next_read(
    split: str, left: int, data: Path
) -> None:
    reader = ShardReader(data)
    shard = data / reader.manifest.shards_of(split)[0].path
    samples, windows = (
        TrainingLoader(reader, seq_len=8, seed=1),
        ValidationWindows(reader, seq_len=8),
    )
    reads: dict[str, list[Callable[[], object]]] = {
        "train": [lambda: samples.samples(np.arange(500))],
        "validation": [lambda: windows.window(0), lambda: windows.windows(np.arange(20))],
    }
    for read in reads[split]:
        read()
    os.truncate(shard, left)
    for read in reads[split]:
        with pytest.raises(
            UserError,
            match=rf"{shard}: {left:,} bytes, expected [\d,]+: truncated while it was in use",
        ):
            read()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_job_whose_shard_is_cut_ends_with_a_line_that_names_it(
    ranks: int, data: Path, recipe: Path, tmp_path: Path
) -> None:
    run_dir, shard = tmp_path / "run", data / "shards" / "train" / "up" / "00000.npy"
    logs = logs_of(ranks, run_dir)
    processes = start_ranks(arguments_of(recipe, data, run_dir, LONG), logs)
    wait_until(lambda: steps_of(run_dir) >= 3, "3 steps")
    os.truncate(shard, 200)
    ended = end_of(processes, logs, timeout_s=60)
    assert ended.exit_codes == [2] * ranks, ended.output
    (line,) = [line for line in ended.output.splitlines() if line.startswith("error:")]
    assert re.match(
        rf"error: (rank 1 \(.+\): )?{shard}: 200 bytes, expected [\d,]+: truncated while it was",
        line,
    )
    assert read_state(run_dir).status == "failed"
    assert f"{shard}: 200 bytes, expected " in read_state(run_dir).reason


def test_a_rank_alone_meeting_a_cut_shard_ends_all_with_its_line(
    data: Path, recipe: Path, tmp_path: Path
) -> None:
    run_dir, shard = tmp_path / "run", data / "shards" / "train" / "up" / "00000.npy"
    logs = logs_of(3, run_dir)
    arguments = arguments_of(recipe, data, run_dir, LONG)
    ended = end_of(
        start_ranks(arguments, logs, be_a_rank_that_loses_its_data, LOST=str(shard)),
        logs,
        timeout_s=60,
    )
    assert ended.exit_codes == [2, 2, 2], ended.output
    (line,) = [line for line in ended.output.splitlines() if line.startswith("error:")]
    assert re.match(rf"error: rank 2 \(.+\): {shard}: ", line)
    assert line == f"error: {read_state(run_dir).reason}"
    assert "Traceback" not in ended.output


def be_a_rank_that_loses_its_data(
    arguments: list[str], variables: dict[str, str], log: Path
) -> None:
    """Body of a forked rank; rank 2 finds a shard cut in its fourth step, as where its node
    alone is at fault.
    """
    honest, calls = ShardReader.tokens, iter(range(10**9))

    def tokens(reader: ShardReader, shard: object) -> object:
        if variables["RANK"] == "2" and next(calls) > 60:
            raise UserError(f"{variables['LOST']}: truncated while it was in use")
        return honest(reader, shard)  # type: ignore[arg-type]

    ShardReader.tokens = tokens  # type: ignore[method-assign, assignment]
    be_a_rank(arguments, variables, log)


def be_a_rank_killed_by_a_cut_shard(
    arguments: list[str], variables: dict[str, str], log: Path
) -> None:
    """Body of a forked rank; rank 1 is killed as by reading a page that was cut off after the
    look at its length.
    """
    from pretrain.engine.engine import Engine

    honest, calls = Engine.train_step, iter(range(10**9))

    def train_step(engine: Engine, *step: object) -> object:
        if variables["RANK"] == "1" and next(calls) == 3:
            os.truncate(variables["CUT"], 200)
            os.kill(os.getpid(), signal.SIGBUS)
        return honest(engine, *step)  # type: ignore[arg-type]

    Engine.train_step = train_step  # type: ignore[method-assign, assignment]
    be_a_rank(arguments, variables, log)


def test_where_a_rank_is_killed_the_shard_that_may_have_done_it_is_named(
    data: Path, recipe: Path, tmp_path: Path
) -> None:
    run_dir, shard = tmp_path / "run", data / "shards" / "train" / "up" / "00000.npy"
    logs = logs_of(2, run_dir)
    arguments = arguments_of(recipe, data, run_dir, LONG)
    ended = end_of(
        start_ranks(arguments, logs, be_a_rank_killed_by_a_cut_shard, CUT=str(shard)),
        logs,
        timeout_s=60,
    )
    assert ended.exit_codes[1] == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in ended.output  # with the stack of the rank
    reason = read_state(run_dir).reason
    assert re.match(
        rf"rank 1 \(.+\) is gone: killed, or its machine failed; {shard}: 200 bytes, expected ",
        reason,
    )


def test_the_script_that_started_a_killed_run_looks_at_its_data(data: Path) -> None:
    before, now = Standing(state=RunState()), Standing(state=RunState(status="running"))
    killed = "its ranks or their launcher were killed (the launcher's exit code 249)"
    assert describe_failure(249, before, now, data) == killed
    shard = data / "shards" / "train" / "up" / "00000.npy"
    os.truncate(shard, 200)
    assert describe_failure(249, before, now, data).startswith(
        f"{killed}; {shard}: 200 bytes, expected "
    )


def test_more_shards_than_the_kernel_lets_a_process_map_are_refused_before_any_is(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ShardReader(data)
    limit = tmp_path / "max_map_count"
    limit.write_text(f"{stream.OTHER_MAPS + len(reader.manifest.shards)}\n")
    monkeypatch.setattr(stream, "MAX_MAP_COUNT", limit)
    TrainingLoader(reader, seq_len=8, seed=1)
    limit.write_text(f"{stream.OTHER_MAPS + len(reader.manifest.shards) - 1}\n")
    for look in (
        lambda: TrainingLoader(reader, seq_len=8, seed=1),
        lambda: ValidationWindows(reader, seq_len=8),
    ):
        with pytest.raises(
            UserError, match=r"has 3 shards to map, .* 4,098 memory maps; .*vm.max_map_count="
        ):
            look()
    monkeypatch.setattr(stream, "MAX_MAP_COUNT", tmp_path / "not linux")
    TrainingLoader(reader, seq_len=8, seed=1)

"""Saving while training goes on: what is saved, in how much memory, and how failures reach every
rank.
"""

import os
import re
import resource
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.forked_ranks import fork_server
from support.hand_made_runs import manifest_of
from support.runs import free_port, run_command

from data_prep.errors import UserError
from pretrain.checkpoint.find import newest_good
from pretrain.checkpoint.layout import saved_steps
from pretrain.checkpoint.reader import Checkpoint, Fragment
from pretrain.checkpoint.writer import AroundSaves, CheckpointWriter
from pretrain.config.recipe import CheckpointsRecipe
from pretrain.distributed.world import World
from pretrain.engine.clock import StepClock
from pretrain.run.saving import around_saves
from pretrain.run.state import RunState, read_state, write_state

STATES = ("master", "exp_avg", "exp_avg_sq")
ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)
SHAPES = {"a": [1000], "b": [10, 3]}


def state_of(value: float) -> list[Fragment]:
    """Two parameters, every element of one value."""
    sizes = {"a": 1000, "b": 30}
    return [
        Fragment(
            name=name,
            start=0,
            states={state: torch.full((size,), float(value)) for state in STATES},
        )
        for name, size in sizes.items()
    ]


def writer_of(
    run_dir: Path, keep_last: int = 2, keep_every: int | None = None
) -> tuple[CheckpointWriter, list[str]]:
    """A writer of one rank, and a list that grows with every failure."""
    failures: list[str] = []
    recipe = CheckpointsRecipe(every_steps=1, keep_last=keep_last, keep_every=keep_every)
    return CheckpointWriter(
        run_dir, recipe, ALONE, around_saves(run_dir, lambda: failures.append("failed"))
    ), failures


def test_a_checkpoint_is_that_of_the_saved_step_whatever_training_does_meanwhile(
    tmp_path: Path,
) -> None:
    writer, failures = writer_of(tmp_path)
    for step in (1, 2, 3):
        fragments = state_of(step)
        writer.save(fragments, manifest_of(step, SHAPES))
        for fragment in fragments:
            for values in fragment.states.values():
                values.fill_(-1.0)
    writer.wait()
    assert [path.name for path in saved_steps(tmp_path)] == ["step-00000003", "step-00000002"]
    for path, step in zip(saved_steps(tmp_path), (3, 2), strict=True):
        assert Checkpoint(path).damage() is None
        for name, shape in (("a", [1000]), ("b", [10, 3])):
            for state in STATES:
                assert torch.equal(
                    Checkpoint(path).parameter(name, state), torch.full(shape, float(step))
                )
    assert read_state(tmp_path) == RunState(saved_step=3)
    assert failures == []


def test_its_memory_is_that_of_the_state_once_for_all_saves(tmp_path: Path) -> None:
    writer, _ = writer_of(tmp_path)
    places = set()
    for step in (1, 2, 3):
        fragments = state_of(step)
        writer.save(fragments, manifest_of(step, SHAPES))
        places.add(writer._memory.data_ptr())
        assert (
            writer._memory.nbytes
            == sum(v.nbytes for f in fragments for v in f.states.values())
            == 12 * 1030
        )
    writer.wait()
    assert len(places) == 1


def test_every_so_many_th_checkpoint_is_kept(tmp_path: Path) -> None:
    with writer_of(tmp_path, keep_last=1, keep_every=4)[0] as writer:
        for step in range(1, 10):
            writer.save(state_of(step), manifest_of(step, SHAPES))
    assert [int(path.name[-2:]) for path in saved_steps(tmp_path)] == [9, 8, 4]


def test_a_failed_save_is_told_at_the_next_one_and_the_run_is_asked_to_end(tmp_path: Path) -> None:
    writer, failures = writer_of(tmp_path)
    writer.save(state_of(1), manifest_of(1, SHAPES))
    writer.wait()
    # a file, which cannot be cleared like a directory
    (tmp_path / "checkpoints" / ".step-00000002.tmp").write_text("")
    writer.save(state_of(2), manifest_of(2, SHAPES))
    with pytest.raises(
        UserError, match=r"step-00000002: not written: .*; it needs 12,360 bytes, the disk mounted"
    ):
        writer.save(state_of(3), manifest_of(3, SHAPES))
    assert failures == ["failed"]
    (tmp_path / "checkpoints" / ".step-00000002.tmp").unlink()
    writer.save(state_of(3), manifest_of(3, SHAPES))  # told once
    writer.wait()
    assert [path.name for path in saved_steps(tmp_path)] == ["step-00000003", "step-00000001"]


def test_leaving_it_waits_for_the_checkpoint_and_tells_what_came_first(tmp_path: Path) -> None:
    writer, _ = writer_of(tmp_path)
    with pytest.raises(KeyError), writer:  # noqa: PT012
        writer.save(state_of(1), manifest_of(1, SHAPES))
        raise KeyError
    assert newest_good(tmp_path)[0].step == 1  # type: ignore[union-attr]
    (tmp_path / "checkpoints" / ".step-00000002.tmp").write_text("")
    with pytest.raises(UserError, match="step-00000002: not written"), writer:
        writer.save(state_of(2), manifest_of(2, SHAPES))


def test_threads_lose_none_of_each_other_s_changes_of_the_state(tmp_path: Path) -> None:
    fields = ("began", "saved_step", "reason", "fingerprint", "branched_from")

    def change(name: str) -> None:
        for number in range(20):
            value = number if name in ("began", "saved_step") else str(number)
            write_state(tmp_path, **{name: value})

    write_state(tmp_path, status="running")
    threads = [threading.Thread(target=change, args=(name,)) for name in fields]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_state(tmp_path) == RunState(
        status="running",
        began=19,
        saved_step=19,
        reason="19",
        fingerprint="19",
        branched_from="19",
    )


def test_the_benchmark_of_saving_and_loading_runs() -> None:
    result = run_command(sys.executable, "tests/benchmarks/checkpoint_speed.py", "--quick")
    assert result.returncode == 0, result.stderr
    for row in (
        r"save, of a plain .* \| [\d.]+ \|",
        r"load, of a .* \| [\d.]+ \|",
        r"load: digests \| [\d.]+ \|",
    ):
        assert re.search(row, result.stdout), result.stdout


def be_a_rank(rank: int, port: int, run_dir: Path, answer: Connection) -> None:
    """Body of a forked rank: sums over ranks while its writer saves; then a save that fails on
    rank 1 alone.
    """
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2"
    )
    dist.init_process_group("gloo")
    world = World(rank=rank, world_size=2, local_rank=rank, local_world_size=2)
    found: dict[str, object] = {"sums": True, "failures": 0}

    def fails() -> None:
        found["failures"] = 1

    with CheckpointWriter(
        run_dir, CheckpointsRecipe(every_steps=1), world, around_saves(run_dir, fails)
    ) as writer:
        for step in range(1, 9):
            fragment = Fragment(
                name="a",
                start=500 * rank,
                states={s: torch.full((500,), float(step)) for s in STATES},
            )
            writer.save([fragment], manifest_of(step, {"a": [1000]}))
            for number in range(25):
                total = torch.tensor([float(number + rank)])
                dist.all_reduce(total)
                found["sums"] = found["sums"] and total.item() == 2 * number + 1
        writer.wait()
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        writer.save([fragment], manifest_of(9, SHAPES))
        try:
            writer.wait()
        except UserError as error:
            found["error"] = str(error)
    answer.send(found)
    dist.destroy_process_group()


def test_ranks_save_beside_the_exchanges_of_training_and_share_a_failure(tmp_path: Path) -> None:
    pipes, processes, port = [fork_server().Pipe() for _ in range(2)], [], free_port()
    for rank, (_, theirs) in enumerate(pipes):
        processes.append(
            fork_server().Process(target=be_a_rank, args=(rank, port, tmp_path, theirs))
        )
        processes[-1].start()
    found = [ours.recv() if ours.poll(60) else {} for ours, _ in pipes]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert all(one["sums"] and one["failures"] == 1 for one in found)
    # what is free may change meanwhile
    said = {one["error"].partition(" has ")[0] for one in found}
    assert len(said) == 1
    assert "step-00000009: not written: " in found[0]["error"]
    assert "File too large; it needs 12,000 bytes, the disk mounted at /" in found[0]["error"]
    checkpoint, said = newest_good(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, said) == (8, [])
    assert torch.equal(checkpoint.parameter("a"), torch.full((1000,), 8.0))


def test_writing_a_checkpoint_counts_as_moving(tmp_path: Path) -> None:
    clock = StepClock(torch.device("cpu"))
    before = clock.place()
    recipe = CheckpointsRecipe(every_steps=1)
    with CheckpointWriter(
        tmp_path, recipe, ALONE, AroundSaves(wrote_block=clock.note_progress)
    ) as writer:
        states = {state: torch.zeros(3_000_000) for state in ("master", "exp_avg", "exp_avg_sq")}
        fragment = Fragment(name="weight", start=0, states=states)
        writer.save([fragment], manifest_of(1, {"weight": [3_000_000]}))
    assert clock.place()[:3] == before[:3]
    assert clock.place()[3] == 1 + 3 * 3  # the header; blocks of 4 MiB

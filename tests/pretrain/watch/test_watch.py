"""Ranks that watch one another: a rank that dies, falls silent, fails or stalls ends the job,
with its cause named.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.forked_ranks import arguments_of, be_a_rank, end_of, logs_of, run_ranks, start_ranks
from support.hand_made_shards import write_dataset, write_source
from support.runs import (
    REPOSITORY,
    counting_documents,
    environment,
    free_port,
    steps_of,
    write_recipe,
)
from support.waiting import wait_until

LONG = f"--train_tokens={10**5 * 6 * 32}"


def state(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "state.json").read_text())


def error_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error")]


def be_a_troubled_rank(arguments: list[str], variables: dict[str, str], log: Path) -> None:
    """Body of a forked rank that at its fourth step does what TROUBLE says, if RANK is TROUBLED."""
    from pretrain.engine.engine import Engine
    from pretrain.watch import watch

    watch.SILENCE_S = float(variables.get("SILENCE_S", watch.SILENCE_S))
    troubled = variables["RANK"] in variables["TROUBLED"].split()
    calls, honest = iter(range(10**6)), Engine.train_step

    def train_step(engine: Engine, *step: Any) -> Any:
        if troubled and next(calls) == 3:
            (Path(variables["MARK"]) / variables["RANK"]).touch()
            if variables["TROUBLE"] == "raises":
                raise ZeroDivisionError("of a defect on this rank")
            time.sleep(600)
        return honest(engine, *step)

    Engine.train_step = train_step  # type: ignore[method-assign]
    be_a_rank(arguments, variables, log)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(
        tmp_path / "tiny.yaml",
        checkpoints={"every_steps": 10**6},
        validation={"every_steps": 10**6},
    )


@pytest.mark.parametrize("killed", [0, 2])
def test_when_a_rank_is_killed_the_others_end_even_outside_a_collective(
    killed: int, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    sleeping = [rank for rank in range(3) if rank != killed]
    variables = {
        "TROUBLED": " ".join(map(str, sleeping)),
        "TROUBLE": "sleeps",
        "MARK": str(tmp_path),
    }
    run_dir = tmp_path / "run"
    logs = logs_of(3, run_dir)
    processes = start_ranks(
        arguments_of(recipe, tiny_data, run_dir, LONG), logs, be_a_troubled_rank, **variables
    )
    wait_until(
        lambda: all((tmp_path / str(rank)).exists() for rank in sleeping),
        "the others to be outside",
    )
    began = time.monotonic()
    os.kill(processes[killed].pid or 0, signal.SIGKILL)
    ended = end_of(processes, logs, timeout_s=10)
    assert ended.exit_codes == [-9 if rank == killed else 1 for rank in range(3)], ended.output
    assert time.monotonic() - began < 10
    assert state(run_dir)["status"] == "failed"
    assert re.match(rf"rank {killed} \(.+\) is gone: killed, ", state(run_dir)["reason"])
    assert error_lines(ended.output) == [f"error: {state(run_dir)['reason']}"]


def be_a_rank_that_may_not_connect(
    arguments: list[str], variables: dict[str, str], log: Path
) -> None:
    """Body of a forked rank that is killed, if it is rank 1, when all have met and it is to
    connect.
    """
    from pretrain.watch import watch

    watch.CONNECT_S = 2.0
    if variables["RANK"] == "1":
        watch.connect = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, return-value]
    be_a_rank(arguments, variables, log)


def test_a_rank_killed_before_it_is_watched_ends_the_others(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    began = time.monotonic()
    ended = run_ranks(
        3, recipe, tiny_data, tmp_path / "run", LONG, body=be_a_rank_that_may_not_connect
    )
    assert time.monotonic() - began < 60
    assert ended.exit_codes[:2] == [1, -9], ended.output
    assert ended.exit_codes[2] not in (0, -9)
    reason = state(tmp_path / "run")["reason"]
    assert re.fullmatch(
        r"rank 1 \(.+\) did not connect within 2 s: killed, or its machine failed", reason
    )
    assert f"error: {reason}" in ended.output


def test_an_error_of_one_rank_is_named_as_the_cause_not_what_it_did_to_the_others(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    variables = {"TROUBLED": "1", "TROUBLE": "raises", "MARK": str(tmp_path)}
    ended = run_ranks(
        3, recipe, tiny_data, tmp_path / "run", LONG, body=be_a_troubled_rank, **variables
    )
    assert 0 not in ended.exit_codes
    assert re.match(
        r"rank 1 \(.+\): ZeroDivisionError: of a defect on this rank",
        state(tmp_path / "run")["reason"],
    )
    assert "Traceback (most recent call last)" in (tmp_path / "run.rank-1.log").read_text()


def test_the_cause_is_named_where_ranks_0_and_1_die_together(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    variables, logs = (
        {"TROUBLED": "2", "TROUBLE": "sleeps", "MARK": str(tmp_path)},
        logs_of(3, run_dir),
    )
    processes = start_ranks(
        arguments_of(recipe, tiny_data, run_dir, LONG), logs, be_a_troubled_rank, **variables
    )
    wait_until(lambda: (tmp_path / "2").exists(), "the other to be outside a collective")
    for process in processes[:2]:
        os.kill(process.pid or 0, signal.SIGKILL)
    assert end_of(processes, logs, timeout_s=10).exit_codes == [-9, -9, 1]
    assert re.match(r"rank 0 \(.+\) is gone: killed, ", state(run_dir)["reason"])


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_does_not_answer_ends_the_job(
    silent: int, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """As a machine that hangs, or whose network is cut: its connections stay open, and nothing
    comes.
    """
    run_dir = tmp_path / "run"
    variables = {"TROUBLED": "", "TROUBLE": "", "MARK": "", "SILENCE_S": "3"}
    logs = logs_of(2, run_dir)
    processes = start_ranks(
        arguments_of(recipe, tiny_data, run_dir, LONG), logs, be_a_troubled_rank, **variables
    )
    wait_until(lambda: steps_of(run_dir) >= 3, "three steps")
    os.kill(processes[silent].pid or 0, signal.SIGSTOP)
    processes[1 - silent].join(20)
    ended = end_of(processes, logs, timeout_s=0)  # the silent one never ends by itself
    assert ended.exit_codes == [-9 if rank == silent else 1 for rank in range(2)], ended.output
    assert re.match(
        rf"rank {silent} \(.+\) has not answered for {3 if silent else 8} s",
        state(run_dir)["reason"],
    )


def test_a_stall_is_ended_with_every_rank_s_stack_and_the_slowest_named(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    variables = {"TROUBLED": "1", "TROUBLE": "sleeps", "MARK": str(tmp_path)}
    began = time.monotonic()
    ended = run_ranks(
        3,
        recipe,
        tiny_data,
        run_dir,
        LONG,
        "--stalls.after_s=2",
        body=be_a_troubled_rank,
        **variables,
    )
    assert time.monotonic() - began < 60
    assert ended.exit_codes == [1, 1, 1], ended.output
    reason = state(run_dir)["reason"]
    assert state(run_dir)["status"] == "failed"
    assert re.match(
        r"stalled: nothing has moved for \d+ s, .* slowest is rank 1 \(.+\), whose last sign was",
        reason,
    )
    assert "after 3 steps" in reason
    stacks = [(run_dir / "logs" / f"rank-{rank:05d}.log").read_text() for rank in range(3)]
    assert "test_watch.py" in stacks[1]  # where it sleeps
    assert all("Thread" in stack and "engine.py" in stack for stack in (stacks[0], stacks[2]))


# Every launcher: a rank is killed while the other evaluates, which it does on its own


@pytest.fixture(scope="module")
def long_validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_dir = tmp_path_factory.mktemp("long") / "dataset"
    train = write_source(data_dir, "train", "up", counting_documents(150, 512, 1), 0)
    validation = write_source(data_dir, "validation", "up", counting_documents(40_000, 512, 3), 0)
    return write_dataset(data_dir, [train, validation], {"up": 1.0}, 512)


def test_a_long_validation_is_no_stall(long_validation: Path, tmp_path: Path) -> None:
    """It lasts for seconds, of which less than one without a sign would be a stall."""
    recipe = write_recipe(
        tmp_path / "r.yaml", validation={"every_steps": 4, "eval_tokens": 400_000}
    )
    impatient = ("--stalls.after_s=0.5", "--stalls.after_medians=1", "--stop-at-step=4")
    began = time.monotonic()
    ended = run_ranks(1, recipe, long_validation, tmp_path / "run", *impatient)
    assert ended.exit_codes == [0], ended.output
    assert time.monotonic() - began > 4


def launchers() -> dict[str, list[str]]:
    python = [sys.executable, "-m", "pretrain.train"]
    return {
        "deepspeed": [
            "deepspeed",
            "--num_gpus=2",
            f"--master_port={free_port()}",
            "--module",
            "pretrain.train",
        ],
        "torchrun": [
            "torchrun",
            "--nproc-per-node=2",
            f"--master-port={free_port()}",
            "-m",
            "pretrain.train",
        ],
        "mpiexec": ["mpiexec", "-n", "2", *python],
    }


@pytest.mark.parametrize(
    ("launcher", "killed"), [("deepspeed", 1), ("torchrun", 0), ("mpiexec", 1)]
)
def test_on_every_launcher_no_rank_outlives_another(
    launcher: str, killed: int, long_validation: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml",
        validation={"every_steps": 2, "eval_tokens": 10**8},
        batch={"global_batch_tokens": 6 * 32, "micro_batch_size": 1},
    )
    run_dir = tmp_path / "run"
    flags = [
        "--recipe",
        str(recipe),
        "--data-dir",
        str(long_validation),
        "--run-dir",
        str(run_dir),
        LONG,
    ]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*launchers()[launcher], *flags],
            cwd=REPOSITORY,
            env=environment(),
            stdout=output,
            stderr=output,
        )
    family: list[psutil.Process] = []
    try:
        wait_until(lambda: steps_of(run_dir) >= 1 or process.poll() is not None, "a step")
        assert process.poll() is None, log.read_text()
        family += psutil.Process(process.pid).children(recursive=True)
        # whose python a launcher's script names as python or as python3
        here = Path(sys.executable).parent
        ours = [
            child
            for child in family
            if str(run_dir) in child.cmdline() and Path(child.cmdline()[0]).parent == here
        ]
        ranks = [each for each in ours if "RANK" in each.environ() or "PMI_RANK" in each.environ()]
        ranks.sort(key=rank_of)
        assert [rank_of(each) for each in ranks] == [0, 1], [each.cmdline() for each in family]
        time.sleep(1)
        ranks[killed].kill()
        began = time.monotonic()
        psutil.wait_procs(ranks, timeout=10)
        left = [
            each for each in ranks if each.is_running() and each.status() != psutil.STATUS_ZOMBIE
        ]
        assert not left, log.read_text()
        assert time.monotonic() - began < 10
        assert process.wait(timeout=60) != 0
        # which looks after its ranks once a second: the watch was first
        if launcher == "deepspeed":
            assert state(run_dir)["reason"].startswith(f"rank {killed} (")
        assert not [
            each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE
        ]
    finally:  # nothing of a failed test goes on
        family += (
            psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        )
        process.kill()
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()


def rank_of(process: psutil.Process) -> int:
    """As the launcher says it."""
    variables = process.environ()
    return int(variables.get("RANK", variables.get("PMI_RANK", "-1")))


def test_a_job_that_was_suspended_as_a_whole_goes_on(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """As Slurm suspends jobs, or a virtual machine is stopped."""
    run_dir, variables = tmp_path / "run", {"TROUBLED": "", "SILENCE_S": "3"}
    logs = logs_of(2, run_dir)
    processes = start_ranks(
        arguments_of(recipe, tiny_data, run_dir, LONG), logs, be_a_troubled_rank, **variables
    )
    wait_until(lambda: steps_of(run_dir) >= 3, "steps")
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            os.kill(process.pid or 0, number)
        time.sleep(10)
    steps = (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    wait_until(lambda: steps_of(run_dir) >= steps + 3, "more steps", 20)
    os.kill(processes[0].pid or 0, signal.SIGTERM)
    assert end_of(processes, logs, timeout_s=60).exit_codes == [0, 0]

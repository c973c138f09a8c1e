"""A run that is told to end: it finishes its step, saves, and goes on later as if nothing had
happened.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.forked_ranks import arguments_of, end_of, logs_of, start_ranks, train_on
from support.runs import REPOSITORY, environment, launch_training, losses, steps_of, write_recipe

STEP = 6 * 32  # tokens
SIGNALS_AMID_LINES = """
import os, signal, threading, time
from types import SimpleNamespace
from pretrain.distributed.agree import say
from pretrain.distributed.world import World
from pretrain.watch.signals import end_on_signals

def send():
    while time.monotonic() < end:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1e-4)

world, end = World(rank=0, world_size=1, local_rank=0, local_world_size=1), time.monotonic() + 1.5
end_on_signals(SimpleNamespace(), world)
thread = threading.Thread(target=send)
thread.start()
while thread.is_alive():
    end_on_signals(SimpleNamespace(), world)
    say(world, "x" * 200)
"""
LONG = f"--train_tokens={10**5 * STEP}"


def start(command: list[str], run_dir: Path) -> subprocess.Popen[str]:
    """The training command, once it has taken three steps."""
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 100
    while steps_of(run_dir) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)
    return process


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(
        tmp_path / "tiny.yaml",
        checkpoints={"every_steps": 10**6},
        validation={"every_steps": 10**6},
    )


def assert_goes_on(called: str, output: str, recipe: Path, data: Path, run_dir: Path) -> None:
    """That a run was ended well by a signal, and that the same command goes on as if it had not
    been.
    """
    state = json.loads((run_dir / "state.json").read_text())
    steps = len(losses(run_dir))
    assert (state["status"], state["saved_step"]) == ("preempted", steps)
    assert f"{called}: ending after this step" in output
    assert state["reason"] == f"stopped at step {steps}, as {called} asked"
    train_on(1, recipe, data, run_dir, LONG, "--stop-at-step", str(steps + 5))
    unbroken = run_dir.with_name("unbroken")
    train_on(1, recipe, data, unbroken, LONG, "--stop-at-step", str(steps + 5))
    assert losses(run_dir) == losses(unbroken)


def test_ctrl_c_ends_a_run_after_its_step_and_the_same_command_goes_on_bitwise_equal(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    process = start(launch_training(1, recipe, tiny_data, tmp_path / "run", LONG), tmp_path / "run")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # launchers repeat them
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert_goes_on("Ctrl-C (SIGINT)", output, recipe, tiny_data, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_run_after_its_step_and_the_same_command_goes_on_bitwise_equal(
    number: signal.Signals, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    logs = logs_of(1, run_dir)
    (rank,) = start_ranks(arguments_of(recipe, tiny_data, run_dir, LONG), logs)
    while steps_of(run_dir) < 3:
        assert rank.is_alive(), logs[0].read_text()
        time.sleep(0.01)
    for _ in range(2):
        os.kill(rank.pid or 0, number)
    ended = end_of([rank], logs, timeout_s=60)
    assert ended.exit_codes == [0], ended.output
    assert_goes_on(number.name, ended.output, recipe, tiny_data, run_dir)


def test_a_signal_to_one_rank_ends_all(recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    process = start(launch_training(2, recipe, tiny_data, tmp_path / "run", LONG), tmp_path / "run")
    children = psutil.Process(process.pid).children(recursive=True)
    (rank,) = [child for child in children if "--local_rank=1" in child.cmdline()]
    os.kill(rank.pid, signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["status"], state["saved_step"]) == ("preempted", len(losses(tmp_path / "run")))
    assert state["reason"].endswith(", as SIGUSR1 asked")  # rank 0, which writes it, got none


def test_a_signal_to_the_launch_script_ends_its_ranks_well(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    flags = [
        "--recipe",
        str(recipe),
        "--data-dir",
        str(tiny_data),
        "--run-dir",
        str(tmp_path / "run"),
        "--ranks=2",
    ]
    process = start(["launch/pretrain.sh", *flags, LONG], tmp_path / "run")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["status"], state["saved_step"]) == ("preempted", len(losses(tmp_path / "run")))
    assert state["reason"].endswith(", as Ctrl-C (SIGINT) asked")
    left = [
        p
        for p in psutil.process_iter(["cmdline"])
        if str(tmp_path / "run") in (p.info["cmdline"] or [])
    ]
    assert not left


def test_a_signal_to_every_process_of_the_launch_script_s_job_ends_its_ranks_well(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """As Slurm does when the time is up, or systemd: the launchers die of it, the ranks finish
    their step.
    """
    flags = [
        "--recipe",
        str(recipe),
        "--data-dir",
        str(tiny_data),
        "--run-dir",
        str(tmp_path / "run"),
        "--ranks=2",
    ]
    long_steps = (LONG, f"--batch.global_batch_tokens={60 * 32}", "--model.num_layers=20")
    process = start(["launch/pretrain.sh", *flags, *long_steps], tmp_path / "run")
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["status"], state["saved_step"]) == ("preempted", len(losses(tmp_path / "run")))
    left = [
        p
        for p in psutil.process_iter(["cmdline"])
        if str(tmp_path / "run") in (p.info["cmdline"] or [])
    ]
    assert not left


def test_a_signal_amid_a_line_of_the_log_ends_nothing_by_an_error() -> None:
    variables = environment()
    variables.pop("PYTHONUNBUFFERED", None)
    command = [sys.executable, "-c", SIGNALS_AMID_LINES]
    result = subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stderr.count("SIGTERM: ending after this step") > 10


def test_ctrl_c_before_training_is_no_traceback(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    command = launch_training(1, recipe, tiny_data, tmp_path / "run", LONG)
    code = (
        "import signal, sys, os; signal.signal(2, signal.SIG_DFL); os.execv(sys.argv[1], "
        "sys.argv[1:])"
    )
    # Ctrl-C reaches nothing that was started in the background, as tests may be
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        cwd=REPOSITORY,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(1.5)  # it imports for longer
    process.send_signal(signal.SIGINT)
    try:
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, said) == (-signal.SIGINT, "")


def test_a_later_signal_ends_a_run_at_once(recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    long_steps = (LONG, f"--batch.global_batch_tokens={200 * 32}", "--model.num_layers=100")
    command = launch_training(1, recipe, tiny_data, tmp_path / "run", *long_steps)
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    while "device cpu" not in process.stderr.readline():
        assert process.poll() is None
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(2.5)
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM

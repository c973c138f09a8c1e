"""The supervisor of a run: what it does when a start fails, with the real launcher and trainer."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.forked_ranks import train_on
from support.processes import processes_of
from support.runs import (
    REPOSITORY,
    environment,
    losses,
    run_command,
    steps_of,
    tiny_recipe_content,
    write_recipe,
)
from support.waiting import wait_until

from data_prep.errors import UserError
from data_prep.locks import lock
from launch import hosts
from launch.hosts import Found, read_hostfile, trim
from launch.outcome import standing
from launch.supervise import Job, Supervisor
from pretrain.config.load import build_recipe

LONG = f"--train_tokens={10**5 * 6 * 32}"
# Every Python imports it: rank 1 dies as it takes the batch of a step of FAIL_AT, once for each, or
# always.
FAULT = """
import os
import time
from pathlib import Path

if os.environ.get("RANK") == "1":
    from pretrain.data.batches import Prefetch

    def take_or_die(self, step, take=Prefetch.take):
        died = Path(__file__).with_name(f"died-at-{step}")
        again = "ALWAYS" in os.environ or not died.exists()
        if str(step) in os.environ["FAIL_AT"].split() and again:
            # Saves go on beside the steps after them: the one that was due is to be there.
            saved = died.parents[1] / "run" / "checkpoints" / f"step-{step // 5 * 5:08d}"
            until = time.monotonic() + 60
            while not saved.exists() and time.monotonic() < until:
                time.sleep(0.05)
            died.touch()
            os.kill(os.getpid(), 9)
        return take(self, step)

    Prefetch.take = take_or_die
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "tiny.yaml")


def faults(home: Path, steps: str, **more: str) -> dict[str, str]:
    """Variables with which rank 1 dies in these steps."""
    (home / "faults").mkdir()
    (home / "faults" / "sitecustomize.py").write_text(FAULT)
    return {
        "PYTHONPATH": f"{home / 'faults'}:{REPOSITORY}",
        "FAIL_AT": steps,
        "BACK_OFF_S": "0.2",
        **more,
    }


def command(recipe: Path, data: Path, run_dir: Path, *more: str) -> list[str]:
    """A run of two ranks."""
    flags = [
        "--recipe",
        str(recipe),
        "--data-dir",
        str(data),
        "--run-dir",
        str(run_dir),
        "--ranks=2",
    ]
    return ["launch/pretrain.sh", *flags, *more]


def start(typed: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
    """A command that goes on."""
    variables = {"BACK_OFF_S": "0.2", **variables}
    with log.open("wb") as file:
        return subprocess.Popen(
            typed, cwd=REPOSITORY, env=environment(**variables), stdout=file, stderr=file
        )


def wait_for_word(word: str, job: subprocess.Popen[bytes], log: Path) -> None:
    """Until the log of a running job holds it."""
    wait_until(lambda: word in log.read_text(), word, 200, job=job, log=log)


def status_of(run_dir: Path) -> str:
    return str(json.loads((run_dir / "state.json").read_text())["status"])


def test_a_run_whose_rank_was_killed_goes_on_by_itself_bitwise_equal(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    typed = command(recipe, tiny_data, tmp_path / "run", "--max-restarts", "1")
    result = run_command(*typed, **faults(tmp_path, "12"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("+ deepspeed") == 2
    assert (
        f"{tmp_path / 'run'}: restart 1 continues from step-00000010, if that is whole, on 2 "
        "ranks\n" in result.stderr
    )
    assert status_of(tmp_path / "run") == "done"
    train_on(2, recipe, tiny_data, tmp_path / "unbroken", "--deepspeed-config", "zero2_fp32")
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")
    again = run_command(*typed)
    assert again.returncode == 0
    assert "this run is finished" in again.stderr


def test_restarts_that_are_used_up_are_said_so(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    typed = command(recipe, tiny_data, tmp_path / "run", "--max-restarts=1")
    result = run_command(*typed, **faults(tmp_path, "7 12"))
    assert result.returncode == 1
    assert result.stdout.count("+ deepspeed") == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'run'}: ")
    assert last.endswith("; no restarts left of 1; the same command continues")
    assert not processes_of(tmp_path / "run")


def test_a_step_that_fails_twice_ends_the_run_and_its_documents_are_named(
    recipe: Path, text_data: Path, tmp_path: Path
) -> None:
    typed = command(recipe, text_data, tmp_path / "run", "--max-restarts=9")
    result = run_command(*typed, **faults(tmp_path, "12", ALWAYS="1"))
    assert result.returncode == 1
    assert result.stdout.count("+ deepspeed") == 2
    last = result.stderr.splitlines()[-1]
    assert (
        "step 12 failed twice in a row; it has the samples 72 to 77, and python -m pretrain.trace "
        in last
    )
    shown = run_command(
        *shlex.split(re.search(r"and (python -m pretrain\.trace .*) shows", last)[1])
    )  # type: ignore[index]
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("sample     72: row 0 of step 12, which has 6 rows")


@pytest.mark.parametrize(
    ("killed", "last_signal"),
    [(r"-m deepspeed\.launcher\.launch ", signal.SIGTERM), ("bin/deepspeed ", signal.SIGKILL)],
    ids=[
        "the node's launcher, then SIGTERM to the script",
        "deepspeed itself, then SIGKILL to the script",
    ],
)
def test_a_killed_launcher_s_ranks_end_before_the_next_start_and_nothing_outlives_the_script(
    killed: str, last_signal: signal.Signals, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    job = start(command(recipe, tiny_data, run_dir, LONG, "--max-restarts=1"), log)
    wait_until(lambda: steps_of(run_dir) >= 3, "three steps", 200, job=job, log=log)
    ranks = processes_of(run_dir, "--local_rank=")
    assert len(ranks) == 2
    (launcher,) = [
        process
        for process in processes_of(run_dir, killed)
        if "supervise.py" not in process.cmdline()[1]
    ]
    launcher.kill()
    wait_for_word("restart 1 continues from", job, log)
    assert not [
        rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE
    ]
    wait_until(
        lambda: standing(run_dir).starts == 2 and steps_of(run_dir) >= 3,
        "three steps of the second start",
        200,
        job=job,
        log=log,
    )
    assert len(processes_of(run_dir, "--local_rank=")) == 2
    job.send_signal(last_signal)
    if last_signal == signal.SIGTERM:
        assert job.wait(60) == 0, log.read_text()
        assert status_of(run_dir) == "preempted"
        assert not processes_of(run_dir)
    else:
        job.wait()
        wait_until(lambda: not processes_of(run_dir), "all to end", 10, log=log)


def test_bad_input_is_not_tried_again(recipe: Path, tiny_data: Path, tmp_path: Path) -> None:
    result = run_command(
        *command(recipe, tiny_data, tmp_path / "run", "--max-restarts=3", "--model.depth=9")
    )
    assert result.returncode == 2
    assert "+ deepspeed" not in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {recipe} --model.depth=9: unknown key model.depth; ")
    assert "restart" not in result.stderr


def test_a_signal_ends_the_wait_for_a_restart(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    typed = command(recipe, tiny_data, tmp_path / "run", "--max-restarts=3")
    job = start(typed, log, **faults(tmp_path, "7", BACK_OFF_S="300"))
    wait_for_word("restart 1 of 3 in 300 s", job, log)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(10) == 128 + signal.SIGUSR1
    assert log.read_text().endswith(": ended by SIGUSR1; the same command continues\n")


def test_a_signal_before_any_rank_is_there_ends_the_start(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    job = start(command(recipe, tiny_data, tmp_path / "run", "--max-restarts=1"), log)
    wait_for_word("+ deepspeed", job, log)
    job.send_signal(signal.SIGINT)
    assert job.wait(30) == 128 + signal.SIGINT, log.read_text()
    assert not processes_of(tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_second_signal_ends_the_run_at_once(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    long_steps = (LONG, f"--batch.global_batch_tokens={200 * 32}", "--model.num_layers=100")
    log = tmp_path / "log"
    job = start(command(recipe, tiny_data, tmp_path / "run", *long_steps), log)
    wait_for_word("device cpu", job, log)
    job.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    job.send_signal(signal.SIGTERM)
    assert job.wait(10) == 128 + signal.SIGTERM, log.read_text()
    wait_until(lambda: not processes_of(tmp_path / "run"), "all to end", 5, log=log)


def supervisor(run_dir: Path, ranks: int | None = None) -> Supervisor:
    job = Job(recipe="", data_dir=Path(), run_dir=run_dir, ranks=ranks, trainer_flags=[])
    return Supervisor(job)


def test_a_restart_waits_until_the_last_rank_let_go_of_the_directory(tmp_path: Path) -> None:
    holder = "import sys, time; from pathlib import Path; from data_prep.locks import lock\n"
    holder += "held = lock(Path(sys.argv[1]), '', ''); print('held', flush=True); time.sleep(2)"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    process.stdout.readline()
    before = time.monotonic()
    supervisor(tmp_path).wait(0.1)
    assert time.monotonic() - before > 1
    lock(tmp_path, "", "").close()
    process.wait()


def test_gpus_that_are_gone_or_back_are_counted_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = supervisor(tmp_path, ranks=None)

    def found(gpus: int) -> Found:
        monkeypatch.setattr(hosts, "COUNT_GPUS", ("echo", str(gpus)))
        return job.find_gpus()

    assert found(8) == ({"": 8}, {"": 8})
    job.ports.append("1")
    assert found(7) == ({"": 8}, {"": 7})
    with pytest.raises(UserError, match="no GPU is left"):
        found(0)
    assert found(8) == ({"": 8}, {"": 8})


@pytest.mark.parametrize(
    ("version", "imports"),
    [
        ("cuda = '12.8'\nhip = None\n", True),
        ("cuda = None\nhip = '6.4'\n", True),
        ("__version__ = '3.0'\n", True),
        (None, True),
        ("cuda: str | None = None\nhip: str | None = None\n", False),
    ],
    ids=["CUDA", "ROCm", "says nothing", "has no version.py", "CPU"],
)
def test_gpus_are_asked_of_torch_unless_it_was_built_for_cpus(
    version: str | None, imports: bool, tmp_path: Path
) -> None:
    """By a stand-in for the torch of another machine, which says 3."""
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "__init__.py").write_text("class cuda:\n    device_count = staticmethod(lambda: 3)\n")
    if version is not None:
        (torch / "version.py").write_text(version)
    result = run_command(*hosts.COUNT_GPUS, PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stdout) == (0, "3\n" if imports else "0\n"), result.stderr


@given(
    slots=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    micro_batch_size=st.integers(1, 4),
    batch=st.integers(1, 64),
)
def test_ranks_that_are_left_are_as_many_as_divide_a_step(
    slots: list[int], micro_batch_size: int, batch: int
) -> None:
    sizes = {"global_batch_tokens": batch * 32, "micro_batch_size": micro_batch_size}
    recipe = build_recipe(tiny_recipe_content(batch=sizes, train_tokens=100 * batch * 32), "a test")
    asked = {f"node{number}": ranks for number, ranks in enumerate(slots)}
    fitting = [n for n in range(1, sum(slots) + 1) if batch % (n * micro_batch_size) == 0]
    kept = trim(asked, recipe)
    assert sum(kept.values()) == max(fitting, default=sum(slots))
    names = list(kept)
    assert names == list(asked)[: len(names)]
    assert all(kept[host] == asked[host] for host in names[:-1])
    assert 0 < kept[names[-1]] <= asked[names[-1]]


def test_a_hostfile_is_read_as_deepspeed_does_or_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\n\n  node1   slots=8  \n10.0.0.2 slots=4\n")
    assert read_hostfile(path) == {"node1": 8, "10.0.0.2": 4}
    bad = {
        "node1\n": 1,
        "node1 slots=0\n": 1,
        "a slots=1\na slots=2\n": 2,
        "a slots=1\n\nb slots=1 # b\n": 3,
    }
    for text, line in bad.items():
        path.write_text(text)
        with pytest.raises(UserError, match=f"line {line}: "):
            read_hostfile(path)
    path.write_text("# none yet\n")
    with pytest.raises(UserError, match="names no host"):
        read_hostfile(path)


def test_a_job_whose_output_nobody_reads_any_more_goes_on_after_a_rank_is_killed(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    typed = command(recipe, tiny_data, tmp_path / "run", "--max-restarts=1")
    variables = environment(**faults(tmp_path, "12"))
    pipe = subprocess.PIPE
    with subprocess.Popen(
        typed, cwd=REPOSITORY, env=variables, stdout=pipe, stderr=subprocess.STDOUT
    ) as job:
        assert job.stdout
        assert job.stdout.readline().startswith(b"+ deepspeed")
        job.stdout.close()  # as when `tee` is killed
        assert job.wait(200) == 0
    assert status_of(tmp_path / "run") == "done"
    assert steps_of(tmp_path / "run") == 20
    assert (tmp_path / "faults" / "died-at-12").exists()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (
            "import sys; sys.exit('the driver is not loaded')",
            "GPUs cannot be counted: the driver is not loaded\n; mend the driver",
        ),
        ("import time; time.sleep(60)", "no answer in 1 s; see why"),
    ],
)
def test_gpus_that_cannot_be_counted_are_bad_input_at_first_and_a_failed_start_later(
    code: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "COUNT_GPUS", (sys.executable, "-c", code))
    monkeypatch.setattr(hosts, "ANSWER_S", 1.0)
    with pytest.raises(UserError, match=says):
        supervisor(tmp_path / "run").find_gpus()

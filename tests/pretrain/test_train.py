import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.forked_ranks import run_ranks, train_on
from support.hand_made_runs import trained_step
from support.hand_made_shards import write_dataset, write_source
from support.runs import (
    REPOSITORY,
    TINY_VOCAB_SIZE,
    counting_dataset,
    counting_documents,
    environment,
    free_port,
    launch_training,
    losses,
    run_command,
    write_recipe,
)
from support.waiting import wait_until

from data_prep.errors import UserError
from data_prep.shards import ShardReader
from pretrain.config.load import load_recipe
from pretrain.config.schedule import learning_rate
from pretrain.distributed.world import World, world_from_environment
from pretrain.metrics.metrics_file import MetricsFile
from pretrain.train import main

STEPS = 20
TIMINGS = (
    "tokens_per_s",
    "tokens_per_s_per_rank",
    "step_s",
    "seconds",
    "peak_memory_bytes",
    "slowest",
    "mfu_of_matmul",
)
PHASES = ["data", "forward", "backward", "optimizer", "other"]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def state(run_dir: Path) -> dict[str, Any]:
    """How the run stands, without when it was last started."""
    content = json.loads((run_dir / "state.json").read_text())
    assert content.pop("began") > 0
    return content


def saved(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# Runs that several tests look at; 20 steps of 6 windows, a checkpoint every 5


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml")


@pytest.fixture(scope="module")
def one_rank(recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one plain Python process, from start to end."""
    run_dir = tmp_path_factory.mktemp("one-rank") / "run"
    result = run_command(*launch_training(1, recipe, tiny_data, run_dir))
    assert result.returncode == 0, result.stderr
    assert f"{run_dir}: finished after 20 steps" in result.stderr
    return run_dir


@pytest.fixture(scope="module")
def two_ranks(recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `deepspeed --module` with two ranks, from start to end."""
    run_dir = tmp_path_factory.mktemp("two-ranks") / "run"
    result = run_command(*launch_training(2, recipe, tiny_data, run_dir))
    assert result.returncode == 0, result.stdout + result.stderr
    return run_dir


@dataclass(frozen=True, kw_only=True)
class KilledRun:
    """A run killed after its first checkpoint, and the same run continued by the same command."""

    as_left: Path
    continued: Path
    log: str


def descendants(pid: int) -> list[int]:
    """All processes started by a process, and by those."""
    parent_of = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = status.read_text().rpartition(")")[2].split()
        except OSError:  # it ended while we looked
            continue
        parent_of[int(status.parent.name)] = int(after_name[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parent_of.items() if parent == one]
    return found[1:]


def is_running(pid: int) -> bool:
    """Whether a process exists and is not just waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def killed_run(
    recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> KilledRun:
    """`deepspeed pretrain/train.py` with two ranks, SIGKILL for launcher and ranks, then the
    same command again.
    """
    home = tmp_path_factory.mktemp("killed")
    run_dir, as_left, log = home / "run", home / "as-left", home / "log"
    flags = ["--recipe", str(recipe), "--data-dir", str(tiny_data), "--run-dir", str(run_dir)]
    command = [
        "deepspeed",
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        "pretrain/train.py",
        *flags,
    ]
    with log.open("w") as output:
        launcher = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment(), stdout=output, stderr=output
        )
    wait_until(
        lambda: (run_dir / "checkpoints" / "latest").exists() or launcher.poll() is not None,
        "the first checkpoint",
        300,
        every_s=0.003,
    )
    ours = [launcher.pid, *descendants(launcher.pid)]
    for pid in ours:
        os.kill(pid, signal.SIGKILL)
    launcher.wait()
    assert len(ours) >= 4, log.read_text()  # the runner, the launcher on this node, two ranks
    wait_until(
        lambda: not any(map(is_running, ours)), "the killed processes to be gone", timeout_s=10
    )
    shutil.copytree(run_dir, as_left)

    result = run_command(*command)
    assert result.returncode == 0, result.stdout + result.stderr
    return KilledRun(as_left=as_left, continued=run_dir, log=result.stderr)


# What a run leaves


def test_a_run_learns_and_leaves_one_line_for_every_step(one_rank: Path, recipe: Path) -> None:
    lines = metrics(one_rank)
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert [line["tokens"] for line in lines] == [192 * (step + 1) for step in range(STEPS)]
    schedule = load_recipe(str(recipe)).schedule
    assert [line["learning_rate"] for line in lines] == [
        learning_rate(i, STEPS, 0.01, schedule) for i in range(STEPS)
    ]
    # 6.24 nats: it knows nothing yet
    assert lines[0]["loss"] == pytest.approx(np.log(TINY_VOCAB_SIZE), rel=0.02)
    assert lines[-1]["loss"] < 5.3
    validated = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    assert list(validated) == [4, 9, 14, 19]
    assert validated[19] < validated[4]


def test_a_run_s_directory_says_what_was_asked_for_and_how_it_stands(
    one_rank: Path, recipe: Path, tiny_data: Path
) -> None:
    assert load_recipe(str(one_rank / "recipe.yaml")) == load_recipe(str(recipe))
    engine = json.loads((one_rank / "deepspeed.json").read_text())
    assert (
        engine["train_batch_size"],
        engine["gradient_accumulation_steps"],
        engine["gradient_clipping"],
    ) == (6, 6, 1)
    assert state(one_rank) == {
        "status": "done",
        "reason": None,
        "fingerprint": ShardReader(tiny_data).manifest.fingerprint,
        "saved_step": STEPS,
    }
    # the two newest are kept
    assert saved(one_rank) == ["latest", "step-00000015", "step-00000020"]
    manifest = json.loads(
        (one_rank / "checkpoints" / "step-00000020" / "manifest.json").read_text()
    )
    assert (manifest["step"], manifest["optimizer_step"], manifest["seed"]) == (20, 20, 1)
    assert manifest["fingerprint"] == state(one_rank)["fingerprint"]


def test_every_step_says_where_its_time_went(one_rank: Path, two_ranks: Path) -> None:
    for run_dir, ranks in ((one_rank, 1), (two_ranks, 2)):
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert lines[0]["slowest"] is None  # a step late
        for line in lines:
            assert list(line["seconds"]) == list((line["slowest"] or line)["seconds"]) == PHASES
            assert line["step_s"] == pytest.approx(sum(line["seconds"].values()))
            assert line["tokens_per_s"] == pytest.approx(192 / line["step_s"])
            assert line["tokens_per_s_per_rank"] == pytest.approx(192 / line["step_s"] / ranks)
            assert 50e6 < line["peak_memory_bytes"] < 50e9
            # nobody knows a CPU's peak: a measured product stands for it
            assert "mfu" not in line
            assert line["mfu_of_matmul"] > 0
        assert {line["slowest"]["rank"] for line in lines[1:]} <= set(range(ranks))
        if ranks == 1:  # its own figures, a step later
            own = [line["seconds"] for line in lines]
            assert [line["slowest"]["seconds"] for line in lines[1:]] == own[:-1]
        assert all(
            line["seconds"]["forward"] > 0 and line["seconds"]["backward"] > 0 for line in lines
        )
        assert all(line["seconds"]["optimizer"] > 0 for line in lines[1:])
        assert sum(line["seconds"]["data"] for line in lines) < 0.2 * sum(
            line["step_s"] for line in lines
        )
        # setting up is part of no step
        assert lines[0]["seconds"]["data"] + lines[0]["seconds"]["other"] < 0.5


def test_a_profile_leaves_a_trace_and_the_ten_largest_costs(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    train_on(1, recipe, tiny_data, tmp_path / "short", "--profile", "2", "--stop-at-step", "1")
    # of the one step that there was
    assert (tmp_path / "short" / "profile" / "trace.json").exists()
    output = train_on(
        1, recipe, tiny_data, tmp_path / "run", "--profile", "2", "--stop-at-step", "6"
    )
    events = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert {"aten::addmm", "aten::_fused_adamw_"} <= names
    table = (tmp_path / "run" / "profile" / "table.txt").read_text()
    assert table in output
    assert len([line for line in table.splitlines() if "%" in line and "Self" not in line]) == 10
    assert "steps 2 to 3" in output


def test_a_dry_run_says_what_would_be_trained_and_touches_nothing(
    recipe: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--recipe",
        str(recipe),
        "--data-dir",
        str(tiny_data),
        "--run-dir",
        str(tmp_path / "run"),
        "--dry-run",
    ]
    assert main([*flags, "--schedule.kind=linear"]) == 0
    said = capsys.readouterr().out
    sections = said.split("# ")[1:]
    names = [section.partition("\n")[0] for section in sections]
    assert names == [
        "recipe, resolved",
        "DeepSpeed configuration, merged",
        "parameters",
        "learning rate",
        "steps and data",
    ]
    resolved, merged, parameters, rates, data = (section.partition("\n")[2] for section in sections)
    assert yaml.safe_load(resolved)["schedule"]["kind"] == "linear"
    assert json.loads(merged)["gradient_accumulation_steps"] == 6
    # 2 blocks: 12 * 48^2 and 13 * 48 each; the last norm; 512 rows of output projection
    assert f"{2 * (12 * 48 * 48 + 13 * 48) + 2 * 48 + 512 * 48:,}" in parameters
    assert "step          0   5.0000e-03" in rates
    assert "step         19   1.0000e-03" in rates
    assert "20 steps of 192 tokens: 1 rank x 6 micro-batches x 1 window of 32" in data
    assert "epochs: up 0.45, more 0.39" in data
    assert not (tmp_path / "run").exists()
    assert not torch.distributed.is_initialized()


def test_a_source_gone_through_more_than_four_times_gets_a_warning(
    recipe: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--recipe",
        str(recipe),
        "--data-dir",
        str(tiny_data),
        "--run-dir",
        str(tmp_path / "run"),
        "--dry-run",
    ]
    assert main([*flags, "--train_tokens=36_000"]) == 0
    said = capsys.readouterr().out
    (warning,) = [line for line in said.splitlines() if "warning" in line]
    assert "up is gone through 4.3 times" in warning  # the other one 3.7 times


def test_the_same_command_twice_gives_bitwise_equal_metrics(
    one_rank: Path, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    train_on(1, recipe, tiny_data, tmp_path / "again")
    assert metrics(tmp_path / "again") == metrics(one_rank)


def test_a_finished_run_says_so_and_changes_nothing(
    one_rank: Path, recipe: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in one_rank.rglob("*")}
    assert (
        main(["--recipe", str(recipe), "--data-dir", str(tiny_data), "--run-dir", str(one_rank)])
        == 0
    )
    assert "this run is finished" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in one_rank.rglob("*")} == before


@given(
    lines=st.integers(0, 12),
    start_step=st.integers(0, 12),
    torn=st.sampled_from(["", "{", '{"step": 99, "lo']),
)
def test_metrics_are_cut_back_to_the_step_at_which_a_run_goes_on(
    lines: int, start_step: int, torn: str
) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "metrics.jsonl"
        path.write_text("".join(f'{{"step": {step}}}\n' for step in range(lines)) + torn)
        file = MetricsFile(Path(directory), start_step)
        file.append(trained_step(start_step))
        file.close()
        kept = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert kept == [*range(min(lines, start_step)), start_step]


# Killed, resumed, on other ranks


def test_a_killed_run_had_saved_and_was_not_finished(killed_run: KilledRun) -> None:
    assert state(killed_run.as_left)["status"] == "running"
    assert "step-00000005" in saved(killed_run.as_left)
    assert len(metrics(killed_run.as_left)) < STEPS


def test_a_killed_run_goes_on_bitwise_equal_to_one_that_was_not(
    killed_run: KilledRun, two_ranks: Path
) -> None:
    assert "continuing from" in killed_run.log
    # each step once, those before the kill too
    assert metrics(killed_run.continued) == metrics(two_ranks)
    assert state(killed_run.continued) == state(two_ranks)
    assert saved(killed_run.continued) == saved(two_ranks)


def test_two_ranks_then_one_then_three_give_the_losses_of_two(
    killed_run: KilledRun, two_ranks: Path, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(killed_run.as_left, run_dir)
    train_on(1, recipe, tiny_data, run_dir, "--stop-at-step", "13")
    assert len(losses(run_dir)) == 13
    assert state(run_dir)["status"] == "preempted"
    train_on(3, recipe, tiny_data, run_dir)
    newest = run_dir / "checkpoints" / "step-00000020"
    assert len(list(newest.glob("*.safetensors"))) == 3
    assert losses(run_dir) == pytest.approx(losses(two_ranks), rel=1e-4)
    # the order of sums differs, so this compares two computations
    assert losses(run_dir) != losses(two_ranks)
    assert metrics(run_dir)[-1]["val_loss"] == pytest.approx(
        metrics(two_ranks)[-1]["val_loss"], rel=1e-4
    )


def test_a_stopped_run_may_go_on_with_another_micro_batch_recomputation_and_intervals(
    one_rank: Path, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    train_on(1, recipe, tiny_data, run_dir, "--stop-at-step", "7")
    assert saved(run_dir) == ["latest", "step-00000005", "step-00000007"]
    changes = {
        "batch.micro_batch_size": 3,
        "activation_checkpointing.mode": "full",
        "checkpoints.every_steps": 4,
        "checkpoints.keep_last": 1,
        "validation.every_steps": 6,
        "validation.eval_tokens": 64,
    }
    train_on(1, recipe, tiny_data, run_dir, *(f"--{key}={value}" for key, value in changes.items()))
    assert losses(run_dir) == pytest.approx(losses(one_rank), rel=1e-5)
    assert losses(run_dir)[:7] == losses(one_rank)[:7]
    assert saved(run_dir) == ["latest", "step-00000020"]
    assert [line["step"] for line in metrics(run_dir) if "val_loss" in line] == [4, 6, 11, 17, 19]
    assert load_recipe(str(run_dir / "recipe.yaml")).batch.micro_batch_size == 3


@pytest.fixture(scope="module")
def stopped_run(recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank stopped at step 12, with checkpoints of steps 10 and 12. Copy it before
    you go on.
    """
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    train_on(1, recipe, tiny_data, run_dir, "--stop-at-step", "12")
    return run_dir


def test_a_damaged_newest_checkpoint_is_said_and_the_older_one_used(
    stopped_run: Path, one_rank: Path, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stopped_run, run_dir)
    file = next((run_dir / "checkpoints" / "step-00000012").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    output = train_on(1, recipe, tiny_data, run_dir)
    assert f"step-00000012: {file.name} differs from its digest: " in output
    assert f"continuing from {run_dir}/checkpoints/step-00000010" in output
    assert metrics(run_dir)[12:] == metrics(one_rank)[12:]
    assert losses(run_dir) == losses(one_rank)


def test_a_run_whose_checkpoints_are_all_gone_is_refused_not_started_over(
    stopped_run: Path, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stopped_run, run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    ended = run_ranks(1, recipe, tiny_data, run_dir)
    assert ended.exit_codes == [2]
    (line,) = error_lines(ended.output)
    assert "step 12 was saved, but no good checkpoint is left" in line
    assert "Traceback" not in ended.output
    assert len(losses(run_dir)) == 12
    assert state(run_dir)["status"] == "failed"


def test_a_run_that_diverges_stops_with_one_line(tiny_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml", optimizer={"peak_learning_rate": 1e30, "gradient_clipping": 1e30}
    )
    ended = run_ranks(1, recipe, tiny_data, tmp_path / "run")
    assert ended.exit_codes == [2]
    (line,) = error_lines(ended.output)
    assert "training diverged" in line
    assert state(tmp_path / "run")["status"] == "failed"


# Compiled, masked


def test_a_compiled_and_masked_run_goes_on_bitwise_equal_and_compiles_once(
    recipe: Path, tiny_data: Path, one_rank: Path, tmp_path: Path
) -> None:
    keys = ["--compile=true", "--intra_document_masking=true"]
    unbroken = train_on(1, recipe, tiny_data, tmp_path / "unbroken", *keys, "--stop-at-step", "12")
    train_on(1, recipe, tiny_data, tmp_path / "broken", *keys, "--stop-at-step", "6")
    continued = train_on(1, recipe, tiny_data, tmp_path / "broken", *keys, "--stop-at-step", "12")
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    # validation after every fifth step did not
    assert "compiled its blocks again" not in unbroken + continued
    # Short documents: what masking takes away is a few tokens of others, so the losses are close
    # but other ones.
    assert losses(tmp_path / "broken") == pytest.approx(losses(one_rank)[:12], rel=0.05)
    assert losses(tmp_path / "broken")[3:] != losses(one_rank)[3:12]


# Launchers


@pytest.mark.parametrize(
    ("variables", "by_mpi"),
    [
        # deepspeed
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, False),
        # torchrun
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, False),
        # MPICH
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, True),
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            True,
        ),
    ],
)
def test_a_rank_knows_its_place_from_its_launcher_s_variables(
    variables: dict[str, str], by_mpi: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert world_from_environment() == World(rank=0, world_size=1, local_rank=0, local_world_size=1)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    expected = World(rank=3, world_size=4, local_rank=1, local_world_size=2, launched_by_mpi=by_mpi)
    assert world_from_environment() == expected


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_a_rank_that_knows_only_its_world_s_size_does_not_believe_that_it_is_alone(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "4")
    with pytest.raises(UserError, match=f"{variable}=4 says that this is one of several ranks"):
        world_from_environment()


def test_one_rank_computes_what_two_do(one_rank: Path, two_ranks: Path) -> None:
    assert losses(one_rank) == pytest.approx(losses(two_ranks), rel=1e-4)


def launched_by(launcher: str, flags: list[str]) -> list[str]:
    """A launcher's command for two ranks."""
    if launcher == "torchrun":
        return [
            "torchrun",
            "--nproc-per-node",
            "2",
            "--master-port",
            str(free_port()),
            "-m",
            "pretrain.train",
            *flags,
        ]
    mpiexec = Path(sys.executable).parent / "mpiexec"
    if not mpiexec.exists():
        pytest.skip(f"needs {mpiexec}: pip install mpich mpi4py")
    return [str(mpiexec), "-n", "2", sys.executable, "-m", "pretrain.train", *flags]


@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_another_launcher_gives_bitwise_the_losses_of_deepspeed(
    launcher: str, two_ranks: Path, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    flags = [
        "--recipe",
        str(recipe),
        "--data-dir",
        str(tiny_data),
        "--run-dir",
        str(run_dir),
        "--stop-at-step",
        "3",
    ]
    result = run_command(*launched_by(launcher, flags))
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(run_dir) == losses(two_ranks)[:3]
    assert len(list((run_dir / "checkpoints" / "step-00000003").glob("*.safetensors"))) == 2


# bf16


def test_bf16_zero2_on_two_ranks_learns_what_fp32_does(
    two_ranks: Path, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    train_on(2, recipe, tiny_data, tmp_path / "run", "--deepspeed-config", "zero2_bf16")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.9
    assert losses(tmp_path / "run") == pytest.approx(losses(two_ranks), rel=0.02)
    assert losses(tmp_path / "run") != losses(two_ranks)


def test_bf16_zero2_on_two_ranks_takes_a_step_with_all_65536_ids(tmp_path: Path) -> None:
    edges = [0, 32_767, 32_768, 65_535]
    documents = [[*edges, *document] for document in counting_documents(20, 65_536, seed=4)]
    written = [
        write_source(tmp_path / "data", split, "all", documents, 0)
        for split in ("train", "validation")
    ]
    data = write_dataset(tmp_path / "data", written, {"all": 1.0}, vocab_size=65_536)
    recipe = write_recipe(
        tmp_path / "r.yaml",
        model={"vocab_size": 65_536, "d_model": 64, "num_layers": 1, "seq_len": 16},
        batch={"global_batch_tokens": 32},
        validation={"eval_tokens": 16},
        train_tokens=32,
        engine="zero2_bf16",
    )
    train_on(2, recipe, data, tmp_path / "run")
    (line,) = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(np.log(65_536), rel=0.01)  # 11.09 nats
    assert line["val_loss"] == pytest.approx(np.log(65_536), rel=0.05)
    assert 0 < line["gradient_norm"] < 100


# Refusals: exit code 2, one line on stderr, nothing written


def error_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error:")]


def untouched(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["--seed=2"],
            "/step-00000012: this run was started with seed=1, got 2; give the old value",
        ),
        (["--model.num_layers=3"], "started with model.num_layers=2, got 3"),
        (
            ["--model.input_embedding=learned"],
            "started with model.input_embedding='binary_code', got 'learned'",
        ),
        (["--train_tokens=7680"], "started with train_tokens=3840, got 7680"),
        (
            ["--optimizer.peak_learning_rate=0.02"],
            "started with optimizer.peak_learning_rate=0.01, got 0.02",
        ),
        (
            ["--deepspeed-config=zero2_bf16"],
            "/step-00000012 (chosen with --deepspeed-config): this run was started with "
            "bf16.enabled=None, got True",
        ),
        (["--deepspeed-config=zero3"], "engine zero3: no such file; did you mean zero2_"),
        (["--no-such-flag"], "--no-such-flag: not a known flag"),
        (["--model.layers=3"], "unknown key model.layers; did you mean model."),
        (
            ["--batch.micro_batch_size=4"],
            "a step of 6 windows does not divide over 1 ranks x micro-batch 4; nearest",
        ),
    ],
)
def test_a_run_is_not_continued_as_another(
    more: list[str],
    says: str,
    stopped_run: Path,
    recipe: Path,
    tiny_data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = untouched(stopped_run)
    assert (
        main(
            [
                "--recipe",
                str(recipe),
                "--data-dir",
                str(tiny_data),
                "--run-dir",
                str(stopped_run),
                *more,
            ]
        )
        == 2
    )
    assert_one_line(capsys.readouterr().err, says)
    assert untouched(stopped_run) == before


@pytest.mark.parametrize("lost", ["recipe.yaml", "deepspeed.json", "metrics.jsonl"])
def test_a_run_is_not_continued_as_another_whatever_else_is_lost(
    lost: str,
    stopped_run: Path,
    recipe: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = shutil.copytree(stopped_run, tmp_path / "run")
    (run_dir / lost).unlink()
    flags = ["--recipe", str(recipe), "--data-dir", str(tiny_data), "--run-dir", str(run_dir)]
    assert main([*flags, "--seed=2"]) == 2
    assert_one_line(capsys.readouterr().err, "this run was started with seed=1, got 2")


def test_another_run_s_checkpoint_is_not_loaded_even_behind_a_damaged_one(
    stopped_run: Path, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir, other = shutil.copytree(stopped_run, tmp_path / "run"), tmp_path / "other"
    train_on(1, recipe, tiny_data, other, "--seed=2", "--stop-at-step", "5")
    for file in (run_dir / "checkpoints").rglob("*.safetensors"):
        file.write_bytes(b"")
    shutil.copytree(
        other / "checkpoints" / "step-00000005", run_dir / "checkpoints" / "step-00000005"
    )
    ended = run_ranks(1, recipe, tiny_data, run_dir)
    assert ended.exit_codes == [2]
    assert "step-00000005: this run was started with seed=2, got 1" in ended.output


def assert_one_line(output: str, says: str) -> None:
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    assert output.endswith("\n")
    assert says in output


def test_a_run_is_not_continued_on_other_data(
    stopped_run: Path,
    recipe: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written = write_source(
        tmp_path, "train", "up", counting_documents(100, TINY_VOCAB_SIZE, seed=9), 0
    )
    held_out = write_source(
        tmp_path, "validation", "up", counting_documents(10, TINY_VOCAB_SIZE, seed=8), 0
    )
    other = write_dataset(tmp_path, [written, held_out], {"up": 1.0}, TINY_VOCAB_SIZE)
    assert (
        main(["--recipe", str(recipe), "--data-dir", str(other), "--run-dir", str(stopped_run)])
        == 2
    )
    fingerprints = [ShardReader(data).manifest.fingerprint for data in (tiny_data, other)]
    says = f"started with fingerprint='{fingerprints[0]}', got '{fingerprints[1]}'"
    assert_one_line(capsys.readouterr().err, says)


def test_a_copy_of_the_data_set_is_the_same_data_set(
    stopped_run: Path, one_rank: Path, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_data, tmp_path / "copy")
    shutil.copytree(stopped_run, tmp_path / "run")
    train_on(1, recipe, tmp_path / "copy", tmp_path / "run")
    assert losses(tmp_path / "run") == losses(one_rank)


def without_manifest(data: Path) -> None:
    (data / "manifest.json").unlink()


def with_a_truncated_shard(data: Path) -> None:
    shard = data / "shards" / "train" / "more" / "00000.npy"
    shard.write_bytes(shard.read_bytes()[:-2])


def with_a_missing_shard(data: Path) -> None:
    (data / "shards" / "validation" / "up" / "00000.npy").unlink()


@pytest.mark.parametrize(
    ("damage", "more", "says"),
    [
        (without_manifest, [], "no manifest.json, so the data set is not complete; run python -m"),
        (with_a_truncated_shard, [], "more/00000.npy: "),
        (with_a_missing_shard, [], "validation/up/00000.npy: missing, but the manifest lists it"),
        (shutil.rmtree, [], "no such directory; build a data set with"),
        (
            None,
            ["--batch.global_batch_tokens=32000"],
            "training tokens are fewer than one batch of batch.global_batch",
        ),
        (
            None,
            ["--model.vocab_size=256"],
            "its tokenizer has 512 ids, model.vocab_size is 256; set --model.vocab",
        ),
        (
            None,
            ["--model.seq_len=9600", "--batch.global_batch_tokens=9600"],
            "fewer than one window of 9,601",
        ),
        (
            None,
            ["--model.d_model=1600000", "--model.num_heads=16"],
            "GB too much; what fits: nothing; take more ranks",
        ),
        (
            None,
            ["--model.code_bits=10"],
            "model.code_bits 10 does not divide model.d_model 48; set model.code_bits to",
        ),
    ],
)
def test_unusable_input_is_refused_before_anything_is_written(
    damage: Callable[[Path], None] | None,
    more: list[str],
    says: str,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = counting_dataset(tmp_path / "data")
    if damage is not None:
        damage(data)
    assert (
        main(
            [
                "--recipe",
                str(recipe),
                "--data-dir",
                str(data),
                "--run-dir",
                str(tmp_path / "run"),
                *more,
            ]
        )
        == 2
    )
    assert_one_line(capsys.readouterr().err, says)
    assert not (tmp_path / "run").exists()


def test_two_launched_ranks_refuse_with_one_line_and_exit_code_2(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    command = launch_training(2, recipe, tiny_data, tmp_path / "run", "--batch.micro_batch_size=2")
    result = run_command(*command)
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = error_lines(result.stderr)
    assert (
        "a step of 6 windows does not divide over 2 ranks x micro-batch 2; nearest that do: "
        in line
    )
    assert "Traceback" not in result.stdout + result.stderr
    assert not (tmp_path / "run").exists()


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    for flag in (
        "--recipe",
        "--data-dir",
        "--run-dir",
        "--deepspeed-config",
        "--stop-at-step",
        "--dotted.key=value",
    ):
        assert flag in output

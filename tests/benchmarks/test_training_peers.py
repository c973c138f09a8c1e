"""The benchmark beside peers: our part of it, and what it says of peers that are not there."""

import re
import subprocess
import sys
from pathlib import Path

from support.runs import REPOSITORY

BENCHMARK = REPOSITORY / "tests" / "benchmarks" / "training_peers.py"


def run_benchmark(*flags: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(BENCHMARK), *flags], capture_output=True, text=True, check=False
    )


def test_the_benchmark_beside_peers_runs_the_training_command_itself() -> None:
    result = run_benchmark("--quick", "--threads=1")
    assert result.returncode == 0, result.stderr
    row = re.search(
        r"\| ours \| ([\d,]+) \| 1\.00 \| ([\d,]+) \| 1\.00 \| ([\d.]+) \| ([\d.]+) → ",
        result.stdout,
    )
    assert row, result.stdout
    tokens_per_s, peak_mb, first_step_s, first_loss = (
        float(figure.replace(",", "")) for figure in row.groups()
    )
    assert tokens_per_s > 0
    assert 300 < peak_mb < 4_000  # torch and DeepSpeed are loaded; the benchmark itself holds 240
    assert first_step_s > 1  # it counts from the start of the command, imports and all
    assert 6.0 < first_loss < 6.5  # ln 512 is 6.24


def test_peers_that_are_nowhere_are_one_clear_line(tmp_path: Path) -> None:
    result = run_benchmark("--peers", str(tmp_path / "none"))
    assert result.returncode == 2
    assert (
        result.stderr
        == f"error: --peers {tmp_path / 'none'}: no such directory; --help says how to fill it\n"
    )

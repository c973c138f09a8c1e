"""Building a data set under the real Slurm: as many ranks as fit, queued again when warned."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.prep_helpers import (
    BUILD_WITH_UNITS_OF,
    build_command,
    contents,
    run,
    source,
    speeches,
    stamps,
    write_jsonl,
    write_mixture,
)
from support.runs import REPOSITORY
from support.slurm import Slurm, slurm
from support.waiting import wait_until

pytest_plugins = ("support.prep_fixtures",)

UNIT_BYTES = 10_000
SCRIPT = str(REPOSITORY / "launch" / "build_shards.slurm")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm") / "run") as started:
        yield started


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """Real text, in some three hundred units."""
    base = tmp_path_factory.mktemp("mixture")
    write_jsonl(base / "a.jsonl", speeches(200, characters=15_000))
    return write_mixture(base, tokenizer_dir, [source("a", "a.jsonl", format="jsonl")])


@pytest.fixture(scope="module")
def small_units(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A PATH whose python cuts small units: those of real builds take minutes."""
    base = tmp_path_factory.mktemp("bin")
    (base / "program.py").write_text(BUILD_WITH_UNITS_OF)
    python = base / "python"
    words = f"{sys.executable} {base / 'program.py'} {UNIT_BYTES}"
    python.write_text(f'#!/bin/sh\nshift 2 # -m data_prep.build_shards\nexec {words} "$@"\n')
    python.chmod(0o755)
    return {"PYTHON_OF_TEST": str(base)}


def submit(
    cluster: Slurm, small_units: dict[str, str], mixture: Path, output_dir: Path, *flags: str
) -> tuple[str, Path]:
    """The number of a job that builds, and its log."""
    log = output_dir.with_suffix(".log")
    path = f"{small_units['PYTHON_OF_TEST']}:{cluster.environment['PATH']}"
    what = ("--mixture", str(mixture), "--output-dir", str(output_dir))
    words = ("--output", str(log), *flags, SCRIPT, *what)
    return cluster.sbatch(*words, PATH=path), log


def test_a_build_that_is_warned_is_queued_again_and_goes_on_from_the_finished_units(
    cluster: Slurm, small_units: dict[str, str], mixture: Path, tmp_path: Path
) -> None:
    output_dir = tmp_path / "dataset"
    job, log = submit(cluster, small_units, mixture, output_dir, "--nodes=2")
    wait_until(lambda: units(output_dir) > 5, "some units")
    assert "--ntasks=4 --cpus-per-task=2" in log.read_text()  # of two nodes of 4 CPUs
    cluster.scancel("--batch", "--signal=USR1", job)  # as --signal=B:USR1@60 has it
    cluster.wait_for(job, "PENDING", log=log)
    first = stamps(output_dir)
    assert "queued again" in log.read_text()
    assert not (output_dir / "manifest.json").exists()
    assert cluster.job(job)["Restarts"] == "1"

    # Slurm itself starts it again after two minutes, when nothing is left of the first start.
    wait_until(cluster.is_up, "the nodes to be idle")
    cluster.begin_now(job)
    cluster.wait_for(job, "COMPLETED", "FAILED", log=log)
    assert cluster.state(job) == "COMPLETED", log.read_text()
    reference = tmp_path / "reference"
    result = run(build_command(mixture, reference, unit_bytes=UNIT_BYTES))
    assert result.returncode == 0, result.stderr
    assert contents(output_dir) == contents(reference)
    finished = [name for name in first if name.startswith("units/") and name.endswith(".json")]
    assert len(finished) > 5
    assert {name: stamps(output_dir)[name] for name in finished} == {
        name: first[name] for name in finished
    }


def test_the_number_of_tasks_may_be_asked_for(
    cluster: Slurm, small_units: dict[str, str], mixture: Path, tmp_path: Path
) -> None:
    words = ("--nodes=2", "--ntasks-per-node=1")
    job, log = submit(cluster, small_units, mixture / "absent", tmp_path / "dataset", *words)
    cluster.wait_for(job, "COMPLETED", "FAILED", log=log)
    assert "--ntasks=2 --cpus-per-task=4" in log.read_text()
    assert cluster.job(job)["ExitCode"] == "2:0"  # bad input, which is said once
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert "absent" in line


def test_an_mpi_that_srun_does_not_know_is_named_with_what_to_do(
    cluster: Slurm, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    job = cluster.sbatch("--output", str(log), SCRIPT, "--mixture", "m.yaml", MPI_TYPE="pmi9")
    cluster.wait_for(job, "COMPLETED", "FAILED", log=log)
    assert cluster.job(job)["ExitCode"] == "2:0"
    (line,) = log.read_text().splitlines()
    assert line.startswith("error: srun knows no --mpi=pmi9 (srun --mpi=list); set MPI_TYPE")


def units(output_dir: Path) -> int:
    """Number of finished units."""
    return len(list((output_dir / "units").glob("*/*.json")))

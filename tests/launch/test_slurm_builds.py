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
    wait_until(lambda: units(output_dir) > 5, "some units", log=log if log.exists() else None)
    steps = cluster.command("squeue", "--steps", "--noheader", "--format=%i %N %A", "--jobs", job)
    assert cluster.job(job)["NumNodes"] == "2", steps.stdout
    cluster.scancel("--batch", "--signal=USR1", job)  # as --signal=B:USR1@60 has it
    cluster.wait_for(job, "PENDING", log=log)
    first = stamps(output_dir)
    assert "queued again" in log.read_text()
    assert not (output_dir / "manifest.json").exists()
    assert cluster.job(job)["Restarts"] == "1"

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


def units(output_dir: Path) -> int:
    """Number of finished units."""
    return len(list((output_dir / "units").glob("*/*.json")))

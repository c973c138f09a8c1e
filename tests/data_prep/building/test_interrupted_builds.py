"""A build that is killed, or finds the disk full, goes on where it was and ends with the same bits
on any ranks.

Real processes and real kills; so many of them with

    TABLEFREE_KILLS=20 pytest tests/data_prep/building/test_interrupted_builds.py
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.prep_helpers import (
    NASTY_TEXTS,
    build_command,
    contents,
    error_line,
    needs_mpi,
    run,
    source,
    speeches,
    stamps,
    write_jsonl,
    write_mixture,
    write_parquet,
)
from support.runs import REPOSITORY

from data_prep.files import digest_file
from data_prep.locks import LOCK_NAME
from data_prep.manifest import load_manifest

pytest_plugins = ("support.prep_fixtures",)

KILLS = int(os.environ.get("TABLEFREE_KILLS", "4"))
UNIT_BYTES = 20_000
CORES = len(os.sched_getaffinity(0))
PATIENCE_S = 60


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """Four formats, and about a hundred units of UNIT_BYTES."""
    base = tmp_path_factory.mktemp("mixture")
    texts = [*NASTY_TEXTS, *speeches(200, characters=10_000)]
    write_parquet(base / "a.parquet", texts[:120], group_rows=3)
    write_jsonl(base / "b.jsonl", texts[100:160])
    write_jsonl(base / "c" / "0.jsonl.gz", texts[160:170])
    write_jsonl(base / "c" / "1.jsonl.gz", texts[170:180])
    (base / "d").mkdir()
    for i, text in enumerate(texts[180:]):
        (base / "d" / f"{i:02d}.txt").write_text(text, encoding="utf-8", newline="")
    sources = [
        source("a", "a.parquet", weight=3),
        source("b", "b.jsonl", format="jsonl"),
        source("c", "c/*.jsonl.gz", format="jsonl.gz"),
        source("d", "d/*.txt", format="txt"),
    ]
    return write_mixture(base, tokenizer_dir, sources, validation_fraction=0.1)


@pytest.fixture(scope="module")
def reference(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set that every other build must equal; read only."""
    output_dir = tmp_path_factory.mktemp("reference") / "dataset"
    assert_builds(mixture, output_dir)
    assert len(load_manifest(output_dir).shards) > 100
    return output_dir


def assert_builds(mixture: Path, output_dir: Path, ranks: int = 1) -> None:
    result = run(build_command(mixture, output_dir, ranks=ranks, unit_bytes=UNIT_BYTES))
    assert result.returncode == 0, result.stderr


def finished_files(output_dir: Path) -> dict[str, tuple[int, int]]:
    """Stamps of the records, and of the shards and indexes they speak of, each with the digest
    in its record.
    """
    now, finished = stamps(output_dir), {}
    for record in (name for name in now if name.startswith("units/") and name.endswith(".json")):
        finished[record] = now[record]
        for shard in json.loads((output_dir / record).read_bytes())["shards"]:
            stem = record.replace("units/", f"shards/{shard['split']}/").removesuffix(".json")
            for name, digest in (
                (f"{stem}.npy", "xxh3_128"),
                (f"{stem}.documents.npy", "index_xxh3_128"),
            ):
                assert digest_file(output_dir / name) == shard[digest]
                finished[name] = now[name]
    return finished


def records(output_dir: Path) -> int:
    """Number of finished units."""
    return len(list((output_dir / "units").glob("*/*.json")))


def units_begun(output_dir: Path) -> set[str]:
    """Names of the units that have left anything at all."""
    names = (
        name.split("/") for name in stamps(output_dir) if name.startswith(("units/", "shards/"))
    )
    return {f"{parts[-2]}/{parts[-1].split('.')[0]}" for parts in names}


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_same_bits_from_any_number_of_ranks(
    tmp_path: Path, mixture: Path, reference: Path, ranks: int
) -> None:
    assert_builds(mixture, tmp_path / "out", ranks)
    assert contents(tmp_path / "out") == contents(reference)
    about = json.loads((tmp_path / "out" / "build.json").read_bytes())
    assert (about["ranks"], about["threads_per_rank"]) == (ranks, max(1, CORES // ranks))
    assert json.loads((reference / "build.json").read_bytes())["threads_per_rank"] == CORES


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children += (
                [int(path.parent.name)]
                if int(path.read_text().rpartition(")")[2].split()[1]) == pid
                else []
            )
    return [pid, *(one for child in children for one in family(child))]


def rank_processes(pid: int) -> list[int]:
    """Those of a launcher's family that build; the references beside them, which come and go, do
    not.
    """
    found = []
    for one in family(pid):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{one}/cmdline").read_bytes().split(b"\0")
            if b"python" in command[0] and b"data_prep.tokenizer.reference" not in command:
                found.append(one)
    return found


def wait_for(happened: Callable[[], bool], what: str) -> None:
    started = time.perf_counter()
    while not happened():
        assert time.perf_counter() - started < PATIENCE_S, f"waited for {what}"
        time.sleep(0.002)


def is_alive(pid: int) -> bool:
    """Whether a process is there, and not only its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def kill_at(
    mixture: Path, output_dir: Path, ranks: int, moment: tuple[int, float], *, one_rank: bool
) -> None:
    """Begin a build; kill it, or one rank of it, so many seconds after so many units are
    finished.
    """
    command = build_command(mixture, output_dir, ranks=ranks, unit_bytes=UNIT_BYTES)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    units, delay_s = moment
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:

        def is_time() -> bool:
            is_there = records(output_dir) >= units and len(rank_processes(process.pid)) == ranks
            return is_there or process.poll() is not None

        wait_for(is_time, f"{units} units")
        time.sleep(delay_s)
        everyone = family(process.pid)
        for pid in rank_processes(process.pid)[:1] if one_rank else everyone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(PATIENCE_S)
        wait_for(lambda: not any(map(is_alive, everyone)), "the end of all ranks")


@needs_mpi
@pytest.mark.timeout(600 + 20 * KILLS)
def test_killed_at_any_moment(tmp_path: Path, mixture: Path, reference: Path) -> None:
    """Each life of the build has its own number of ranks; what is finished is never written
    again.
    """
    output_dir, chance, units = tmp_path / "out", random.Random(), records(reference)
    finished: dict[str, tuple[int, int]] = {}
    killed_at_work, lost_before = 0, set[str]()
    for number in range(KILLS):
        ranks = (1, 3, 2, 2)[number % 4]
        was_full = records(output_dir) == units
        moment = (
            min(records(output_dir) + chance.randrange(units // 3), units),
            0.02 * chance.random(),
        )
        if ranks == 1 or was_full:
            moment = (0, 2 * chance.random())
        kill_at(mixture, output_dir, ranks, moment, one_rank=number % 4 == 2)
        print(
            f"{ranks} ranks killed with {records(output_dir)} of {units} units finished, {moment}"
        )
        after = finished_files(output_dir) if output_dir.exists() else {}
        assert after.items() >= finished.items()
        lost = units_begun(output_dir) - {name[len("units/") : -len(".json")] for name in after}
        # a core encodes one and writes one; what an earlier life left may not have been begun again
        assert len(lost - lost_before) <= 2 * ranks * max(1, CORES // ranks)
        lost_before = lost
        killed_at_work += 0 < records(output_dir) < units
        finished = after
        is_complete = (output_dir / "manifest.json").exists()  # it was faster
        # a kill between the manifest and the end leaves the lock's file, which nobody holds
        if is_complete:
            assert {
                name: c for name, c in contents(output_dir).items() if name != LOCK_NAME
            } == contents(reference)
        if is_complete or was_full:
            shutil.rmtree(output_dir)
            finished = {}
    assert killed_at_work
    assert_builds(mixture, output_dir, ranks=2)
    assert finished_files(output_dir).items() >= finished.items()
    assert contents(output_dir) == contents(reference)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk can't be mounted: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def resize(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


@needs_mpi
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk(disk: Path, mixture: Path, reference: Path, ranks: int) -> None:
    resize(disk, "size=800k")
    command = build_command(mixture, disk / "out", ranks=ranks, unit_bytes=UNIT_BYTES)
    line = error_line(run(command))
    assert f"{disk / 'out'}: can't write unit" in line
    assert (
        "(No space left on device); make space or choose another --output-dir, and build again"
        in line
    )
    assert not (disk / "out" / "manifest.json").exists()
    # small
    assert {path.name.split(".", 1)[1] for path in disk.rglob("*.tmp")} <= {
        "documents.npy.tmp",
        "json.tmp",
    }
    finished = finished_files(disk / "out")
    assert 10 < records(disk / "out") < records(reference)
    resize(disk, "size=64m")
    assert run(command).returncode == 0
    assert finished_files(disk / "out").items() >= finished.items()
    assert contents(disk / "out") == contents(reference)


@needs_mpi
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_is_full_at_the_very_end(
    disk: Path, mixture: Path, reference: Path, ranks: int
) -> None:
    shutil.copytree(reference, disk / "out")
    (disk / "out" / "manifest.json").unlink()
    resize(disk, f"size={sum(path.stat().st_blocks for path in disk.rglob('*')) // 2 + 40}k")
    (disk / "filler").write_bytes(bytes(1 << 12))
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while file.write(bytes(1 << 12)):
            pass
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - (32 << 10))
    command = build_command(mixture, disk / "out", ranks=ranks, unit_bytes=UNIT_BYTES)
    assert f"{disk / 'out'}: can't write the manifest (No space left on device)" in error_line(
        run(command)
    )
    (disk / "filler").unlink()
    resize(disk, "size=64m")
    assert run(command).returncode == 0
    assert contents(disk / "out") == contents(reference)


def test_a_disk_that_cannot_be_written_to(disk: Path, mixture: Path) -> None:
    resize(disk, "ro")
    line = error_line(run(build_command(mixture, disk / "out")))
    assert (
        f"{disk / 'out'}: can't write the tokenizer (Read-only file system); make space or choose "
        "another" in line
    )

"""Two real MPI ranks share the machine's cores, one bar, and the news of an error."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.prep_helpers import error_line, mpi, needs_mpi, run

pytestmark = needs_mpi

CONNECT = """
import os, sys
from data_prep.building import ranks
rank = int(os.environ["PMI_RANK"])
os.sched_getaffinity = lambda pid: {cores}
world, threads = ranks.connect()
print(f"rank {{world.rank}} of {{world.size}}: {{threads}} threads")
"""


@pytest.mark.parametrize(
    ("cores", "threads"),
    [
        ("set(range(8))", (4, 4)),
        ("set(range(4 * rank, 4 * rank + 4))", (4, 4)),  # each bound to its own
        ("{rank}", (1, 1)),
        ("{0}", (1, 1)),
        ("set(range(8)) if rank else {0, 1}", (2, 4)),
    ],
)
def test_ranks_share_the_cores_of_their_machine(
    tmp_path: Path, cores: str, threads: tuple[int, int]
) -> None:
    result = run_ranks(tmp_path, CONNECT.format(cores=cores))
    found = re.findall(r"rank (\d) of 2: (\d) threads", result.stdout)
    assert sorted((int(rank), int(number)) for rank, number in found) == [*enumerate(threads)]


def run_ranks(base: Path, program: str) -> subprocess.CompletedProcess[str]:
    (base / "program.py").write_text(program)
    return run([*mpi(2), sys.executable, str(base / "program.py")])


def test_one_bar_for_all(tmp_path: Path) -> None:
    program = """
import time
from data_prep.building.ranks import Progress, connect
world, _ = connect()
progress = Progress(world, 100_000_000)
progress.bar.mininterval = progress.bar.delay = 0
for _ in range(10):
    assert progress.report("working", 4_000_000 + 2_000_000 * world.rank) == {"working"}
    time.sleep(0.02)
assert progress.report("done") == {"done"}
progress.bar.close()
if world.rank == 0:
    print(progress.bar.n)
"""
    result = run_ranks(tmp_path, program)
    assert result.stdout == "100000000\n"
    assert "building: 100%|" in result.stderr
    assert "MB/s" in result.stderr


def test_an_error_reaches_ranks_at_work(tmp_path: Path) -> None:
    program = """
import sys
from data_prep.commands import exit_code
from data_prep.errors import UserError
from data_prep.building.ranks import Progress, connect, together
world, _ = connect()
progress = Progress(world, 100)

def work():
    for _ in range(5):
        assert progress.report("working") == {"working"}
    states = progress.report("working" if world.rank == 0 else "failed")
    assert states == {"working", "failed"}
    if world.rank == 1:
        raise UserError("first\\nerror")

sys.exit(exit_code(lambda: together(world, work)))
"""
    assert error_line(run_ranks(tmp_path, program)).endswith("error: first error")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_defect_of_one_rank_ends_all(tmp_path: Path, rank: int) -> None:
    program = f"""
import time
from data_prep.building.ranks import connect
world, _ = connect()
if world.rank == {rank}:
    raise KeyError("defect")
time.sleep(60)
"""
    result = run_ranks(tmp_path, program)
    assert result.returncode not in (0, 2)
    assert "KeyError: 'defect'" in result.stderr


def test_a_refused_file_is_one_line_too(tmp_path: Path) -> None:
    program = """
import sys
from data_prep.commands import exit_code
from data_prep.building.ranks import connect, together
world, _ = connect()
sys.exit(exit_code(lambda: together(world, lambda: world.rank and open("/nowhere/at/all"))))
"""
    line = error_line(run_ranks(tmp_path, program))
    assert line == "error: /nowhere/at/all: No such file or directory; check the path"


def test_a_launcher_without_mpi4py_is_told_what_to_install(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["mpi4py"] = None  # which is how Python marks a module as not to be had
from data_prep.building.ranks import connect
from data_prep.commands import exit_code
sys.exit(exit_code(connect))
"""
    result = run_ranks(tmp_path, program)
    assert result.returncode == 2
    assert "mpi4py can't be used" in result.stderr
    assert "pip install mpi4py mpich brings an MPI that works" in result.stderr

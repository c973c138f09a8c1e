"""Two real MPI ranks share the machine's cores, one bar, and the news of an error."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.environments import prepare_environment, skip_without_registry
from support.prep_helpers import error_line, mpi, needs_mpi, run

from data_prep.commands import refuse_other_mpi
from data_prep.errors import UserError

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


BUILD_MEETS = """
import sys
from data_prep.building.ranks import connect
from data_prep.commands import exit_code

def meet():
    print(f"ranks: {connect()[0].size}")

sys.exit(exit_code(meet))
"""
TRAIN_MEETS = """
import sys
from data_prep.errors import UserError
from pretrain.distributed.agree import exit_with
from pretrain.distributed.rendezvous import set_rendezvous
from pretrain.distributed.world import world_from_environment
world = world_from_environment()
try:
    set_rendezvous(world)
    print(f"ranks: {world.world_size}")
except UserError as error:
    sys.exit(exit_with(error, world))
"""


@pytest.fixture(scope="module")
def open_mpi() -> Path:
    """An environment that holds Open MPI: its mpiexec, and its library."""
    with skip_without_registry():
        return prepare_environment(["openmpi"], shared=("numpy",)).parent.parent


@pytest.mark.parametrize("program", [BUILD_MEETS, TRAIN_MEETS], ids=["build", "train"])
def test_the_mpiexec_of_another_mpi_is_refused_in_one_line_before_mpi_begins(
    program: str, open_mpi: Path, tmp_path: Path
) -> None:
    path = tmp_path / "program.py"
    path.write_text(program)
    mpiexec = [str(open_mpi / "bin" / "mpiexec"), "--allow-run-as-root", "--oversubscribe"]
    command = [*mpiexec, "-n", "2", sys.executable, str(path)]
    line = error_line(run(command))
    assert line == (
        "error: started by Open MPI's mpiexec, but mpi4py loads the library of another MPI, MPICH; "
        "start with MPICH's mpiexec, or set MPI4PY_LIBMPI to the path of Open MPI's libmpi"
    )
    # The remedy that it names is one.
    library = str(open_mpi / "lib" / "libmpi.so.40")
    result = run(command, MPI4PY_LIBMPI=library)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("ranks: 2") == 2

    result = run([*mpi(2), sys.executable, str(path)], MPI4PY_LIBMPI=library)
    assert result.returncode == 2
    assert "error: started by MPICH's mpiexec" in result.stderr
    assert "mpi4py loads the library of another MPI, Open MPI; start with Open" in result.stderr


def test_intel_s_library_belongs_to_mpich_s_launcher_and_an_unknown_one_to_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MPI_LOCALNRANKS", "2")
    refuse_other_mpi("Intel(R) MPI Library 2021.13 for Linux* OS")
    refuse_other_mpi("Somebody's MPI 1.0")
    with pytest.raises(UserError, match=r"started by MPICH's mpiexec, .* another MPI, Open MPI"):
        refuse_other_mpi("Open MPI v5.0.11")
    monkeypatch.delenv("MPI_LOCALNRANKS")
    refuse_other_mpi("Open MPI v4.1.6")  # as srun --mpi=pmi2 starts it

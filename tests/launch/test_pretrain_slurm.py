"""A supervised run in jobs of a real Slurm: warned, preempted, ended, begun anew, nodes lost."""

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from support.forked_ranks import train_on
from support.processes import processes_of
from support.runs import REPOSITORY, environment, losses, steps_of, write_recipe
from support.slurm import Slurm, slurm
from support.waiting import wait_until

from data_prep.locks import lock

SCRIPT = "launch/pretrain.slurm"
# Every Python imports it: ranks take their time for a step as long as a file is there.
SLOWLY = """
import os
import time
from pathlib import Path

if "MASTER_PORT" in os.environ and "SLURM_STEP_ID" in os.environ:
    from pretrain.data.batches import Prefetch

    def take_slowly(self, step, take=Prefetch.take):
        if Path(__file__).with_name("slow").exists():
            time.sleep(0.3)
        return take(self, step)

    Prefetch.take = take_slowly
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@dataclass(frozen=True)
class InJobs:
    """A run of slow steps, and what its jobs say."""

    cluster: Slurm
    home: Path
    flags: list[str]

    @property
    def run_dir(self) -> Path:
        return self.home / "run"

    @property
    def log(self) -> Path:
        return self.home / "log"

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def state(self) -> dict[str, object]:
        state: dict[str, object] = json.loads((self.run_dir / "state.json").read_text())
        return state

    @property
    def variables(self) -> dict[str, str]:
        return {"PYTHONPATH": f"{self.home / 'slowly'}:{REPOSITORY}", "BACK_OFF_S": "0.2"}

    def sbatch(self, *of_slurm: str, more: tuple[str, ...] = ()) -> str:
        """Submit a job of it: its number."""
        words = (f"--output={self.log}", *of_slurm, SCRIPT, *self.flags, *more)
        return self.cluster.sbatch(*words, **self.variables)

    def wait_for_steps(self, more: int = 3) -> None:
        """Until the run has got on, past what is saved."""
        steps = steps_of(self.run_dir) + more
        wait_until(lambda: steps_of(self.run_dir) >= steps, f"{steps} steps", 120)

    def begin_again(self, number: str, *changes: str) -> None:
        """Have a job that was queued again begin without its two minutes of waiting."""
        if changes:
            self.cluster.scontrol("update", f"JobId={number}", *changes)

        self.cluster.begin_now(number)
        self.cluster.wait_for(number, "RUNNING", timeout_s=60)

    def quicken(self) -> None:
        (self.home / "slowly" / "slow").unlink()


@pytest.fixture
def run(cluster: Slurm, tiny_data: Path, tmp_path: Path) -> Iterator[InJobs]:
    """A run of 160 steps, saved every 5."""
    recipe = write_recipe(tmp_path / "tiny.yaml", train_tokens=160 * 6 * 32)
    (tmp_path / "slowly").mkdir()
    (tmp_path / "slowly" / "sitecustomize.py").write_text(SLOWLY)
    (tmp_path / "slowly" / "slow").touch()
    flags = ["--recipe", str(recipe), "--data-dir", str(tiny_data)]
    yield InJobs(cluster, tmp_path, [*flags, "--run-dir", str(tmp_path / "run")])
    if cluster.daemon_of("n1") is None:
        cluster.start_daemon("n1")
    cluster.command("scancel", "--user=root")
    wait_until(cluster.is_up, "both nodes to be idle", 60, every_s=0.2)


def test_a_job_whose_time_is_up_saves_and_is_queued_again_until_the_run_is_done_bitwise_equal(
    run: InJobs,
) -> None:
    cluster = run.cluster
    number = run.sbatch("--nodes=2", "--time=1", "--signal=B:USR1@10")
    cluster.wait_for(number, "RUNNING")
    cluster.wait_for(number, "PENDING", "FAILED", "COMPLETED", "TIMEOUT", log=run.log)
    assert cluster.state(number) == "PENDING", run.said
    assert f"{run.run_dir}: saved; Slurm queues the job again\n" in run.said
    assert (run.state["status"], run.state["saved_step"]) == ("preempted", steps_of(run.run_dir))
    assert "SIGUSR1" in str(run.state["reason"])
    # Somebody has it queued again while it trains.
    run.begin_again(number, "TimeLimit=30")
    run.wait_for_steps()
    cluster.scontrol("requeue", number)
    cluster.wait_for(number, "PENDING")
    assert run.state["saved_step"] == steps_of(run.run_dir)
    run.quicken()
    run.begin_again(number)
    cluster.wait_for(number, "COMPLETED", "FAILED", log=run.log)
    job = cluster.job(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "2")
    assert run.state["status"] == "done"
    recipe = Path(run.flags[1])
    train_on(2, recipe, Path(run.flags[3]), run.home / "unbroken")
    assert losses(run.run_dir) == losses(run.home / "unbroken")


def test_a_run_goes_on_when_its_nodes_are_lost_and_ends_well_when_it_is_cancelled(
    run: InJobs,
) -> None:
    cluster = run.cluster
    number = run.sbatch("--nodes=2", "--no-kill", more=("--max-restarts=1",))
    run.wait_for_steps(7)
    cluster.set_node_down("n2")
    wait_until(lambda: "restart 1 continues from step-0" in run.said, "a restart", log=run.log)
    run.wait_for_steps()
    assert cluster.job(number)["NodeList"] == "n1"
    assert "--nodes=1 --ntasks=2 --nodelist=n1,n1 " in run.said
    # The node of the supervisor is lost to Slurm, with all that runs there.
    cluster.kill_daemon("n1")
    cluster.wait_for(number, "PENDING")
    wait_until(lambda: not processes_of(run.run_dir), "what ran on the lost node to end", 20)
    assert f"Slurm has taken job {number} from this node" in run.said
    run.begin_again(number, "NumNodes=1")
    run.wait_for_steps()
    assert "--nodes=1 --ntasks=2 --nodelist=n2,n2 " in run.said
    cluster.scancel(number)
    cluster.wait_for(number, "CANCELLED")
    assert not processes_of(run.run_dir)
    assert (run.state["status"], run.state["saved_step"]) == ("preempted", steps_of(run.run_dir))
    assert "SIGTERM" in str(run.state["reason"])


def test_a_preempted_job_saves_and_is_queued_again_and_ends_when_its_batch_script_is_told_to(
    run: InJobs,
) -> None:
    cluster = run.cluster
    number = run.sbatch("--nodes=2")
    run.wait_for_steps()
    log = f"--output={run.home / 'urgent'}"
    cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", log, "--wrap=true")
    cluster.wait_for(number, "PENDING", log=run.log)
    assert f"{run.run_dir}: saved; Slurm queues the job again\n" in run.said
    assert run.state["saved_step"] == steps_of(run.run_dir)
    assert cluster.job(number)["Restarts"] == "1"
    run.begin_again(number)
    run.wait_for_steps()
    cluster.scancel("--batch", "--signal=TERM", number)
    cluster.wait_for(number, "COMPLETED", "FAILED", "PENDING", log=run.log)
    assert cluster.job(number)["ExitCode"] == "0:0"
    assert run.state["saved_step"] == steps_of(run.run_dir) < 160


def test_what_can_not_be_trained_is_a_failed_job_and_not_queued_again(run: InJobs) -> None:
    cluster = run.cluster

    def ended(*more: str) -> tuple[str, str]:
        number = run.sbatch("--nodes=2", "--open-mode=truncate", more=more)
        cluster.wait_for(number, "FAILED", "PENDING", "COMPLETED", log=run.log)
        cluster.wait_for(number, "FAILED", log=run.log)
        return cluster.job(number)["ExitCode"], run.said

    code, said = ended("--model.depth=3")
    assert (code, said.count("\n")) == ("2:0", 1)
    assert "error: " in said
    assert not run.run_dir.exists()
    # What rank 0 alone can tell: srun's exit code is the highest of all ranks'.
    with lock(run.run_dir, "", ""):
        code, said = ended()
    assert code == "2:0"
    assert "another process is training there" in said
    number = run.sbatch("--nodes=2", "--open-mode=truncate")
    wait_until(lambda: run.said.startswith("+ srun"), "a start")
    cluster.scancel("--signal=USR1", "--batch", number)  # as --signal=B:USR1 at once
    cluster.wait_for(number, "FAILED", log=run.log)
    assert cluster.job(number)["ExitCode"] == "1:0"
    assert "its time is up and it saved no step in it, so it is not queued again" in run.said


def test_the_script_for_machines_finds_an_allocation_and_its_ranks_end_with_it(run: InJobs) -> None:
    typed = ["launch/pretrain.sh", *run.flags]
    twice = 'echo begun; "$@"; echo "ended $?"; exec "$@"'
    words = ["salloc", "--nodes=2", "bash", "-c", twice, "bash", *typed]
    job = run.cluster.start(*words, log=run.log, **run.variables)
    run.wait_for_steps()
    (supervisor,) = [
        process
        for process in processes_of(run.run_dir, r"supervise\.py")
        if "salloc" not in process.name() and "bash" not in process.name()
    ]
    ranks = processes_of(run.run_dir, "-m pretrain[.]train")
    run.quicken()
    supervisor.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    assert job.wait(120) == 0, run.said
    assert "ended 137\n" in run.said
    assert run.said.count("+ srun ") == 2
    assert run.state["status"] == "done"


def test_the_script_is_found_by_its_name_and_outside_of_slurm_refuses(run: InJobs) -> None:
    result = run.cluster.command("bash", SCRIPT, *run.flags, cwd=REPOSITORY)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: --requeue: this is no job of Slurm; submit it with sbatch, or leave that out\n"
    )
    assert "SLURM_JOB_ID" not in environment()

"""The allocation of Slurm that this process is in: its nodes, what runs on them, its job.

Slurm's own commands are asked, each time anew: variables such as SLURM_JOB_NODELIST tell how the
job began, and a node may be lost (sbatch --no-kill) or the job queued again since.
"""

import os
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass

from data_prep.errors import UserError
from data_prep.slurm.step import tasks_of_nodes
from launch.hosts import COUNT_GPUS, HERE, Answers, Slots, answer_of, run_on
from pretrain.config.recipe import Recipe
from pretrain.run.first_checks import CPU_RANKS

# What runs beside the ranks, on one core of each node.
BESIDE_RANKS = (
    *("srun", "--overlap", "--mpi=none", "--input=none", "--export=ALL", "--immediate=30"),
    "--ntasks-per-node=1",
)
# Of a job whose nodes are its own; SIGNALING in the time that preemption leaves it.
AT_WORK = ("RUNNING", "SIGNALING", "SUSPENDED", "STOPPED")
JOB_FIELD = re.compile(r"(?:^|\s)(JobState|Restarts|PreemptTime|NodeList|Requeue)=(\S*)")


@dataclass(frozen=True, kw_only=True)
class JobState:
    """How a job stands, as Slurm tells at one moment."""

    state: str  # RUNNING, PENDING, COMPLETING, ...; empty where Slurm does not tell
    restarts: int  # how often it was queued again
    is_preempted: bool  # its time runs out, for another job
    nodes: str  # as Slurm writes them: n[1-2]


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The nodes of a job, for whoever runs in it."""

    job: str  # its number
    restarts: int  # how often it had been queued again when this process began
    here: str  # the name of this machine among the nodes; empty where it is none of them
    ranks_of: Slots | None  # that were asked for (--ntasks); None: as many as suit each node

    def state(self) -> JobState:
        """How the job stands now."""
        told: dict[str, str] = {}
        with suppress(UserError):  # a controller that does not answer
            answer = answer_of(["scontrol", "--oneliner", "show", "job", self.job])
            told = dict(JOB_FIELD.findall(answer.stdout))
        restarts = told.get("Restarts", "")
        return JobState(
            state=told.get("JobState", ""),
            restarts=int(restarts) if restarts.isdecimal() else self.restarts,
            is_preempted=told.get("PreemptTime", "None") not in ("None", "Unknown", "N/A"),
            nodes=told.get("NodeList", ""),
        )

    def is_lost(self, now: JobState) -> bool:
        """Whether the job, as far as Slurm tells, is not at work any more, or was begun anew since
        this process was.
        """
        if not now.state:
            return False
        return now.state not in AT_WORK or now.restarts != self.restarts

    def nodes(self) -> list[str]:
        """The nodes that the job has now. Raises UserError where it has none any more."""
        now = self.state()
        if not now.state or self.is_lost(now):
            why = f"it is {now.state.lower()}" if now.state else "scontrol does not tell"
            raise UserError(f"Slurm's job {self.job} has no nodes here: {why}; submit it again")
        return expand(now.nodes)

    def run_on(self, hosts: list[str], *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on nodes of the job, on all at the same time but this one, which comes
        first and needs no srun: Slurm starts nothing more in a job that it is ending.

        Raises UserError where no answer came. Exit code and output are those of all together.
        """
        answers = []
        others = [node for node in hosts if node != self.here]
        if self.here in hosts:
            answers.append(run_on([HERE], *command))
        if others:
            words = [*BESIDE_RANKS, f"--nodes={len(others)}", f"--ntasks={len(others)}"]
            answers.append(answer_of([*words, f"--nodelist={','.join(others)}", *command]))
        return subprocess.CompletedProcess(
            command,
            max(answer.returncode for answer in answers),
            "".join(answer.stdout for answer in answers),
            "".join(answer.stderr for answer in answers),
        )

    def ask(self, nodes: list[str]) -> Answers:
        """Ask each node how many GPUs it has, which it can tell only where it sees this directory
        and this Python. Raises UserError.
        """
        answer = self.run_on(nodes, *COUNT_GPUS, os.getcwd())
        gpus = dict(re.findall(r"^(\S+) (\d+)$", answer.stdout, re.MULTILINE))
        left = {node: int(gpus[node]) for node in nodes if node in gpus}
        missing = [node for node in nodes if node not in gpus]
        said = answer.stderr.strip().splitlines() or ["no answer"]
        # what a node says of itself rather than what srun says of its exit code
        why = [line for line in said if line.partition(":")[0] in missing] or said
        return Answers(left, missing, why[0])

    def slots(self, gpus: Slots, recipe: Recipe) -> Slots:
        """The ranks of each node: those that were asked for, or one for each GPU, or on CPUs 2 a
        node, or 1 where those do not divide a step.
        """
        if self.ranks_of is not None:
            return {node: self.ranks_of[node] for node in gpus if node in self.ranks_of}
        if any(gpus.values()):
            return {node: of_node for node, of_node in gpus.items() if of_node}
        for ranks in range(CPU_RANKS, 1, -1):
            at_once = ranks * len(gpus) * recipe.batch.micro_batch_size
            if recipe.global_batch_size % at_once == 0:
                return dict.fromkeys(gpus, ranks)
        return dict.fromkeys(gpus, 1)

    def requeue(self) -> str:
        """Have Slurm queue the job again; why it would not, or nothing."""
        try:
            answer = answer_of(["scontrol", "requeue", self.job])
        except UserError as error:
            return str(error)
        said = " ".join((answer.stderr or answer.stdout).split())
        return "" if answer.returncode == 0 else said or f"exit code {answer.returncode}"


def find_allocation(*, must_start: bool) -> Allocation | None:
    """The allocation that this process is in, if it is in one.

    Raises UserError for one of several nodes where Slurm's commands are missing, if they must start
    the ranks.
    """
    job = os.environ.get("SLURM_JOB_ID")
    nodelist = os.environ.get("SLURM_JOB_NODELIST")
    if not job or not nodelist:
        return None
    missing = [name for name in ("srun", "scontrol") if shutil.which(name) is None]
    if missing:
        if not must_start or os.environ.get("SLURM_JOB_NUM_NODES", "1") == "1":
            return None  # in a container, say: one machine needs no srun
        raise UserError(
            f"SLURM_JOB_ID={job}: {missing[0]}: not found, which starts ranks on {nodelist}; put "
            "Slurm's commands on PATH, or give --hostfile"
        )
    nodes = expand(nodelist)
    return Allocation(
        job=job,
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        here=own_node(nodes),
        ranks_of=ranks_asked_for(nodes),
    )


def own_node(nodes: list[str]) -> str:
    """This machine's name among the nodes; empty where it is none, as with salloc."""
    here = os.environ.get("SLURMD_NODENAME", "")
    return here if here in nodes else ""


def ranks_asked_for(nodes: list[str]) -> Slots | None:
    """The tasks of each node, where somebody asked for a number of tasks; else None. Raises
    UserError.

    SLURM_TASKS_PER_NODE alone tells nothing: without such a wish it holds the nodes' cores.
    """
    if "SLURM_NTASKS" not in os.environ:
        return None
    tasks = tasks_of_nodes(os.environ.get("SLURM_TASKS_PER_NODE", ""))
    return dict(zip(nodes, tasks, strict=False))


def expand(nodes: str) -> list[str]:
    """The names in a list as Slurm writes it: n[1-2] are n1 and n2. Raises UserError."""
    answer = answer_of(["scontrol", "show", "hostnames", nodes])
    if answer.returncode != 0 or not answer.stdout.split():
        raise UserError(f"scontrol show hostnames {nodes}: {answer.stderr.strip() or 'no names'}")
    return answer.stdout.split()

"""Keeps a training run going: starts it, ends it well when told to, starts it again when it failed.

    launch/pretrain.sh --recipe R --data-dir D --run-dir RUN_DIR [--max-restarts N] [...]

How a start ended is read in RUN_DIR/state.json, which the trainer writes (launch/outcome.py); that
nothing outlives this process is the work of launch/processes.py.
"""

import itertools
import os
import re
import shlex
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

if not __package__:  # run by path: its folder, launch/, comes first where Python looks for modules
    del sys.path[0]
    home = str(Path(__file__).resolve().parent.parent)
    # What is installed is found behind Python's own modules, none of which it may hide.
    if home not in sys.path:
        sys.path.insert(0, home)

from data_prep.commands import exit_code, signal_name, unheard
from data_prep.errors import USER_ERROR_EXIT_CODE, UserError, one_line
from data_prep.locks import lock
from launch.hosts import (
    HERE,
    Found,
    Slots,
    ask_hosts,
    count_gpus,
    read_hostfile,
    trim,
    write_hostfile,
)
from launch.job import Job, parse
from launch.launchers import Command, Start, command_of
from launch.outcome import Standing, describe_failure, newest_checkpoint, standing
from launch.processes import POLL_S, Ranks, Signals, start_guarded
from launch.requeue import SlurmJob
from launch.slurm import Allocation, find_allocation
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.run.first_checks import (
    check_arguments,
    check_recipe_and_engine,
    engine_flags_by_default,
    ranks_by_default,
)

# Who signals every process of a job may come to the launcher first, and to this one last.
SPREAD_S = 0.5
FIRST_BACK_OFF_S = 5.0
LONGEST_BACK_OFF_S = 300.0
# A file server may take so long to notice that the machine with a locked file is gone.
LOCKED_S = 120.0
SIGNALLED = 128  # beside the number of a signal: an exit code, as shells have it


class Ended(NamedTuple):
    """How a start ended."""

    code: int  # the launcher's exit code
    refusal: str = ""  # why none could run


@dataclass
class Supervisor:
    """A job over all its starts."""

    job: Job
    allocation: Allocation | None = None  # of Slurm, whose nodes the ranks take
    signals: Signals = field(default_factory=Signals)
    ports: list[str] = field(default_factory=list)  # that the ranks of each start met at
    gpus: int = 0  # the most that were seen
    failed_step: int | None = None  # of the last start, if that trained
    back_off_s: float = FIRST_BACK_OFF_S
    slurm_job: SlurmJob | None = None  # that this process is in, whatever its ranks take
    slots_at_first: Slots = field(default_factory=dict)  # of the first start on Slurm's nodes

    def run(self) -> NoReturn:
        """Start, and start again; leaves with the exit code. Raises UserError."""
        # A step that does not divide over one rank divides over none.
        self.check(self.job.trainer_flags, self.job.ranks or 1)
        self.end_earlier_start()
        for restart in itertools.count():
            before = standing(self.job.run_dir)
            ended = self.try_to_start(restart, before)
            now = standing(self.job.run_dir)
            self.leave_unless_failed(ended.code, before, now)
            why = ended.refusal or describe_failure(ended.code, before, now, self.job.data_dir)
            self.leave_if_a_step_failed_twice(why, before, now)
            if restart == self.job.max_restarts:
                break
            self.say(
                f"failed: {why}; restart {restart + 1} of {self.job.max_restarts} in "
                f"{self.back_off_s:g} s"
            )
            self.back_off()
        sys.exit(
            f"error: {self.job.run_dir}: {why}; no restarts left of {self.job.max_restarts}; the "
            "same command continues"
        )

    def try_to_start(self, restart: int, before: Standing) -> Ended:
        """Run the launcher once, to its end. Raises UserError only at first: what made sense once
        is tried again.

        `before` is how the run stood.
        """
        if self.signals.first:
            return Ended(1)
        try:
            return Ended(self.start(restart, before))
        except UserError as error:
            if restart == 0:
                raise
            return Ended(1, one_line(error))

    def start(self, restart: int, before: Standing) -> int:
        """Run the launcher once; its exit code, when it and all ranks are gone. Raises UserError if
        none can run.
        """
        found = self.find_places()
        slots = found.left
        if found.left != found.asked:
            slots = trim(found.left, self.load_recipe())
        ranks = sum(slots.values())
        hosts = list(slots)
        if restart == 0:
            self.check(self.flags_of_trainer(), ranks)
        else:
            # Those of a host that was cut off, and is back.
            self.ranks_on(hosts).signal(signal.SIGKILL)
            newest = newest_checkpoint(self.job.run_dir)
            self.say(
                f"restart {restart} continues from {newest}, if that is whole, on {ranks} ranks"
            )
        if slots != found.left:
            left = sum(found.left.values())
            self.say(f"only {ranks} of the {left} ranks left take part: they divide a step")
        command = self.command(found.asked, slots)
        with unheard():
            print("+", shlex.join(command.words), flush=True)
        if self.slurm_job:
            self.slurm_job.note_ports(self.ports)
        return self.run_to_its_end(command, self.ranks_on(hosts), before)

    def ranks_on(self, hosts: list[str]) -> Ranks:
        """Those of all starts, on these hosts."""
        if self.allocation:
            return Ranks(hosts, self.ports, self.allocation.run_on)
        return Ranks(hosts, self.ports)

    def end_earlier_start(self) -> None:
        """In a job of Slurm, end the ranks that the same job left in the run's directory, and wait
        until that is free: a node that was lost with its slurmd may go on with them.
        """
        earlier = self.slurm_job.earlier_ports() if self.slurm_job else []
        if not earlier:
            return
        if self.allocation:
            nodes = self.allocation.nodes()
            Ranks(nodes, earlier, self.allocation.run_on).signal(signal.SIGKILL)
        self.wait(0.0)

    def run_to_its_end(self, command: Command, ranks: Ranks, before: Standing) -> int:
        """Run a launcher, end its ranks well when a signal asks for it, and leave none behind."""
        with start_guarded(command) as launcher:
            while launcher.poll() is None and not self.signals.first:
                time.sleep(POLL_S)
            if not self.signals.first:
                time.sleep(SPREAD_S)
            # Before the run began nothing is lost.
            if self.signals.first and standing(self.job.run_dir).has_begun_since(before):
                ranks.end(launcher, self.signals)
            ranks.signal(signal.SIGKILL)
        return launcher.wait()  # leaving closed the pipe

    def command(self, asked: Slots, slots: Slots) -> Command:
        """What to run for a start, whose ranks meet at a port that is free on this machine."""
        with socket.create_server(("", 0)) as listener:
            self.ports.append(str(listener.getsockname()[1]))
        hostfile = self.job.hostfile
        if hostfile and slots != asked:
            hostfile = self.job.run_dir / "hostfile"
            write_hostfile(hostfile, slots)
        return command_of(
            Start(
                slots=slots,
                port=self.ports[-1],
                hostfile=hostfile,
                is_allocated=self.allocation is not None,
                has_gpus=self.gpus > 0,
                trainer_flags=self.flags_of_trainer(),
            )
        )

    def leave_unless_failed(self, code: int, before: Standing, now: Standing) -> None:
        """Leave with the job's exit code if it ends with this start."""
        if code == USER_ERROR_EXIT_CODE:
            sys.exit(code)
        is_preempted = now.status == "preempted" and now.has_begun_since(before)
        is_shown = code == 0 and "--dry-run" in self.job.trainer_flags
        if now.status == "done" or is_shown:
            sys.exit(0)
        if self.slurm_job:
            self.slurm_job.leave_if_slurm_goes_on(
                self.signals.first, now, is_preempted=is_preempted
            )
        if is_preempted:
            sys.exit(0)
        if self.signals.first:
            name = signal_name(self.signals.first)
            self.say(f"ended by {name}; the same command continues")
            sys.exit(SIGNALLED + self.signals.first)

    def leave_if_a_step_failed_twice(self, why: str, before: Standing, now: Standing) -> None:
        """Leave if this start failed where the one before it did; else remember where it did."""
        last_failed_step = self.failed_step
        self.failed_step = now.steps if now.has_trained_since(before) else None
        if self.failed_step is not None and self.failed_step == last_failed_step:
            sys.exit(f"error: {self.job.run_dir}: {why}; {self.describe_step(self.failed_step)}")

    def describe_step(self, step: int) -> str:
        """What a step that failed twice was made of."""
        batch = self.load_recipe().global_batch_size
        first = step * batch
        trace = ["python", "-m", "pretrain.trace"]
        trace += ["--run-dir", str(self.job.run_dir), "--data-dir", str(self.job.data_dir)]
        trace += ["--step", str(step), "--row", "0"]
        return (
            f"step {step} failed twice in a row; it has the samples {first} to "
            f"{first + batch - 1}, and {shlex.join(trace)} shows the documents in the first"
        )

    def back_off(self) -> None:
        """Wait, twice as long each time."""
        self.wait(self.back_off_s)
        self.back_off_s = min(2 * self.back_off_s, LONGEST_BACK_OFF_S)

    def wait(self, seconds: float) -> None:
        """Back off, then until no rank holds the run's directory any more; a signal ends that."""
        end = time.monotonic() + seconds
        while not self.signals.first and time.monotonic() < end + LOCKED_S:
            time.sleep(POLL_S)
            with suppress(UserError):  # somebody holds it
                if time.monotonic() > end:
                    lock(self.job.run_dir, "training there", "--run-dir").close()
                    break

    # What is there, and what can be

    def find_places(self) -> Found:
        """The ranks that were asked for, and those that there is a place for now. Raises
        UserError.
        """
        if self.job.hostfile:
            return self.find_hosts(self.job.hostfile)
        if self.allocation:
            return self.find_nodes(self.allocation)
        return self.find_gpus()

    def find_gpus(self) -> Found:
        """The ranks of this machine that were asked for, and those that it has GPUs for now.

        Raises UserError.
        """
        gpus = count_gpus()
        self.gpus = max(gpus, self.gpus)
        if self.gpus and not gpus:
            raise UserError("no GPU is left on this machine")
        asked = self.job.ranks or self.gpus or ranks_by_default(self.load_recipe(), self.gpus)
        left = asked
        if gpus and self.ports:  # at first, more ranks than GPUs are the launcher's to refuse
            left = min(asked, gpus)
        return Found({HERE: asked}, {HERE: left})

    def find_nodes(self, allocation: Allocation) -> Found:
        """The ranks of all nodes that Slurm gave, and of those that it has not lost since.

        Raises UserError where one must not be left out, or none is left.
        """
        answers = allocation.ask(allocation.nodes())
        if answers.missing and not (answers.left and self.job.max_restarts):
            raise UserError(
                f"Slurm's job {allocation.job}: {', '.join(answers.missing)} ({answers.why}): each "
                "node must see this directory and this Python"
            )
        if answers.missing:
            self.say(f"left out {', '.join(answers.missing)} ({answers.why})")
        self.gpus = max(self.gpus, sum(answers.left.values()))
        left = allocation.slots(answers.left, self.load_recipe())
        if not left:
            raise UserError(f"Slurm's job {allocation.job}: no GPU is left on its nodes")
        if not self.slots_at_first:
            # A node that is missing from the first had as many as any, for all that is known.
            self.slots_at_first = {**left, **dict.fromkeys(answers.missing, max(left.values()))}
        return Found(self.slots_at_first, left)

    def find_hosts(self, hostfile: Path) -> Found:
        """The hostfile's slots, and those of the hosts that ssh reaches and that see what this
        machine sees. Raises UserError where some must not be left out, or all are missing.
        """
        asked = read_hostfile(hostfile)
        answers = ask_hosts(asked)
        may_leave_out = answers.left and self.job.max_restarts
        if answers.missing and not may_leave_out:
            raise UserError(
                f"--hostfile {hostfile}: {answers.why}; ssh must reach all, and each see what is "
                "here"
            )
        if answers.missing:
            self.say(f"left out {', '.join(answers.missing)} ({answers.why.strip()})")
        return Found(asked, answers.left)

    def check(self, arguments: list[str], ranks: int) -> None:
        """Refuse what arithmetic refuses of a run on so many ranks, before anything starts. Raises
        UserError.

        A data set that lies on the disks of the hosts alone is the trainer's to look at.
        """
        if self.job.hostfile and not self.job.data_dir.exists():
            check_recipe_and_engine(arguments, ranks)
        else:
            check_arguments(arguments, ranks)

    def load_recipe(self) -> Recipe:
        """The recipe, with all overrides that say how large a step is. Raises UserError."""
        flags = self.job.trainer_flags
        overrides = [flag for flag in flags if re.match(r"--(model|batch)\.", flag)]
        return load_recipe(self.job.recipe, overrides, self.job.data_dir)

    def flags_of_trainer(self) -> list[str]:
        """Those that were given, and on a CPU of this machine the engine that suits it."""
        flags = self.job.trainer_flags
        if self.job.hostfile:
            return flags
        return [*flags, *engine_flags_by_default(flags, self.gpus)]

    def say(self, text: str) -> None:
        """A line about the run."""
        with unheard():
            print(f"{self.job.run_dir}: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """The command."""
    back_off_s = float(os.getenv("BACK_OFF_S", str(FIRST_BACK_OFF_S)))  # tests take less
    job = parse()
    supervisor = Supervisor(job, back_off_s=back_off_s)
    is_said_where = job.hostfile is not None or job.ranks is not None
    if allocation := find_allocation(must_start=not is_said_where):
        supervisor.allocation = None if is_said_where else allocation
        supervisor.slurm_job = SlurmJob(
            allocation=allocation,
            run_dir=job.run_dir,
            may_requeue=job.requeue,
            saved_step=standing(job.run_dir).state.saved_step or 0,
        )
    elif job.requeue:
        raise UserError(
            "--requeue: this is no job of Slurm; submit it with sbatch, or leave that out"
        )
    supervisor.signals.listen()
    supervisor.run()


if __name__ == "__main__":
    sys.exit(exit_code(main))

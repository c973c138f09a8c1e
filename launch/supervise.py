"""Keeps a training job going: starts `deepspeed`, ends it well when told to, starts it again when
it failed.

    launch/pretrain.sh --recipe R --data-dir D --run-dir RUN_DIR [--max-restarts N] [...]

How a start ended is read in RUN_DIR/state.json, which the trainer writes: the launcher can end with
0 while ranks were killed. The launcher is the first process of a session of its own. In it sits a
shell that waits for the end of a pipe from here and then kills them all: so nothing outlives this
process, however it ends. Ranks on other hosts have terminals of ssh, and end with them.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run by path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_prep.commands import CommandParser, exit_code, large_number, signal_name, unheard
from data_prep.errors import USER_ERROR_EXIT_CODE, UserError, one_line
from data_prep.files import write_durably
from data_prep.locks import lock
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.data.digests import lengths_that_differ
from pretrain.run.first_checks import (
    check_arguments,
    check_recipe_and_engine,
    engine_flags_by_default,
    ranks_by_default,
)

GUARDED = """exec 3<&0 < /dev/null; sh -c "trap '' TERM INT USR1; read _ <&3; kill -9 0" & exec 3<&-; exec "$@" """
# sh -c SIGNAL_RANKS PORT|PORT SIGNAL: to this machine's ranks that meet at one of the ports; prints
# who got it. DeepSpeed's launchers get none but SIGKILL: they would orphan their ranks, or end them
# in the middle of a step.
SIGNAL_RANKS = """cd /proc
[ $1 != 9 ] || kill -9 $(grep -lzxsE -e "--master_port=($0)" [0-9]*/cmdline | cut -d/ -f1) 2> /dev/null
for pid in $(grep -lzxsE "MASTER_PORT=($0)" [0-9]*/environ | cut -d/ -f1); do
grep -qzxs -e "--local_rank=[0-9]*" $pid/cmdline && kill -s $1 $pid && echo $pid; done"""
COUNT_GPUS = (sys.executable, str(Path(__file__).with_name("count_gpus.py")))
SAME_SIGNAL_S = 2.0  # as pretrain/watch/signals.py has it: signals are often sent more than once
POLL_S = 0.1
# who signals every process of a job may come to the launcher first, and to this one last
SPREAD_S = 0.5
LONGEST_BACK_OFF_S = 300.0
ANSWER_S = 90.0  # of a command on a machine
# a file server may take so long to notice that the machine with a locked file is gone
LOCKED_S = 120.0
HOST_LINE = re.compile(r"\s*(?:#.*|(\S+)\s+slots=([1-9]\d{0,5})\s*)?")
HERE = ""  # this machine, among hosts
Slots = dict[str, int]  # ranks by host


def parse(arguments: list[str] | None = None) -> tuple[Namespace, list[str]]:
    """The flags that matter here, and all those of pretrain.train."""
    parser = CommandParser(prog="launch/pretrain.sh", description=(__doc__ or "").split("\n")[0])
    # the hostfile's slots say how many ranks there are
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--ranks", type=large_number, metavar="N", help="on this machine (default: its GPUs, or 2)"
    )
    where.add_argument(
        "--hostfile", type=Path, metavar="F", help="a line for each machine, as node1 slots=8"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="after failures (%(default)s)"
    )
    for name in ("--recipe", "--data-dir", "--run-dir"):
        parser.add_argument(
            name, required=True, help="as pretrain.train has it, with all its other flags"
        )
    flags, others = parser.parse_known_args(arguments)
    if flags.max_restarts < 0:
        raise UserError(f"--max-restarts {flags.max_restarts}: expected a number, 0 or more")
    return flags, [
        "--recipe",
        flags.recipe,
        "--data-dir",
        flags.data_dir,
        "--run-dir",
        flags.run_dir,
        *others,
    ]


def read_hostfile(path: Path) -> Slots:
    """A DeepSpeed hostfile. Raises UserError for the first line that isn't one of its."""
    if not path.is_file():
        raise UserError(f"--hostfile {path}: no such file; it holds a line for each host")
    slots: Slots = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = HOST_LINE.fullmatch(line)
        if not match or match[1] in slots:
            raise UserError(
                f"--hostfile {path}: line {number}: {line}: expected one for each host, as node1 "
                "slots=8"
            )
        slots |= {match[1]: int(match[2])} if match[1] else {}
    if not slots:
        raise UserError(
            f"--hostfile {path}: names no host; it holds a line for each, as node1 slots=8"
        )
    return slots


def run_on(hosts: list[str], *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command on this machine, or on hosts by ssh, on all at the same time."""
    ssh = {
        "PDSH_RCMD_TYPE": "ssh",
        "PDSH_SSH_ARGS_APPEND": f"-oBatchMode=yes {os.getenv('PDSH_SSH_ARGS_APPEND', '')}",
    }
    if HERE not in hosts:
        command = (
            "pdsh",
            "-t",
            "10",
            "-u",
            "45",
            "-f",
            "1024",
            "-w",
            ",".join(hosts),
            shlex.join(command),
        )
    env, nothing = {**os.environ, **ssh}, subprocess.DEVNULL
    try:
        return subprocess.run(
            command,
            env=env,
            stdin=nothing,
            capture_output=True,
            text=True,
            process_group=0,
            timeout=ANSWER_S,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{shlex.join(command)[:80]} ...: no answer in {ANSWER_S:.0f} s; see why"
        ) from None


def trim(slots: Slots, recipe: Recipe) -> Slots:
    """As many of the ranks as divide a step, those of the first hosts; all of them if no number
    does.
    """
    at_once, every = recipe.batch.micro_batch_size, sum(slots.values())
    left = next(
        (
            ranks
            for ranks in range(every, 0, -1)
            if recipe.global_batch_size % (ranks * at_once) == 0
        ),
        every,
    )
    kept: Slots = {}
    for host, ranks in slots.items():
        kept[host] = min(ranks, left - sum(kept.values()))
    return {host: ranks for host, ranks in kept.items() if ranks}


def standing(run_dir: Path) -> dict[str, Any]:
    """How a run stands: its state.json, and its steps; what is damaged is the trainer's to complain
    about.

    `began` differs after a start whose ranks had met; a start that trained left a line of
    starts.jsonl.
    """
    state: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError, RecursionError):
        state = dict(json.loads((run_dir / "state.json").read_bytes()))
    lines = {"steps": "metrics.jsonl", "starts": "starts.jsonl"}
    counts = {name: count_lines(run_dir / file_name) for name, file_name in lines.items()}
    return {"status": "unknown", "began": None, **state, **counts}


def count_lines(path: Path) -> int:
    """How many whole lines a file has; 0 if it is not there."""
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def newest_checkpoint(run_dir: Path) -> str:
    """The name of the checkpoint of most steps; more of them than fill eight digits take more."""
    names = [path.name for path in run_dir.glob("checkpoints/step-*") if path.name[5:].isdecimal()]
    return max(names, key=lambda name: int(name[5:]), default="step 0")


def describe_failure(code: int, before: dict[str, Any], now: dict[str, Any], data_dir: Path) -> str:
    """Why a start failed, on one line: what the trainer says, else what can be known."""
    if now["status"] == "failed" and now != before:
        return " ".join(str(now.get("reason")).split())
    if now["status"] != "running":
        return f"it ended before training (deepspeed's exit code {code})"
    killed = f"its ranks or their launcher were killed (deepspeed's exit code {code})"
    damage = lengths_that_differ(data_dir)  # who reads a mapped file behind its end is killed
    return "; ".join([killed, *damage])


@dataclass
class Supervisor:
    """A job over all its starts."""

    flags: Namespace
    trainer_flags: list[str]
    signals: list[tuple[int, float]] = field(default_factory=list)  # number, time
    ports: list[str] = field(default_factory=list)  # that the ranks of each start met at
    gpus: int = 0  # the most that were seen

    def say(self, text: str) -> None:
        """A line about the run."""
        with unheard():
            print(f"{self.flags.run_dir}: {text}", file=sys.stderr, flush=True)

    def load_recipe(self) -> Recipe:
        """The recipe, with all overrides that say how large a step is."""
        overrides = [flag for flag in self.trainer_flags if re.match(r"--(model|batch)\.", flag)]
        return load_recipe(self.flags.recipe, overrides, Path(self.flags.data_dir))

    def check(self, arguments: list[str], ranks: int) -> None:
        """Refuse what arithmetic refuses of a run on so many ranks, before anything starts. Raises
        UserError.

        A data set that lies on the disks of the hosts alone is the trainer's to look at.
        """
        if self.flags.hostfile and not Path(self.flags.data_dir).exists():
            check_recipe_and_engine(arguments, ranks)
        else:
            check_arguments(arguments, ranks)

    def find_gpus(self) -> tuple[Slots, Slots]:
        """The ranks of this machine that were asked for, and those that it has GPUs for now."""
        answer = run_on([HERE], *COUNT_GPUS)
        if not answer.stdout.strip().isdecimal():
            raise UserError(
                f"GPUs cannot be counted: {answer.stderr[-200:]}; mend the driver, or torch here"
            )
        gpus = int(answer.stdout)
        self.gpus = max(gpus, self.gpus)
        if self.gpus and not gpus:
            raise UserError("no GPU is left on this machine")
        asked = self.flags.ranks or self.gpus or ranks_by_default(self.load_recipe(), self.gpus)
        return {HERE: asked}, {HERE: min(asked, gpus) if gpus and self.ports else asked}

    def find_hosts(self) -> tuple[Slots, Slots]:
        """The hostfile's slots, and those of the hosts that ssh reaches and that see what this
        machine sees.
        """
        asked = read_hostfile(self.flags.hostfile)
        look = (
            f"{shlex.join(['ls', '-d', os.getcwd(), sys.executable])} > /dev/null && echo sees %h"
        )
        answer = run_on([*asked], "sh", "-c", look)
        left = {host: asked[host] for host in asked if f"sees {host}\n" in answer.stdout}
        missing = sorted(asked.keys() - left.keys())
        why = next(
            (line for line in answer.stderr.splitlines() if line.partition(":")[0] in missing),
            "no answer",
        )
        if missing and not (left and self.flags.max_restarts):
            raise UserError(
                f"--hostfile {self.flags.hostfile}: {why}; ssh must reach all, and each see what "
                "is here"
            )
        if missing:
            self.say(f"left out {', '.join(missing)} ({why.strip()})")
        return asked, left

    def flags_of_trainer(self) -> list[str]:
        """Those that were given, and on a CPU of this machine the engine that suits it."""
        if self.flags.hostfile:
            return self.trainer_flags
        return [*self.trainer_flags, *engine_flags_by_default(self.trainer_flags, self.gpus)]

    def command(self, asked: Slots, slots: Slots) -> tuple[list[str], dict[str, str]]:
        """What to run for a start, and in which environment."""
        launcher, flags, env = (
            ["deepspeed", "--quiet", "--master_port", self.ports[-1]],
            self.flags_of_trainer(),
            {},
        )
        if hostfile := self.flags.hostfile:
            if slots != asked:
                hostfile = Path(self.flags.run_dir, "hostfile")
                write_durably(
                    hostfile,
                    "".join(f"{host} slots={ranks}\n" for host, ranks in slots.items()).encode(),
                )
            # ranks get a terminal, so that they end when ssh does; ssh ends 15 s after its node
            # fell silent
            env["PDSH_SSH_ARGS_APPEND"] = (
                f"-tt -o ServerAliveInterval=5 {os.getenv('PDSH_SSH_ARGS_APPEND', '')}"
            )
            # or a single host is taken for this machine
            launcher += ["--hostfile", str(hostfile), "--force_multi"]
        else:
            cores = len(os.sched_getaffinity(0))
            env["OMP_NUM_THREADS"] = os.getenv("OMP_NUM_THREADS", str(max(1, cores // slots[HERE])))
            launcher += ["--num_gpus", str(slots[HERE])]
            if not self.gpus:
                env["DS_ACCELERATOR"] = "cpu"
        return [*launcher, "--module", "pretrain.train", *flags], {**os.environ, **env}

    def signal_ranks(self, hosts: list[str], number: int) -> bool:
        """Send a signal to the ranks of all starts; whether there were any."""
        return bool(
            run_on(hosts, "sh", "-c", SIGNAL_RANKS, "|".join(self.ports), str(int(number))).stdout
        )

    def end(self, launcher: subprocess.Popen[bytes], hosts: list[str]) -> None:
        """Have the ranks end after their step, and wait for that, unless one more signal comes.

        The launcher may be gone before them: who ends a whole job signals each of its processes.
        """
        self.signal_ranks(hosts, self.signals[0][0])
        while launcher.poll() is None or self.signal_ranks(hosts, 0):
            time.sleep(POLL_S)
            if self.signals[-1][1] - self.signals[0][1] >= SAME_SIGNAL_S:
                break

    def start(self, restart: int, before: dict[str, Any]) -> int:
        """Run the launcher once; its exit code, when it and all ranks are gone. Raises UserError if
        none can run.

        `before` is how the run stood.
        """
        asked, left = self.find_hosts() if self.flags.hostfile else self.find_gpus()
        slots = left if left == asked else trim(left, self.load_recipe())
        hosts, ranks = [*slots], sum(slots.values())
        if not restart:
            self.check(self.flags_of_trainer(), ranks)
        if restart:
            self.signal_ranks(hosts, signal.SIGKILL)  # of a host that was cut off, and is back
            newest = newest_checkpoint(Path(self.flags.run_dir))
            self.say(
                f"restart {restart} continues from {newest}, if that is whole, on {ranks} ranks"
            )
        if slots != left:
            self.say(
                f"only {ranks} of the {sum(left.values())} ranks left take part: they divide a step"
            )
        with socket.create_server(("", 0)) as listener:
            self.ports.append(str(listener.getsockname()[1]))
        command, env = self.command(asked, slots)
        with unheard():
            print("+", shlex.join(command), flush=True)
        guarded = ["sh", "-c", GUARDED, "sh", *command]
        with subprocess.Popen(
            guarded, stdin=subprocess.PIPE, env=env, start_new_session=True
        ) as launcher:
            while launcher.poll() is None and not self.signals:
                time.sleep(POLL_S)
            if not self.signals:
                time.sleep(SPREAD_S)
            if self.signals and standing(Path(self.flags.run_dir))["began"] != before["began"]:
                self.end(launcher, hosts)  # before it began nothing is lost
            self.signal_ranks(hosts, signal.SIGKILL)
        return launcher.wait()  # leaving closed the pipe

    def wait(self, seconds: float) -> None:
        """Back off, then until no rank holds the run's directory any more; a signal ends that."""
        end = time.monotonic() + seconds
        while not self.signals and time.monotonic() < end + LOCKED_S:
            time.sleep(POLL_S)
            with suppress(UserError):
                if time.monotonic() > end:
                    lock(Path(self.flags.run_dir), "training there", "--run-dir").close()
                    break

    def end_unless_failed(self, code: int, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Leave with the job's exit code if it ends with this start."""
        good = ("done", "preempted") if now["began"] != before["began"] else ("done",)
        if (
            code == USER_ERROR_EXIT_CODE
            or now["status"] in good
            or (code == 0 and "--dry-run" in self.trainer_flags)
        ):
            sys.exit(code if code == USER_ERROR_EXIT_CODE else 0)
        if self.signals:
            self.say(f"ended by {signal_name(self.signals[0][0])}; the same command continues")
            sys.exit(128 + self.signals[0][0])

    def run(self) -> None:
        """Start, and start again; leaves with the exit code."""
        run_dir, failed_step, back_off = (
            Path(self.flags.run_dir),
            None,
            float(os.getenv("BACK_OFF_S", "5")),
        )
        # what does not divide over one divides over none
        self.check(self.trainer_flags, self.flags.ranks or 1)
        for restart in range(1, self.flags.max_restarts + 2):
            before = standing(run_dir)
            try:
                code, refusal = 1 if self.signals else self.start(restart - 1, before), ""
            except UserError as error:
                if restart == 1:
                    raise
                code, refusal = 1, one_line(error)
            now, last_failed_step = standing(run_dir), failed_step
            self.end_unless_failed(code, before, now)
            why = refusal or describe_failure(code, before, now, Path(self.flags.data_dir))
            trained = now["began"] != before["began"] and now["starts"] > before["starts"]
            failed_step = now["steps"] if trained else None
            if failed_step is not None and failed_step == last_failed_step:
                sys.exit(f"error: {run_dir}: {why}; {self.describe_step(failed_step)}")
            if restart <= self.flags.max_restarts:
                self.say(
                    f"failed: {why}; restart {restart} of {self.flags.max_restarts} in "
                    f"{back_off:g} s"
                )
                self.wait(back_off)
                back_off = min(2 * back_off, LONGEST_BACK_OFF_S)
        sys.exit(
            f"error: {run_dir}: {why}; no restarts left of {self.flags.max_restarts}; the same "
            "command continues"
        )

    def describe_step(self, step: int) -> str:
        """What a step that failed twice was made of."""
        batch = self.load_recipe().global_batch_size
        where = [
            "--run-dir",
            self.flags.run_dir,
            "--data-dir",
            self.flags.data_dir,
            "--step",
            str(step),
            "--row",
            "0",
        ]
        return (
            f"step {step} failed twice in a row; it has the samples {step * batch} to "
            f"{(step + 1) * batch - 1}, and "
            f"{shlex.join(['python', '-m', 'pretrain.trace', *where])} shows the documents in the "
            "first"
        )


def main() -> None:
    """The command."""
    supervisor = Supervisor(*parse())
    for ending in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(
            ending, lambda number, _: supervisor.signals.append((number, time.monotonic()))
        )
    supervisor.run()


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""What the facts of all machines mean for a run: pure functions from facts to verdicts."""

from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from launch.doctor.ask import Asked
from launch.doctor.probe import EXCLUDED, NOT_EXCLUDED, Facts
from launch.hosts import HERE

LEAST_FREE_MIB = 64
LITTLE_FREE_MIB = 10 << 10
LITTLE_MEMORY_MIB = 1 << 10
LEAST_SHARED_MEMORY_MIB = 64  # what containers give unless told
LEAST_OPEN_FILES = 1024
LEAST_MAPS = 65530  # Linux' own default
MOST_SKEW_S = 5.0
STALE_S = 600  # no extension takes so long to build
SHOWN = 3  # packages or paths named in a row


class State(StrEnum):
    """How a check ended."""

    GOOD = "ok"
    WARNING = "warning"
    MEND = "mend"  # a run can't start, or would hang


class Verdict(NamedTuple):
    """A row of the table."""

    check: str
    host: str  # empty: all of them
    state: State
    found: str
    remedy: str = ""


def judge(asked: Asked) -> list[Verdict]:
    """All verdicts, in the order of the table."""
    verdicts = reachable(asked)
    for check in CHECKS:
        verdicts += check(asked)
    return verdicts


def reachable(asked: Asked) -> list[Verdict]:
    """Who answered."""
    rows = [
        Verdict("reachable", host, State.MEND, why, f"see why: ssh {host} hostname")
        for host, why in asked.silent.items()
    ]
    return rows or [
        Verdict("reachable", "", State.GOOD, f"{len(asked.facts)} of {len(asked.hosts)}")
    ]


def common(values: dict[str, str]) -> str:
    """The value that most hosts have; of several, the one of the first host."""
    return Counter(values.values()).most_common(1)[0][0] if values else ""


def differing(asked: Asked, check: str, of: Callable[[Facts], str], remedy: str) -> list[Verdict]:
    """A row for each host whose value is not that of most, or one that all have the same."""
    values = {host: of(facts) for host, facts in asked.facts.items()}
    usual = common(values)
    rows = [
        Verdict(check, host, State.MEND, f"{value or 'none'}; most have {usual or 'none'}", remedy)
        for host, value in values.items()
        if value != usual
    ]
    return rows or [Verdict(check, "", State.GOOD, usual or "none")]


def code(asked: Asked) -> list[Verdict]:
    """The same files everywhere; whether they are as committed."""
    rows = differing(asked, "code", lambda f: f.code, "install the same commit there")
    for host, facts in asked.facts.items():
        if facts.changed_files:
            found = f"{facts.changed_files} files are not as in commit {facts.commit[:12]}"
            rows.append(Verdict("commit", host, State.WARNING, found, "commit them"))
    return rows


def versions_of(name: str, asked: Asked) -> dict[str, str]:
    """The version of a package by host; empty where it is not installed."""
    return {host: facts.packages.get(name, "") for host, facts in asked.facts.items()}


def versions(asked: Asked) -> list[Verdict]:
    """Python, and each package by name."""
    rows = differing(asked, "Python", lambda f: f.python, "install that Python there")
    everywhere: set[str] = set()
    for facts in asked.facts.values():
        everywhere.update(facts.packages)
    usual = {}
    for name in everywhere:
        usual[name] = common(versions_of(name, asked))
    others = []
    for host, facts in asked.facts.items():
        names = []
        for name in sorted(usual):
            if facts.packages.get(name, "") != usual[name]:
                names.append(name)
        if names:
            named = [
                f"{name} {facts.packages.get(name) or 'missing'}, most have {usual[name] or 'none'}"
                for name in names[:SHOWN]
            ]
            more = f"; {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            remedy = "install the same versions there"
            others.append(Verdict("packages", host, State.MEND, "; ".join(named) + more, remedy))
    return rows + (others or [Verdict("packages", "", State.GOOD, f"{len(usual)} alike")])


def gpus(asked: Asked) -> list[Verdict]:
    """Models and drivers alike, and no memory errors."""
    models = {h: parse_gpus(f.gpus) for h, f in asked.facts.items()}
    rows = differing(
        asked, "GPUs", lambda f: ", ".join(parse_gpus(f.gpus).kinds), "leave that host out"
    )
    for host, found in models.items():
        if found.memory_errors:
            what = f"{found.memory_errors} uncorrected memory errors"
            rows.append(Verdict("ECC", host, State.WARNING, what, "reset or replace the GPU"))
    return rows


class Gpus(NamedTuple):
    """What nvidia-smi says."""

    kinds: list[str]  # model and driver, each once
    memory_errors: int


def parse_gpus(text: str) -> Gpus:
    """Read lines of name, driver, uncorrected errors, which may be [N/A]."""
    kinds = set()
    errors = 0
    for line in text.splitlines():
        fields = [part.strip() for part in line.split(",")]
        if len(fields) != 3:  # a message instead of a GPU
            continue
        kinds.add(f"{fields[0]} driver {fields[1]}")
        if fields[2].isdecimal():
            errors += int(fields[2])
    return Gpus(sorted(kinds), errors)


def data(asked: Asked) -> list[Verdict]:
    """The same data set and tokenizer."""
    if not asked.data_dir:
        return []
    remedy = f"have it see the same {asked.data_dir}"
    rows = differing(asked, "data set", lambda facts: facts.data, remedy)
    # A data set of ids may hold none, on all hosts.
    return rows + differing(asked, "tokenizer", lambda facts: facts.tokenizer, remedy)


def names(asked: Asked) -> list[Verdict]:
    """Each name leads to the same address on every host, and to no loopback."""
    rows = []
    for name in asked.hosts:
        seen = {host: facts.addresses.get(name, "") for host, facts in asked.facts.items()}
        usual = common(seen)
        for host, address in seen.items():
            if name == HERE or (address == usual and not address.startswith("127.")):
                continue
            found = f"{name} is {address or 'unknown'} there"
            remedy = f"write its real address into /etc/hosts of {host}"
            # Ranks that are given an interface (GLOO_SOCKET_IFNAME) never look at the name.
            state = State.WARNING if address else State.MEND
            rows.append(Verdict("names", host, state, found, remedy))
    return rows or [Verdict("names", "", State.GOOD, "the same everywhere")]


def shared(asked: Asked) -> list[Verdict]:
    """The run's directory is one for all, and locks in it exclude."""
    if not asked.note:
        return []
    rows = []
    for host, facts in asked.facts.items():
        if facts.note != asked.note:
            found = "a file that was written here is not seen there"
            rows.append(Verdict("shared", host, State.MEND, found, "mount the same storage"))
        elif facts.lock == NOT_EXCLUDED:
            found = "a lock that is held here can be taken there"
            remedy = "mount without local_lock or nolock"
            rows.append(Verdict("locks", host, State.MEND, found, remedy))
        elif facts.lock != EXCLUDED:
            remedy = "none needed; a file is held in its stead"
            rows.append(Verdict("locks", host, State.WARNING, facts.lock, remedy))
    return rows or [Verdict("shared", "", State.GOOD, "seen by all; locks exclude")]


def disks(asked: Asked) -> list[Verdict]:
    """Room for checkpoints, and how fast it is written."""
    rows = []
    for host, facts in asked.facts.items():
        free = facts.free_mib
        if free is None:
            continue
        if facts.write_error or free < LEAST_FREE_MIB:
            found = f"{free} MiB free; {facts.write_error or 'nearly full'}"
            rows.append(Verdict("disk", host, State.MEND, found, "make room"))
            continue
        speed = f", {facts.write_mib_s:.0f} MiB/s" if facts.write_mib_s else ""
        state = State.WARNING if free < LITTLE_FREE_MIB else State.GOOD
        remedy = "make room for checkpoints" if state is State.WARNING else ""
        rows.append(Verdict("disk", host, state, f"{free} MiB free{speed}", remedy))
    return rows


def clocks(asked: Asked) -> list[Verdict]:
    """Each clock lies between the moments of asking and of having been answered, by ours."""
    rows = []
    for host, facts in asked.facts.items():
        skew = max(asked.began_s - facts.time_s, facts.time_s - asked.ended_s)
        if skew > MOST_SKEW_S:
            found = f"{skew:.0f} s off the clock here"
            rows.append(Verdict("clock", host, State.WARNING, found, "start chrony or ntpd there"))
    return rows or [Verdict("clock", "", State.GOOD, f"within {MOST_SKEW_S:g} s")]


def machine(asked: Asked) -> list[Verdict]:
    """Memory and limits of each."""
    rows = []
    for host, f in asked.facts.items():
        for name, value, least, remedy in (
            ("memory", f.available_mib, LITTLE_MEMORY_MIB, "end what holds it"),
            ("/dev/shm", f.shared_memory_mib, LEAST_SHARED_MEMORY_MIB, "give it more: --shm-size"),
            ("open files", f.open_files, LEAST_OPEN_FILES, "ulimit -n 65536"),
            ("maps", f.maps, LEAST_MAPS, "sysctl vm.max_map_count=65530"),
        ):
            if value is not None and 0 <= value < least:
                found = f"{value}, less than {least}"
                rows.append(Verdict(name, host, State.WARNING, found, remedy))
    return rows or [Verdict("limits", "", State.GOOD, "memory, /dev/shm, open files, maps")]


def left_behind(asked: Asked) -> list[Verdict]:
    """Ranks and locks of others."""
    rows = []
    for host, facts in asked.facts.items():
        if facts.ranks:
            pids = " ".join(str(pid) for pid in facts.ranks)
            remedy = "end them, unless that run is meant to go on"
            rows.append(Verdict("ranks", host, State.WARNING, f"training runs: {pids}", remedy))
        for path, age in facts.stale_locks.items():
            if age > STALE_S:
                found = f"{path} is {age} s old"
                rows.append(Verdict("JIT locks", host, State.MEND, found, f"rm {path}"))
    return rows or [Verdict("left over", "", State.GOOD, "no ranks, no locks")]


def ports(refused: dict[str, list[str]]) -> list[Verdict]:
    """Of the second round: by host, the hosts whose free port it could not connect to."""
    rows = [
        Verdict(
            "ports",
            host,
            State.MEND,
            f"cannot connect to {', '.join(others)}",
            "let the firewall pass all ports between these hosts",
        )
        for host, others in refused.items()
        if others
    ]
    return rows or [Verdict("ports", "", State.GOOD, "free ports are reached")]


CHECKS = (
    names,
    code,
    versions,
    gpus,
    data,
    shared,
    disks,
    clocks,
    machine,
    left_behind,
)

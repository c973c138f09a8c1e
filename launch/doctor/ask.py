"""Asks all nodes at once what they say of themselves, while this machine holds a lock."""

import contextlib
import fcntl
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError
from launch.doctor.connect import Reached
from launch.doctor.probe import Facts, Request
from launch.hosts import HERE, run_on

PROBE = str(Path(__file__).with_name("probe.py"))
CONNECT = str(Path(__file__).with_name("connect.py"))
# Of ports that no service is registered for, below those that Linux gives to connections.
PORTS = range(20000, 32000)


@dataclass(frozen=True)
class Asked:
    """What was asked of which machines, and what they said."""

    hosts: list[str]
    facts: dict[str, Facts]  # by host, of those that answered
    silent: dict[str, str]  # the others, and what was heard instead
    note: str  # what the file in the run's place holds; empty without a run
    began_s: float  # since the epoch, by the clock of this machine
    ended_s: float
    data_dir: str = ""


@contextlib.contextmanager
def locked_note(place: Path | None) -> Iterator[tuple[str, str]]:
    """Name and content of a file in a directory, gone at the end; its lock is held meanwhile.

    Raises UserError where it can't be written.
    """
    if place is None:
        yield "", ""
        return
    content = secrets.token_hex(16)
    path = place / f".doctor-{content}"
    try:
        with contextlib.ExitStack() as held:
            try:
                file = held.enter_context(path.open("x"))
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise UserError(
                    f"{place}: cannot be written: {error.strerror}; make room, or choose another "
                    "--run-dir"
                ) from error
            # Where there are no locks, a node says so.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path.name, content
    finally:
        path.unlink(missing_ok=True)


def existing(run_dir: Path) -> Path:
    """A run's directory, or the nearest one above it that exists: nothing is made here."""
    path = run_dir.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def ask(hosts: list[str], data_dir: str, run_dir: Path | None, measure_disk: bool) -> Asked:
    """Ask machines, by one call for all. Raises UserError where this one can't ask."""
    place = existing(run_dir) if run_dir else None
    with locked_note(place) as (name, content):
        request = Request(
            hosts=[host for host in hosts if host != HERE],
            place=str(place or ""),
            note=name,
            data_dir=data_dir and os.path.abspath(data_dir),
            measure_disk=measure_disk,
        )
        began = time.time()
        # pdsh puts the host's name into %h
        label = HERE if HERE in hosts else "%h"
        answer = run_on(hosts, sys.executable, PROBE, label, request.packed())
        ended = time.time()
    said = read_facts(answer.stdout)
    facts = {host: said[host] for host in hosts if host in said}  # in their order
    silent = {host: heard(host, answer.stderr) for host in hosts if host not in facts}
    return Asked(hosts, facts, silent, content, began, ended, data_dir)


def read_facts(output: str) -> dict[str, Facts]:
    """Facts by host, from lines that may begin with the host's name. Others are passed over."""
    found = {}
    for line in output.splitlines():
        start = line.find("{")
        if start < 0:
            continue
        try:
            said = Facts(**json.loads(line[start:]))
        except (ValueError, TypeError):  # other code, or a greeting of the shell
            continue
        found[said.host] = said
    return found


def heard(host: str, errors: str) -> str:
    """The first thing that came from a host instead of an answer."""
    for line in errors.splitlines():
        if host == HERE or line.startswith(f"{host}:"):
            return line
    return "no answer that this version reads"


def ask_ports(hosts: list[str]) -> dict[str, list[str]]:
    """By host, the hosts whose port it could not connect to. All of them are reachable by ssh.

    Where the port happens to be taken on one, another is tried. Raises UserError where no free one
    is found.
    """
    for _ in range(3):
        port = secrets.choice(PORTS)
        answer = run_on(hosts, sys.executable, CONNECT, "%h", str(port), ",".join(hosts))
        found = read_reached(answer.stdout)
        if not any(reached.busy for reached in found.values()):
            refused = {}
            for host in hosts:
                refused[host] = found[host].refused if host in found else ["anybody"]
            return refused
    raise UserError(
        f"no port of {PORTS[0]} to {PORTS[-1]} is free on all hosts; end what holds them"
    )


def read_reached(output: str) -> dict[str, Reached]:
    """By host, from lines that begin with the host's name. Others are passed over."""
    found = {}
    for line in output.splitlines():
        start = line.find("{")
        if start >= 0:
            said = Reached(**json.loads(line[start:]))
            found[said.host] = said
    return found

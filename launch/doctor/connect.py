"""Whether nodes reach each other on a port as ranks do: a program that all run at the same time.

    python connect.py HOST PORT HOSTS     HOSTS: all of them, with commas; prints HOST's `Reached`

Each listens on the port and connects to the others, to all of them or, where there are many, to the
next one alone. Only Python's own modules are imported.
"""

import dataclasses
import json
import socket
import sys
import threading
import time
from dataclasses import dataclass

MANY = 8  # beyond so many hosts each connects to the next one alone
# ssh may begin so much later on one node than on another.
UNTIL_S = 12.0
TRY_S = 1.0
AGAIN_S = 0.1
LATER_S = 2.0


@dataclass(frozen=True)
class Reached:
    """What became of one node's connections."""

    host: str
    refused: list[str]  # hosts that it could not connect to
    busy: bool = False  # the port is taken there, which says nothing of the network


def others(host: str, hosts: list[str]) -> list[str]:
    """Whom a host connects to."""
    if len(hosts) <= MANY:
        return [other for other in hosts if other != host]
    return [hosts[(hosts.index(host) + 1) % len(hosts)]]


def accept(server: socket.socket) -> None:
    """Take connections, and drop them, as long as the program runs."""
    while True:
        server.accept()[0].close()


def connects(host: str, port: int, end: float) -> bool:
    """Whether a connection comes about before the end, which is one of time.monotonic."""
    while time.monotonic() < end:
        try:
            socket.create_connection((host, port), timeout=TRY_S).close()
            return True
        except OSError:  # it may not listen yet
            time.sleep(AGAIN_S)
    return False


def try_all(host: str, port: int, hosts: list[str]) -> Reached:
    """Listen, and connect to the others until that works or the time is up."""
    end = time.monotonic() + UNTIL_S
    try:
        server = socket.create_server(("", port), backlog=len(hosts))
    except OSError:
        return Reached(host, [], busy=True)
    threading.Thread(target=accept, args=[server], daemon=True).start()
    found: dict[str, bool] = {}

    def try_one(other: str) -> None:
        found[other] = connects(other, port, end)

    threads = [threading.Thread(target=try_one, args=[other]) for other in others(host, hosts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Reached(host, sorted(other for other, good in found.items() if not good))


if __name__ == "__main__":
    mine = try_all(sys.argv[1], int(sys.argv[2]), sys.argv[3].split(","))
    print(json.dumps(dataclasses.asdict(mine)), flush=True)
    # Others may have begun later, and not have come yet.
    time.sleep(LATER_S)

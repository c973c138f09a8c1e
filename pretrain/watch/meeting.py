"""How the ranks of a watch meet: rank 0 listens, the others prove that they are ranks. Strangers
are dropped.

Whatever connects to an open port (a port scan, a browser, something that stays silent) must neither
end a start nor hold it up, nor be taken for a rank. So rank 0 draws a key that only the ranks of
this start get, over the process group that they have joined, and asks for a proof of it, within a
time and in few bytes:

    rank 0 -> other   a challenge: 32 random bytes
    other -> rank 0   its rank in 4 bytes, a challenge of its own,
                      HMAC-SHA256 of (b"rank", challenge, rank)
    rank 0 -> other   HMAC-SHA256 of (b"main", the other's challenge)

Rank 0 listens at the address where all ranks met, or, on one machine, at loopback, and only until
all have come.
"""

import hmac
import os
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from pretrain.distributed.addresses import is_loopback
from pretrain.distributed.world import World

PROOF_S = 5.0  # for a proof of 100 bytes; ranks give theirs at once
# Connections without a proof at a time, beside those of ranks: the oldest makes way.
MOST_GUESTS = 256
CHALLENGE_BYTES = 32
RANK_BYTES = 4
MAC_BYTES = 32
ANSWER_BYTES = RANK_BYTES + CHALLENGE_BYTES + MAC_BYTES
LOOPBACK = "127.0.0.1"
EVERY_ADDRESS = ""


class StrangerError(Exception):
    """Who connected is no rank of this start; the text says why."""


def proof(key: bytes, *parts: bytes) -> bytes:
    """What only a holder of the key can say of these parts, all of fixed length but the first."""
    return hmac.digest(key, b"".join(parts), "sha256")


def rank_in_bytes(rank: int) -> bytes:
    """A rank as it is sent."""
    return rank.to_bytes(RANK_BYTES, "big")


# Where rank 0 listens


def meeting_address(world: World) -> str:
    """Where all ranks met: MASTER_ADDR as this machine resolves it, or loopback if there is one
    machine.
    """
    if world.world_size == world.local_world_size:
        return LOOPBACK
    name = os.environ["MASTER_ADDR"]
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:  # the ranks have met, so another one may know it
        return name
    return str(found[0][4][0])


def choose_address(seen: list[str]) -> str:
    """Of all ranks' views of the meeting address the first that another machine can use.

    Rank 0's own name may resolve to 127.0.1.1 on its machine, as Debian's installer has it.
    """
    return next((address for address in seen if not is_loopback(address)), seen[0])


def listen(address: str, ranks: int) -> tuple[socket.socket, str]:
    """A listener at the address, and where it really is: all addresses, if the one is not of this
    machine.

    That is so behind address translation, where MASTER_ADDR leads here all the same.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    backlog = ranks + MOST_GUESTS
    where = address
    try:
        server = socket.create_server((where, 0), family=family, backlog=backlog)
    except OSError:
        where = EVERY_ADDRESS
        server = socket.create_server((where, 0), family=family, backlog=backlog)
    return server, where


# Rank 0's side


@dataclass(kw_only=True)
class Guest:
    """A connection that has not proved itself yet."""

    socket: socket.socket
    address: str
    challenge: bytes
    until: float  # time.monotonic()
    received: bytes = b""

    def read(self) -> bool:
        """Take what has come; whether the answer is whole. Raises StrangerError."""
        try:
            part = self.socket.recv(ANSWER_BYTES - len(self.received))
        except BlockingIOError:  # nothing, after all
            return False
        except OSError as error:
            raise StrangerError(str(error.strerror)) from None
        if not part:
            raise StrangerError("closed without a proof")
        self.received += part
        return len(self.received) == ANSWER_BYTES

    def admit(self, key: bytes, awaited: set[int]) -> int:
        """The rank that the whole answer proves; answered with rank 0's own proof. Raises
        StrangerError.
        """
        rank_bytes = self.received[:RANK_BYTES]
        their_challenge = self.received[RANK_BYTES : RANK_BYTES + CHALLENGE_BYTES]
        given = self.received[RANK_BYTES + CHALLENGE_BYTES :]
        rank = int.from_bytes(rank_bytes, "big")
        if not hmac.compare_digest(given, proof(key, b"rank", self.challenge, rank_bytes)):
            raise StrangerError("what it sent is no proof")
        if rank not in awaited:
            raise StrangerError(f"rank {rank} is not awaited")
        try:
            self.socket.sendall(proof(key, b"main", their_challenge))
        except OSError as error:
            raise StrangerError(str(error.strerror)) from None
        return rank


class Reception:
    """Rank 0's door: who comes in until all awaited ranks have proved themselves, or the time is
    up.
    """

    def __init__(
        self,
        listener: socket.socket,
        key: bytes,
        awaited: set[int],
        on_stranger: Callable[[str, str], None],
    ) -> None:
        """`on_stranger` gets address and reason of each one that is dropped."""
        self.listener = listener
        self.key = key
        self.awaited = set(awaited)
        self.arrived: dict[int, Connection] = {}
        self.on_stranger = on_stranger
        self._most = MOST_GUESTS + len(awaited)
        self._guests: dict[int, Guest] = {}  # by file descriptor, oldest first

    def receive(self, seconds: float) -> None:
        """Take in the awaited ranks; afterwards `awaited` holds those that did not come in that
        time.
        """
        end = time.monotonic() + seconds
        self.listener.setblocking(False)
        with selectors.DefaultSelector() as selector:
            self._selector = selector
            selector.register(self.listener, selectors.EVENT_READ)
            while self.awaited and time.monotonic() < end:
                for ready, _ in selector.select(self._seconds_to(end)):
                    if ready.fileobj is self.listener:
                        self._open()
                    elif ready.fd in self._guests:  # no earlier one of this round made it leave
                        self._hear(self._guests[ready.fd])
                self._dismiss_late()
            why = "the time is up" if self.awaited else "all ranks have come"
            for guest in [*self._guests.values()]:
                self._dismiss(guest, why)

    def _seconds_to(self, end: float) -> float:
        """How long nothing need be looked at, unless something comes."""
        next_end = min([end, *(guest.until for guest in self._guests.values())])
        return max(0.0, next_end - time.monotonic())

    def _open(self) -> None:
        """Let the next one in, and challenge it."""
        try:
            accepted, where = self.listener.accept()
        except OSError:  # it is gone again
            return
        guest = Guest(
            socket=accepted,
            address=str(where[0]),
            challenge=secrets.token_bytes(CHALLENGE_BYTES),
            until=time.monotonic() + PROOF_S,
        )
        accepted.setblocking(False)
        if len(self._guests) >= self._most:
            self._dismiss(next(iter(self._guests.values())), "too many at a time")
        self._guests[accepted.fileno()] = guest
        self._selector.register(accepted, selectors.EVENT_READ)
        try:
            accepted.sendall(guest.challenge)
        except OSError as error:
            self._dismiss(guest, str(error.strerror))

    def _hear(self, guest: Guest) -> None:
        """Take what a guest says; once that is a proof it is a rank, and a guest no more."""
        try:
            if not guest.read():
                return
            rank = guest.admit(self.key, self.awaited)
        except StrangerError as why:
            self._dismiss(guest, str(why))
            return
        self._forget(guest)
        guest.socket.setblocking(True)
        self.arrived[rank] = Connection(guest.socket.detach())
        self.awaited.remove(rank)

    def _dismiss_late(self) -> None:
        """Drop those whose time is up."""
        for guest in [*self._guests.values()]:
            if time.monotonic() > guest.until:
                self._dismiss(guest, f"silent for {PROOF_S:.0f} s")

    def _dismiss(self, guest: Guest, why: str) -> None:
        """Drop a stranger."""
        self._forget(guest)
        guest.socket.close()
        self.on_stranger(guest.address, why)

    def _forget(self, guest: Guest) -> None:
        """It is no guest any more."""
        self._selector.unregister(guest.socket)
        del self._guests[guest.socket.fileno()]


# Another rank's side


def connect(address: tuple[str, int], key: bytes, rank: int, seconds: float) -> Connection:
    """This rank's connection to rank 0, each proved to the other. Raises OSError where that
    cannot be.
    """
    end = time.monotonic() + seconds
    with socket.create_connection(address, timeout=seconds) as joined:
        challenge = read_exactly(joined, CHALLENGE_BYTES, end)
        own_challenge = secrets.token_bytes(CHALLENGE_BYTES)
        sent_rank = rank_in_bytes(rank)
        joined.sendall(sent_rank + own_challenge + proof(key, b"rank", challenge, sent_rank))
        answer = read_exactly(joined, MAC_BYTES, end)
        if not hmac.compare_digest(answer, proof(key, b"main", own_challenge)):
            raise ConnectionError(
                f"what listens at {address[0]}:{address[1]} is not rank 0 of this start"
            )
        joined.settimeout(None)
        return Connection(joined.detach())


def read_exactly(joined: socket.socket, size: int, end: float) -> bytes:
    """So many bytes. Raises OSError if they have not come at that time, of time.monotonic()."""
    received = b""
    while len(received) < size:
        joined.settimeout(max(0.001, end - time.monotonic()))
        part = joined.recv(size - len(received))
        if not part:
            raise ConnectionError("the connection was closed before a proof")
        received += part
    return received

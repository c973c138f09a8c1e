"""Ranks that watch one another: none waits for another that is gone or silent, and a job that
stalls is ended.

A thread of each rank keeps a connection to rank 0. The end of a process closes its connection,
which is seen at once; a machine or network that is lost falls silent. Rank 0 then tells all that
are left to end and notes the cause in state.json. Every process ends by itself, whatever its main
thread waits for.
"""

import faulthandler
import json
import os
import secrets
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data_prep.commands import unheard
from data_prep.errors import USER_ERROR_EXIT_CODE, UserError, one_line, what_it_says
from pretrain.checkpoint.layout import LOGS_NAME
from pretrain.config.recipe import StallsRecipe
from pretrain.distributed.agree import LoneError, gather, say
from pretrain.distributed.world import World
from pretrain.engine.clock import StepClock
from pretrain.watch.meeting import (
    EVERY_ADDRESS,
    Reception,
    choose_address,
    connect,
    listen,
    meeting_address,
)
from pretrain.watch.stall_logs import header, log_path

BEAT_S = 1.0
SILENCE_S = 30.0
CONNECT_S = 30.0  # all ranks have met just before: what takes so long is gone
MOST_NAMED = 4  # ranks, in one line
CAUSE_S = 5.0  # by then the watch knows whose end broke an exchange
EXIT_CODE = 1
# In the text of an error that another rank's end causes.
OF_AN_EXCHANGE = ("gloo", "NCCL", "onnection", "ProcessGroup")


@dataclass(frozen=True, kw_only=True)
class Told:
    """What every rank is told of another one; port and address are rank 0's alone."""

    name: str
    address: str
    port: int
    key: bytes


@dataclass(kw_only=True)
class Peer:
    """Another rank, as its watch tells of it."""

    rank: int
    name: str
    connection: Connection
    heard_at: float = field(default_factory=time.monotonic)
    leaving: bool = False
    place: list[Any] = field(default_factory=list)  # StepClock.place


class Watch:
    """A rank's part of the watch, from the start of its process group to the end of the `with`
    block.
    """

    def __init__(
        self,
        world: World,
        run_dir: Path,
        stalls: StallsRecipe,
        note_failure: Callable[[Path, str], None],
    ) -> None:
        """`note_failure` gets the run's directory and why it failed, on the rank that ends it."""
        self.world = world
        self.run_dir = run_dir
        self.stalls = stalls
        self.note_failure = note_failure
        self.name = f"rank {world.rank} ({socket.gethostname()})"
        # What is wrong with the data's files, if one looks.
        self.find_damage: Callable[[], list[str]] = list
        self.clock: StepClock | None = None  # once there is one, this rank can be seen to move
        self.step_seconds: deque[float] = deque(maxlen=100)
        self._left = threading.Event()
        self._sending = threading.Lock()
        # Held by whichever thread of this process ends it, so that one alone says why.
        self._ending = threading.Lock()
        self._place: list[Any] = []
        self._met_a_stranger = False
        self._moved_at = time.monotonic()
        self._peers: list[Peer] = []
        self._peers = self._connect()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def _connect(self) -> list[Peer]:
        """Rank 0's connections to all others; another rank's to rank 0, at the address where all
        of them met.
        """
        if self.world.world_size == 1:
            return []
        seen = gather(meeting_address(self.world))
        listener: socket.socket | None = None
        address = EVERY_ADDRESS
        port = 0
        if self.world.is_main:
            listener, address = listen(choose_address(seen), len(seen))
            port = listener.getsockname()[1]
        told = gather(Told(name=self.name, address=address, port=port, key=secrets.token_bytes()))
        if listener:
            return self._receive_all(listener, told)
        main = told[0]
        there = (main.address or seen[self.world.rank], main.port)
        return [Peer(rank=0, name=main.name, connection=self._connect_to_main(there, main.key))]

    def _receive_all(self, listener: socket.socket, told: list[Told]) -> list[Peer]:
        """On rank 0: the connections of all others. Ends the job, naming those that do not come
        in time.
        """
        with listener:
            reception = Reception(
                listener, told[0].key, set(range(1, len(told))), self._say_once_of_a_stranger
            )
            reception.receive(CONNECT_S)
        arrived = sorted(reception.arrived.items())
        peers = [
            Peer(rank=rank, name=told[rank].name, connection=connection)
            for rank, connection in arrived
        ]
        if reception.awaited:
            self._peers = peers  # which are told why
            absent = [told[rank].name for rank in sorted(reception.awaited)]
            named = ", ".join(absent[:MOST_NAMED])
            if len(absent) > MOST_NAMED:
                named += f" and {len(absent) - MOST_NAMED} more"
            self._end(
                f"{named} did not connect within {CONNECT_S:.0f} s: killed, or its machine failed"
            )
        return peers

    def _connect_to_main(self, there: tuple[str, int], key: bytes) -> Connection:
        """This rank's connection to rank 0."""
        try:
            return connect(there, key, self.world.rank, CONNECT_S)
        except OSError as error:  # a failure, no bad input: the ranks have met just before
            why = f"cannot reach rank 0 at {there[0]}:{there[1]} ({what_it_says(error)})"
            advice = "it was killed, or a firewall between the machines must let all ports through"
            raise SystemExit(f"error: {self.name}: {why}; {advice}") from None

    def _say_once_of_a_stranger(self, address: str, why: str) -> None:
        """That somebody else has found the port is no fault of the run, and worth a line."""
        if not self._met_a_stranger:
            self._met_a_stranger = True
            say(
                self.world,
                f"note: dropped a connection from {address} that is no rank of this run ({why})",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, LoneError):
            self._ending.acquire()
            self._send("end", f"{self.name}: {one_line(error)}", USER_ERROR_EXIT_CODE)
            if not self.world.is_main:
                return  # rank 0 says why, for all of them; its answer ends this process
        elif isinstance(error, Exception) and not isinstance(error, UserError):
            self._tell_of(error)
        self._left.set()
        self._send("leave")

    def _tell_of(self, error: Exception) -> None:
        """Have all end for an error of this rank, unless it comes from another one's end."""
        if any(word in str(error) for word in OF_AN_EXCHANGE):
            time.sleep(CAUSE_S)
        self._ending.acquire()
        if not self.world.is_main:  # whose answer ends this process before Python prints it
            with unheard():
                traceback.print_exception(error)
        self._send("end", f"{self.name}: {type(error).__name__}: {one_line(error)}", EXIT_CODE)

    def _send(self, *message: Any) -> None:
        """A message to every peer; whether it is still there is seen when reading."""
        for peer in self._peers:
            with suppress(OSError), self._sending:
                peer.connection.send_bytes(json.dumps(message).encode())

    def _run(self) -> None:
        """Body of the thread."""
        beat_at = 0.0
        while not self._left.is_set():
            turn_at = time.monotonic()
            listening = {
                peer.connection: peer for peer in self._peers if not peer.connection.closed
            }
            for connection in wait(list(listening), BEAT_S):
                self._receive(listening[connection])  # type: ignore[index]
            # This process was suspended, and so may all have been.
            if time.monotonic() - turn_at > CAUSE_S:
                self._moved_at = time.monotonic()
                for peer in self._peers:
                    peer.heard_at = self._moved_at
            if time.monotonic() - beat_at >= BEAT_S:
                beat_at = time.monotonic()
                self._send("beat", self._where())
                self._check_silence()
                self._check_stall()

    def _where(self) -> list[Any]:
        """How far this rank is."""
        return self.clock.place() if self.clock else []

    def _receive(self, peer: Peer) -> None:
        """Take a peer's next message."""
        try:
            kind, *content = json.loads(peer.connection.recv_bytes())
        except (EOFError, OSError):
            peer.connection.close()
            if not peer.leaving:
                self._end(f"{peer.name} is gone: {self._what_killed_it()}")
            return
        if kind == "beat":
            peer.heard_at = time.monotonic()
            self._moved_at = self._moved_at if peer.place == content[0] else peer.heard_at
            peer.place = content[0]
        elif kind == "leave":  # all others are to do so soon; the silence that follows is counted
            peer.leaving = True
        elif kind == "stacks":
            self._write_stacks()
        elif self._left.is_set():
            return  # this rank is ending, and says why
        elif self.world.is_main:
            self._end(*content)
        else:
            os._exit(content[1])

    def _check_silence(self) -> None:
        """End the job for a peer that is not heard of any more; rank 0, which knows best who is
        lost, says so first.
        """
        limit_s = SILENCE_S if self.world.is_main else SILENCE_S + CAUSE_S
        for peer in self._peers:
            if time.monotonic() - peer.heard_at > limit_s:
                self._end(f"{peer.name} has not answered for {limit_s:.0f} s")

    def patience_s(self) -> float:
        """For how long nothing may move. First steps compile and fill caches: they may take six
        times as long.
        """
        if len(self.step_seconds) < 3:
            return 6 * self.stalls.after_s
        return max(
            self.stalls.after_s, self.stalls.after_medians * statistics.median(self.step_seconds)
        )

    def _check_stall(self) -> None:
        """On rank 0: end the job when no rank moves, with each rank's stack in its log and the
        slowest one named.
        """
        here = self._where()
        now = time.monotonic()
        if here != self._place:
            self._place = here
            self._moved_at = now
        seconds = now - self._moved_at
        if not self.world.is_main or seconds < self.patience_s():
            return
        self._send("stacks")
        self._write_stacks()
        time.sleep(2 * BEAT_S)  # the others write theirs
        places = {self.name: here} | {peer.name: peer.place for peer in self._peers}
        slowest = min(places, key=lambda name: places[name][:2])
        if place := places[slowest]:
            slowest += (
                f", whose last sign was the end of {place[2]!r} after {place[0]} steps of this "
                "start"
            )
        self._end(
            f"stalled: nothing has moved for {seconds:.0f} s, {self.patience_s():.0f} s are "
            f"allowed; slowest is {slowest}; the stacks of all ranks are in "
            f"{self.run_dir / LOGS_NAME}"
        )

    def _write_stacks(self) -> None:
        """What all threads of this rank are doing, appended to its log."""
        path = log_path(self.run_dir, self.world.rank)
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            print(f"\n{header(self.name)}", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)

    def _what_killed_it(self) -> str:
        """Why a process may have ended without a word. To read behind the end of a truncated
        file is deadly, too.
        """
        found: list[str] = []
        look = threading.Thread(target=lambda: found.extend(self.find_damage()), daemon=True)
        look.start()
        look.join(CAUSE_S)  # the data may lie on what is lost
        return "; ".join(["killed, or its machine failed", *found])

    def _end(self, why: str, code: int = EXIT_CODE) -> None:
        """End this process, and before it all peers that still listen; unless it is ending."""
        if not self._ending.acquire(blocking=False):
            return
        self._send("end", why, code)
        # Or else, where rank 0 is gone, too many speak.
        if self.world.rank in (0, 1) or self.world.local_rank == 0:
            with unheard():
                print(f"error: {why}", file=sys.stderr, flush=True)
        note = threading.Thread(target=self.note_failure, args=(self.run_dir, why), daemon=True)
        note.start()
        note.join(CAUSE_S)  # the run's directory may be what is lost
        os._exit(code)

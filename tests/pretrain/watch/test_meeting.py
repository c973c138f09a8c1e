"""The door of the watch: ranks come in by their proof, whatever else connects is dropped, and
holds nobody up.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from support.forked_ranks import arguments_of, be_a_rank, end_of, logs_of, start_ranks
from support.runs import write_recipe

from pretrain.distributed.world import World
from pretrain.watch import meeting as watch_meeting
from pretrain.watch.meeting import (
    ANSWER_BYTES,
    EVERY_ADDRESS,
    LOOPBACK,
    Reception,
    choose_address,
    connect,
    listen,
    meeting_address,
    proof,
    rank_in_bytes,
)

KEY, ANOTHER_KEY = b"k" * 32, b"a" * 32
RUBBISH = (
    b"",
    b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the beginning of a TLS handshake
    b"SSH-2.0-scanner\r\n",
    b"\x00",
    bytes(ANSWER_BYTES),
    b"\xff" * ANSWER_BYTES,
    b"\xff" * (1 << 20),
)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    opened, _ = listen(LOOPBACK, 4)
    with opened:
        yield opened


def where(listener: socket.socket) -> tuple[str, int]:
    address, port = listener.getsockname()[:2]
    return address, port


def in_background(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def connect_soon(
    listener: socket.socket, rank: int, found: dict[int, object], after_s: float = 0.0
) -> None:
    """Have a rank connect, as it does in its own process."""

    def body() -> None:
        time.sleep(after_s)
        found[rank] = connect(where(listener), KEY, rank, 20)

    in_background(body)


def send_and_stay(to: tuple[str, int], content: bytes, stack: ExitStack) -> None:
    stranger = stack.enter_context(socket.create_connection(to))
    with suppress(OSError):  # it may be dropped before it has said all
        stranger.sendall(content)


def test_ranks_come_in_by_their_proof_and_speak_with_rank_0(listener: socket.socket) -> None:
    strangers: list[tuple[str, str]] = []
    reception = Reception(listener, KEY, {1, 2, 3}, lambda *dropped: strangers.append(dropped))
    found: dict[int, object] = {}
    for rank in (3, 1, 2):
        connect_soon(listener, rank, found)
    reception.receive(20)
    assert (reception.awaited, sorted(reception.arrived), strangers) == (set(), [1, 2, 3], [])
    for rank, connection in reception.arrived.items():
        connection.send_bytes(b"to %d" % rank)
        while rank not in found:
            time.sleep(0.01)
        assert found[rank].recv_bytes() == b"to %d" % rank  # type: ignore[attr-defined]


def test_strangers_that_send_rubbish_close_or_stay_silent_hold_no_rank_up(
    listener: socket.socket,
) -> None:
    strangers: list[str] = []
    reception = Reception(listener, KEY, {1}, lambda _, why: strangers.append(why))
    found: dict[int, object] = {}
    with ExitStack() as stack:
        for content in RUBBISH:
            send_and_stay(where(listener), content, stack)
        socket.create_connection(where(listener)).close()
        connect_soon(listener, 1, found, after_s=0.3)
        reception.receive(20)
        assert (reception.awaited, list(reception.arrived)) == (set(), [1])
    assert len(strangers) == len(RUBBISH) + 1
    assert set(strangers) >= {
        "what it sent is no proof",
        "closed without a proof",
        "all ranks have come",
    }


def test_a_silent_one_is_dropped_when_its_time_is_up_and_a_slow_drip_of_bytes_gains_none(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_meeting, "PROOF_S", 0.4)
    strangers: list[str] = []
    reception = Reception(listener, KEY, {1}, lambda _, why: strangers.append(why))
    with ExitStack() as stack:
        send_and_stay(where(listener), b"", stack)
        dripping = stack.enter_context(socket.create_connection(where(listener)))

        def drip() -> None:
            with suppress(OSError):
                for _ in range(50):
                    dripping.sendall(b"x")
                    time.sleep(0.1)

        in_background(drip)
        reception.receive(2)
    assert strangers == ["silent for 0 s", "silent for 0 s"]
    assert reception.awaited == {1}


@pytest.mark.parametrize(
    ("key", "rank", "why"),
    [
        (ANOTHER_KEY, 1, "what it sent is no proof"),
        (KEY, 0, "rank 0 is not awaited"),
        (KEY, 7, "rank 7 is not awaited"),
        (KEY, 2**32 - 1, "rank 4294967295 is not awaited"),
    ],
    ids=["another key", "rank 0", "no rank of the run", "the largest number"],
)
def test_another_run_s_key_or_a_rank_that_is_not_awaited_is_a_stranger(
    key: bytes, rank: int, why: str, listener: socket.socket
) -> None:
    strangers: list[str] = []
    reception = Reception(listener, KEY, {1}, lambda _, why: strangers.append(why))
    failures: list[OSError] = []

    def body() -> None:
        try:
            connect(where(listener), key, rank, 5)
        except OSError as error:
            failures.append(error)

    stranger = in_background(body)
    reception.receive(1)
    stranger.join(10)
    assert (strangers, len(failures)) == ([why], 1)
    assert reception.awaited == {1}


def test_a_proof_for_another_challenge_is_none(listener: socket.socket) -> None:
    strangers: list[str] = []
    reception = Reception(listener, KEY, {1}, lambda _, why: strangers.append(why))
    seen_before = rank_in_bytes(1) + bytes(32) + proof(KEY, b"rank", bytes(32), rank_in_bytes(1))
    with ExitStack() as stack:
        send_and_stay(where(listener), seen_before, stack)
        reception.receive(1)
    assert strangers == ["what it sent is no proof"]


def test_more_strangers_than_may_wait_leave_room_for_the_rank(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_meeting, "MOST_GUESTS", 3)
    strangers: list[str] = []
    reception = Reception(listener, KEY, {1}, lambda _, why: strangers.append(why))
    with ExitStack() as stack:
        for _ in range(12):
            send_and_stay(where(listener), b"", stack)
        connect_soon(listener, 1, {})
        reception.receive(20)
    assert reception.awaited == set()
    assert strangers.count("too many at a time") >= 8


def test_what_listens_in_rank_0_s_place_is_not_taken_for_it(listener: socket.socket) -> None:
    def answer() -> None:
        accepted, _ = listener.accept()
        accepted.sendall(bytes(32))
        accepted.recv(ANSWER_BYTES)
        accepted.sendall(bytes(32))

    in_background(answer)
    with pytest.raises(ConnectionError, match="is not rank 0 of this start"):
        connect(where(listener), KEY, 1, 10)


def test_a_rank_does_not_wait_for_a_silent_rank_0_for_ever(listener: socket.socket) -> None:
    with pytest.raises(TimeoutError):
        connect(where(listener), KEY, 1, 0.3)


def test_it_listens_where_the_ranks_met_and_on_one_machine_on_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = World(rank=0, world_size=2, local_rank=0, local_world_size=2)
    two = World(rank=0, world_size=2, local_rank=0, local_world_size=1)
    monkeypatch.setenv("MASTER_ADDR", "10.9.8.7")
    assert (meeting_address(one), meeting_address(two)) == (LOOPBACK, "10.9.8.7")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert meeting_address(two) in ("127.0.0.1", "::1")
    assert choose_address(["127.0.1.1", "10.0.0.1"]) == "10.0.0.1"
    assert choose_address(["127.0.0.1", "127.0.0.1"]) == "127.0.0.1"
    assert choose_address(["localhost", "node1"]) == "node1"
    for address in (LOOPBACK, "::1"):
        if address == LOOPBACK or socket.has_ipv6:
            with suppress(OSError):
                opened, found = listen(address, 1)
                with opened:
                    assert opened.getsockname()[0] == address or found == EVERY_ADDRESS
    opened, found = listen("192.0.2.1", 1)  # an address of documentation, nobody's
    with opened:
        assert found == EVERY_ADDRESS


def be_a_rank_among_strangers(arguments: list[str], variables: dict[str, str], log: Path) -> None:
    """Body of a forked rank that leaves its port's number, and connects only when strangers
    have.
    """
    from pretrain.watch import watch

    honest_listen, honest_connect = watch.listen, watch.connect

    def listen_and_tell(address: str, ranks: int) -> tuple[socket.socket, str]:
        opened, found = honest_listen(address, ranks)
        Path(variables["MARK"], "port").write_text(json.dumps(opened.getsockname()[:2]))
        return opened, found

    def connect_late(there: tuple[str, int], key: bytes, rank: int, seconds: float) -> object:
        while not Path(variables["MARK"], "strangers").exists():
            time.sleep(0.02)
        return honest_connect(there, key, rank, seconds)

    watch.listen = listen_and_tell
    watch.connect = connect_late  # type: ignore[assignment]
    be_a_rank(arguments, variables, log)


def test_a_run_among_strangers_starts_trains_and_says_so_once(
    tiny_data: Path, tmp_path: Path
) -> None:
    recipe, run_dir = (
        write_recipe(tmp_path / "recipe.yaml", train_tokens=4 * 6 * 32),
        tmp_path / "run",
    )
    logs, port = logs_of(2, run_dir), tmp_path / "port"
    arguments = arguments_of(recipe, tiny_data, run_dir)
    processes = start_ranks(arguments, logs, be_a_rank_among_strangers, MARK=str(tmp_path))
    with ExitStack() as stack:
        while not (port.exists() and port.read_text().endswith("]")):
            assert all(process.is_alive() for process in processes), logs[0].read_text()
            time.sleep(0.02)
        address, number = json.loads(port.read_text())
        assert address == LOOPBACK
        for content in RUBBISH:
            send_and_stay((address, number), content, stack)
        (tmp_path / "strangers").touch()
        ended = end_of(processes, logs)
        assert ended.exit_codes == [0, 0], ended.output
        with pytest.raises(OSError, match="refused"):  # nobody listens there any more
            socket.create_connection((address, number), timeout=5)
    assert (
        ended.output.count("note: dropped a connection from 127.0.0.1 that is no rank of this run")
        == 1
    )
    assert json.loads((run_dir / "state.json").read_text())["status"] == "done"
    assert os.listdir(run_dir / "checkpoints")

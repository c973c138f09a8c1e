"""Where ranks of a step of Slurm meet; with the real Slurm: tests/launch/test_srun.py."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.slurm.step import Step
from pretrain.distributed.addresses import own_address
from pretrain.distributed.devices import threads_of_rank
from pretrain.distributed.rendezvous import choose_for_step
from pretrain.distributed.slurm import (
    check_port_is_free,
    first_node,
    meeting_host,
    meeting_port,
)
from pretrain.distributed.world import World

FIRST_PORT_OF_CONNECTIONS = 32_768  # Linux's usual ip_local_port_range begins here


def step_of(
    *, task: int = 0, nodes: str = "n[1-2]", job: int = 17, number: int = 0, local_cpus: int = 0
) -> Step:
    """A task of two nodes of two tasks each."""
    node, local_task = divmod(task, 2)
    return Step(
        job=job,
        number=number,
        tasks=4,
        task=task,
        local_tasks=2,
        local_task=local_task,
        local_cpus=local_cpus,
        node=node,
        nodes=nodes,
    )


@pytest.mark.parametrize(
    ("nodes", "name"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("n[01-03,7],m1", "n01"),
        ("gpu-a[003,5]-ib", "gpu-a003-ib"),
        ("login.example,n[1-2]", "login.example"),
    ],
)
def test_the_first_node_of_a_list_as_slurm_writes_it(nodes: str, name: str) -> None:
    assert first_node(nodes) == name


def test_steps_and_jobs_that_follow_one_another_meet_at_ports_of_their_own() -> None:
    ports = [
        meeting_port(step_of(job=job, number=number)) for job in range(500) for number in range(16)
    ]
    assert len(set(ports)) == len(ports)
    assert min(ports) >= 20_000
    late = meeting_port(step_of(job=67_108_863, number=4_000))
    assert max(*ports, late) < FIRST_PORT_OF_CONNECTIONS


def test_ranks_of_one_node_meet_at_loopback() -> None:
    step = replace(step_of(nodes="nowhere1", task=1), tasks=2)
    assert meeting_host(step) == "127.0.0.1"


def test_a_node_s_own_name_that_leads_to_loopback_is_passed_over_on_that_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # and Slurm can't be asked
    assert meeting_host(step_of(nodes="localhost")) == own_address()
    with pytest.raises(UserError, match="no address of localhost"):
        meeting_host(step_of(nodes="localhost", task=2))


def test_a_node_without_an_address_is_named_with_what_to_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no address of nowhere1, .* type MASTER_ADDR=ADDRESS"):
        meeting_host(step_of(nodes="nowhere1,m1"))


def test_rank_0_on_another_than_the_first_node_is_refused() -> None:
    astray = replace(step_of(), node=1)
    with pytest.raises(UserError, match=r"rank 0 is not on the first node of n\[1-2\]"):
        meeting_host(astray)


def test_a_busy_port_is_named_by_rank_0_with_what_to_type() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} of .* type MASTER_PORT=NUMBER"):
            check_port_is_free(step_of(), port)
        check_port_is_free(step_of(task=1), port)
    check_port_is_free(step_of(), port)


def test_what_a_user_has_set_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "10.1.2.3")
    monkeypatch.setenv("MASTER_PORT", "29123")
    choose_for_step(step_of(nodes="nowhere1", task=3))


def test_a_rank_that_is_bound_to_cores_of_its_own_uses_them_all() -> None:
    cores = len(os.sched_getaffinity(0))

    def threads(local_cpus: int) -> int:
        world = World(
            rank=1,
            world_size=4,
            local_rank=1,
            local_world_size=2,
            step=step_of(task=1, local_cpus=local_cpus),
        )
        return threads_of_rank(world)

    assert threads(2 * cores) == cores
    assert threads(cores) == max(1, cores // 2)
    assert threads(0) == max(1, cores // 2)  # Slurm does not say

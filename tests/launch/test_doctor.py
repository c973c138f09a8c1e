"""`python -m launch.doctor`: each fault is found by name, on nodes in miniature and from facts."""

import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cluster.nodes import Node, cluster, lacking
from support.runs import REPOSITORY, run_command

from launch.doctor.ask import Asked, ask, read_facts
from launch.doctor.probe import NOT_EXCLUDED, Facts, stale_locks, try_lock, write_speed
from launch.doctor.verdicts import State, Verdict, judge, parse_gpus

DOCTOR = (sys.executable, "-m", "launch.doctor")
needs_nodes = pytest.mark.skipif(
    bool(lacking()), reason=f"no nodes in miniature: this machine {lacking()}"
)
NODES = ("node1", "node2", "node3")


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    with cluster(nodes=3) as found:
        yield found


@pytest.fixture(scope="module")
def here() -> Facts:
    """What this machine says."""
    [facts] = ask([""], "", None, measure_disk=False).facts.values()
    return facts


def healthy(here: Facts) -> Asked:
    """Three machines like this one, between which nothing differs."""
    addresses = {name: f"10.0.0.{number}" for number, name in enumerate(NODES, 1)}
    facts = {
        name: dataclasses.replace(
            here, host=name, addresses=addresses, note="n", lock="excluded", changed_files=0,
            ranks=[], stale_locks={}, free_mib=1 << 20, data="d", tokenizer="t",
        )
        for name in NODES
    }  # fmt: skip
    return Asked(list(NODES), facts, {}, "n", here.time_s, here.time_s, "data")


def bad(verdicts: list[Verdict]) -> list[tuple[str, str, State]]:
    limits = {"memory", "/dev/shm", "open files", "maps"}  # this machine's own
    return [
        (v.check, v.host, v.state)
        for v in verdicts
        if v.state is not State.GOOD and v.check not in limits
    ]


@pytest.mark.parametrize(
    ("change", "check", "state"),
    [
        ({"code": "other"}, "code", State.MEND),
        ({"changed_files": 2}, "commit", State.WARNING),
        ({"python": "3.9.1"}, "Python", State.MEND),
        ({"packages": {}}, "packages", State.MEND),
        ({"gpus": "NVIDIA H100, 550.54.15, 0"}, "GPUs", State.MEND),
        ({"data": "other"}, "data set", State.MEND),
        ({"tokenizer": ""}, "tokenizer", State.MEND),
        ({"note": ""}, "shared", State.MEND),
        ({"lock": NOT_EXCLUDED}, "locks", State.MEND),
        ({"lock": "No locks available"}, "locks", State.WARNING),
        ({"free_mib": 3}, "disk", State.MEND),
        ({"time_s": 0.0}, "clock", State.WARNING),
        ({"ranks": [7]}, "ranks", State.WARNING),
        ({"stale_locks": {"/c/lock": 601}}, "JIT locks", State.MEND),
    ],
)
def test_what_differs_on_one_machine_is_found_there_and_nothing_else(
    here: Facts, change: dict[str, object], check: str, state: State
) -> None:
    asked = healthy(here)
    assert bad(judge(asked)) == []
    asked.facts["node2"] = dataclasses.replace(asked.facts["node2"], **change)  # type: ignore[arg-type]
    assert bad(judge(asked)) == [(check, "node2", state)]


def test_a_package_of_another_version_is_named_with_both(here: Facts) -> None:
    asked = healthy(here)
    other = {**here.packages, "numpy": "0.1"}
    asked.facts["node3"] = dataclasses.replace(asked.facts["node3"], packages=other)
    [row] = [v for v in judge(asked) if v.check == "packages"]
    assert row.found == f"numpy 0.1, most have {here.packages['numpy']}"


def test_what_nvidia_smi_prints_is_read() -> None:
    text = "NVIDIA H200, 550.54.15, 0\nNVIDIA H200, 550.54.15, 2\nTesla T4, 550.54.15, [N/A]\n"
    assert parse_gpus(text) == (["NVIDIA H200 driver 550.54.15", "Tesla T4 driver 550.54.15"], 2)
    assert parse_gpus("NVIDIA-SMI has failed, because it couldn't, and so on, ...") == ([], 0)


def test_facts_are_read_from_lines_with_the_name_of_a_host_before_them(here: Facts) -> None:
    said = json.dumps(dataclasses.asdict(here))
    assert read_facts(f"node1: Welcome {{all}}\nnode1: {said}\n") == {here.host: here}


def test_locks_are_seen_held_and_free(tmp_path: Path) -> None:
    path = tmp_path / "note"
    path.touch()
    assert try_lock(path) == NOT_EXCLUDED
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert try_lock(path) == "excluded"


def test_a_lock_that_an_extensions_build_left_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "cpu_adam" / "lock"
    path.parent.mkdir()
    path.touch()
    now = time.time()
    os.utime(path, (now - 1000, now - 1000))
    assert stale_locks(now) == {str(path): 1000}


def test_this_machine_alone_by_the_command(tmp_path: Path, tiny_data: Path) -> None:
    where = ["--data-dir", str(tiny_data), "--run-dir", str(tmp_path / "new" / "run")]
    result = run_command(*DOCTOR, *where, "--json", cwd=tmp_path)
    verdicts = json.loads(result.stdout)
    assert result.returncode == any(v["state"] == "mend" for v in verdicts), result.stderr
    good = {v["check"] for v in verdicts if v["state"] == "ok"}
    assert {"reachable", "data set", "tokenizer", "shared"} <= good
    assert list(tmp_path.iterdir()) == []  # nothing is left


def test_a_data_set_that_is_none_is_refused(tmp_path: Path) -> None:
    result = run_command(*DOCTOR, "--data-dir", "nowhere", cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "nowhere" in result.stderr


def doctor(node: Node, home: Path, *more: str) -> list[tuple[str, str, str]]:
    """What is wrong, as a node finds it."""
    lines = [f"{name} slots=1\n" for name in NODES]
    (home / "hosts").write_text("".join(lines))
    run = home / "run"
    run.mkdir(exist_ok=True)
    typed = [*DOCTOR, "--hostfile", "hosts", "--json", "--run-dir", str(run), *more]
    result = node.run(shlex.join(typed), home)
    assert result.stdout, result.stderr
    found = [(v["check"], v["host"], v["state"]) for v in json.loads(result.stdout)]
    passing = {"commit", "disk", "memory", "/dev/shm", "open files", "maps", "ranks"}
    assert result.returncode == any(state == "mend" for _, _, state in found)
    return [row for row in found if row[2] != "ok" and (row[2] == "mend" or row[0] not in passing)]


# Debian's installer gives a machine's own name to the loopback, as the cluster does.
LOOPBACK_NAMES = {("names", name, "warning") for name in NODES}


@needs_nodes
def test_healthy_nodes_have_names_of_the_loopback_and_no_other_fault(
    nodes: list[Node], tmp_path: Path
) -> None:
    assert set(doctor(nodes[0], tmp_path)) == LOOPBACK_NAMES


@needs_nodes
def test_faults_of_one_node_are_found_there(
    nodes: list[Node], tmp_path: Path, tiny_data: Path
) -> None:
    """A small disk over the run's directory, other data, other code."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    manifest = data / "manifest.json"
    (tmp_path / "other.json").write_text(manifest.read_text() + "\n")
    (tmp_path / "other.py").write_text("# of another commit\n")
    (tmp_path / "run").mkdir()
    code = REPOSITORY / "launch" / "count_gpus.py"
    spoil = (
        f"mount -t tmpfs -o size=1m none {tmp_path}/run && "
        f"mount --bind other.json {manifest} && mount --bind other.py {code}"
    )
    spoilt = nodes[1].run(spoil, tmp_path)
    assert spoilt.returncode == 0, spoilt.stderr
    try:
        found = doctor(nodes[0], tmp_path, "--quick", "--data-dir", str(data))
    finally:
        mended = nodes[1].run(f"umount {manifest} {code} {tmp_path}/run", tmp_path)
    assert mended.returncode == 0, mended.stderr
    faults = {(check, "node2", "mend") for check in ("shared", "disk", "data set", "code")}
    assert set(found) - LOOPBACK_NAMES == faults


@needs_nodes
def test_a_firewall_between_nodes_that_can_ssh_is_found(nodes: list[Node], tmp_path: Path) -> None:
    rule = "pref 1 ipproto tcp dport 20000-32000 prohibit"
    blocked = nodes[1].run(f"ip rule add {rule}", tmp_path)
    assert blocked.returncode == 0, blocked.stderr
    try:
        found = doctor(nodes[0], tmp_path)
    finally:
        assert nodes[1].run(f"ip rule del {rule}", tmp_path).returncode == 0
    assert set(found) - LOOPBACK_NAMES == {("ports", "node2", "mend")}


@needs_nodes
def test_a_node_that_is_cut_off_is_named(nodes: list[Node], tmp_path: Path) -> None:
    nodes[2].link_down()
    try:
        found = doctor(nodes[0], tmp_path, "--quick")
    finally:
        nodes[2].link_up()
    assert ("reachable", "node3", "mend") in found


def test_a_disk_that_takes_nothing_is_found_by_writing() -> None:
    speed, why = write_speed(Path("/proc"))  # which takes no files
    assert speed is None
    assert why

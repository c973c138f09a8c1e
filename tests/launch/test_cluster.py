"""Training on nodes in miniature, started as on real ones: a hostfile, ssh, and
launch/pretrain.sh.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.cluster.nodes import RANK, Node, cluster, lacking
from support.runs import FIXED_THREADS, REPOSITORY, environment, run_command, write_recipe
from support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    bool(lacking()), reason=f"no nodes in miniature: this machine {lacking()}"
)

HOSTFILE = "node1 slots=1\nnode2 slots=1\n"
REMOTE_ENVIRONMENT = {**FIXED_THREADS, "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "eth0"}
UNTIL_KILLED = """
import sys, time
sys.path[:0] = {paths!r}
from support.cluster.nodes import cluster
with cluster() as nodes:
    print(*(node.first_process for node in nodes), nodes[0].switch, flush=True)
    time.sleep(600)
"""


def traces() -> dict[str, object]:
    """What a cluster could leave behind on this machine, processes aside."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    ssh_files = [
        path for folder in (Path("/etc/ssh"), Path.home() / ".ssh") for path in folder.rglob("*")
    ]
    return {
        "interfaces": os.listdir("/sys/class/net"),
        "mounts": [point for point in points if point.startswith(("/etc", "/run", "/proc"))],
        "named network namespaces": Path("/run/netns").exists() and os.listdir("/run/netns"),
        "ssh": {path: path.stat().st_mtime_ns for path in ssh_files},
        "names": Path("/etc/hosts").read_text(),
        "/run": sorted(os.listdir("/run")),
    }


@pytest.fixture(autouse=True)
def no_traces() -> Iterator[None]:
    before = traces()
    yield
    assert traces() == before


@pytest.fixture
def two_nodes() -> Iterator[list[Node]]:
    with cluster() as nodes:
        yield nodes
        processes = [process for node in nodes for process in node.processes()]
        processes += [
            psutil.Process(pid) for node in nodes for pid in (node.first_process, node.switch)
        ]
    assert not [process for process in processes if process.is_running()]


def write_job(home: Path, hosts: str = HOSTFILE) -> None:
    """What a user of several machines writes: hostfile, and variables for the ranks."""
    (home / "hosts").write_text(hosts)
    lines = [f"{name}={value}\n" for name, value in REMOTE_ENVIRONMENT.items()]
    (home / ".deepspeed_env").write_text("".join(lines))


def pretrain(home: Path, data: Path, run: str, *more: str, **recipe: object) -> str:
    """The command line of a run of the tiny recipe."""
    path = write_recipe(home / f"{run}.yaml", **recipe)
    script = str(REPOSITORY / "launch" / "pretrain.sh")
    return shlex.join(
        [script, "--recipe", str(path), "--data-dir", str(data), "--run-dir", run, *more]
    )


def figures(run_dir: Path) -> list[dict[str, object]]:
    """What a run computed at every step, without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: line[key] for key in ("step", "loss", "grad_norm", "val_loss") if key in line}
        for line in lines
    ]


def test_two_nodes_train_bit_for_bit_what_one_node_of_two_ranks_trains(
    two_nodes: list[Node], tiny_data: Path, tmp_path: Path
) -> None:
    write_job(tmp_path)
    result = two_nodes[0].run(pretrain(tmp_path, tiny_data, "two", "--hostfile", "hosts"), tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    one = run_command(
        *shlex.split(pretrain(tmp_path, tiny_data, "one", "--ranks", "2")), cwd=tmp_path
    )
    assert one.returncode == 0, one.stderr
    assert len(figures(tmp_path / "two")) == 20
    assert figures(tmp_path / "two") == figures(tmp_path / "one")
    saved = sorted((tmp_path / "one" / "checkpoints").rglob("*.safetensors"))
    assert len({path.name for path in saved}) == 2  # of each rank
    for path in saved:
        assert (
            tmp_path / "two" / path.relative_to(tmp_path / "one")
        ).read_bytes() == path.read_bytes()


def test_a_killed_launcher_leaves_no_rank_on_any_node(
    two_nodes: list[Node], tiny_data: Path, tmp_path: Path
) -> None:
    write_job(tmp_path)
    command = pretrain(
        tmp_path, tiny_data, "run", "--hostfile", "hosts", train_tokens=20_000 * 6 * 32
    )
    launcher = two_nodes[0].start(command, tmp_path, log=tmp_path / "log")
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(
        lambda: (
            launcher.poll() is not None or (metrics.exists() and bool(figures(tmp_path / "run")))
        ),
        "a step",
    )
    assert launcher.poll() is None, (tmp_path / "log").read_text()
    assert [len(node.processes(RANK)) for node in two_nodes] == [1, 1]
    # as by the kernel when memory runs out, or with the terminal
    two_nodes[0].kill(r"bin/deepspeed |^pdsh|^ssh ")
    wait_until(
        lambda: not any(node.processes() for node in two_nodes),
        "every process on both nodes to end",
        10,
    )
    assert launcher.wait() != 0


def test_a_hostfile_of_one_host_trains_there_and_not_here(
    two_nodes: list[Node], tiny_data: Path, tmp_path: Path
) -> None:
    write_job(tmp_path, "node2 slots=1\n")
    result = two_nodes[0].run(
        pretrain(tmp_path, tiny_data, "run", "--hostfile", "hosts", "--dry-run"), tmp_path
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "node2: # recipe, resolved" in result.stdout


def test_a_host_that_cannot_take_part_is_one_clear_line(
    two_nodes: list[Node], tiny_data: Path, tmp_path: Path
) -> None:
    node1, node2 = two_nodes
    command = pretrain(tmp_path, tiny_data, "run", "--hostfile", "hosts")

    def refusal(hosts: str) -> str:
        write_job(tmp_path, hosts)
        result = node1.run(command, tmp_path)
        assert (result.returncode, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1
        return result.stderr

    assert refusal("# mine\n\nnode1 slots=1\nnode2\n").startswith(
        "error: --hostfile hosts: line 4: node2: expected"
    )
    assert refusal("# none yet\n").startswith("error: --hostfile hosts: names no host")
    assert "Could not resolve hostname node9" in refusal("node1 slots=1\nnode9 slots=1\n")
    node2.run(f"mount -t tmpfs tmpfs {tmp_path.parent}", cwd=Path("/"))
    assert f"node2: ls: cannot access '{tmp_path}'" in refusal(HOSTFILE)


def test_what_one_host_alone_cannot_use_ends_the_job_on_all_with_one_line_that_names_the_host(
    two_nodes: list[Node], tiny_data: Path, tmp_path: Path
) -> None:
    write_job(tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    two_nodes[1].run(f"mount -t tmpfs -o size=16k tmpfs {scratch}", cwd=Path("/"))
    command = pretrain(
        tmp_path, tiny_data, "run", "--hostfile", "hosts", f"--data.stage_dir={scratch}"
    )
    began = time.monotonic()
    result = two_nodes[0].run(command, tmp_path)
    assert time.monotonic() - began < 60
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = [line for line in (result.stdout + result.stderr).splitlines() if "error" in line]
    assert line.startswith(f"node1: error: on node2: data.stage_dir {scratch}: "), line
    assert "make room, give a larger disk" in line
    assert not [process for node in two_nodes for process in node.processes(RANK)]
    assert not (tmp_path / "run").exists()


def test_a_host_that_is_cut_off_is_left_out_and_takes_part_again_when_it_is_back(
    two_nodes: list[Node], tiny_data: Path, tmp_path: Path
) -> None:
    node1, node2 = two_nodes
    # a step of three windows divides over 3 ranks or 1
    write_job(tmp_path, "node1 slots=2\nnode2 slots=1\n")
    recipe = {"batch": {"global_batch_tokens": 3 * 32}, "train_tokens": 20_000 * 3 * 32}
    typed = pretrain(
        tmp_path, tiny_data, "run", "--hostfile", "hosts", "--max-restarts", "2", **recipe
    )
    log, metrics = tmp_path / "log", tmp_path / "run" / "metrics.jsonl"

    def wait_for_steps(more_than: bytes) -> None:
        def is_there() -> bool:
            trained = (
                metrics.exists()
                and len(figures(tmp_path / "run")) > 5
                and metrics.read_bytes() != more_than
            )
            return script.poll() is not None or trained

        wait_until(is_there, "steps", 300)
        assert script.poll() is None, log.read_text()

    node2.link_down()
    script = node1.start(typed, tmp_path, log)
    wait_for_steps(b"")
    assert "run: left out node2 (node2: ssh: " in log.read_text()
    assert "run: only 1 of the 2 ranks left take part" in log.read_text()
    assert (tmp_path / "run" / "hostfile").read_text() == "node1 slots=1\n"
    assert [len(node.processes(RANK)) for node in two_nodes] == [1, 0]
    node2.link_up()
    node1.kill(RANK)
    wait_until(lambda: "restart 1 continues from step" in log.read_text(), "a restart", 300)
    assert "on 3 ranks\n" in log.read_text()
    wait_until(
        lambda: [len(node.processes(RANK)) for node in two_nodes] == [2, 1],
        "ranks on both nodes",
        300,
    )
    wait_for_steps(metrics.read_bytes())
    node1.kill(r"supervise\.py", signal.SIGTERM)
    assert script.wait(120) == 0, log.read_text()
    assert json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "preempted"
    assert not [process for node in two_nodes for process in node.processes()]


class LongRun:
    """A run of both nodes that saves often and goes on until it is told to end."""

    def __init__(self, nodes: list[Node], data: Path, home: Path) -> None:
        self.nodes, self.home, self.log = nodes, home, home / "log"
        write_job(home)
        recipe: dict[str, Any] = {
            "train_tokens": 10**5 * 6 * 32,
            "checkpoints": {"every_steps": 20},
        }
        recipe["validation"] = {"every_steps": 10**6}
        self.typed = pretrain(
            home, data, "run", "--hostfile", "hosts", "--max-restarts", "1", **recipe
        )
        self.start()

    def start(self) -> None:
        """Type the command at node1, and wait for steps."""
        self.script = self.nodes[0].start(self.typed, self.home, self.log)
        self.wait_for_steps()

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, timeout_s: float) -> None:
        wait_until(
            lambda: text in self.said() or self.script.poll() is not None,
            f"{text!r} in the log",
            timeout_s,
        )
        assert text in self.said(), self.said()

    def wait_for_steps(self) -> None:
        """Until 30 more were trained."""
        starts = self.home / "run" / "starts.jsonl"  # a line of each start that trained
        before = len(starts.read_text().splitlines()) if starts.exists() else 0

        def are_there() -> bool:
            lines = starts.read_text().splitlines() if starts.exists() else []
            trained = (
                len(lines) > before
                and len(figures(self.home / "run")) > json.loads(lines[-1])["step"] + 30
            )
            return self.script.poll() is not None or trained

        wait_until(are_there, "steps", 300)
        assert self.script.poll() is None, self.said()

    def ranks(self) -> list[int]:
        return [len(node.processes(RANK)) for node in self.nodes]

    def end(self) -> None:
        """As Slurm would, and see that all is well."""
        self.nodes[0].kill(r"supervise\.py", signal.SIGTERM)
        assert self.script.wait(120) == 0, self.said()
        assert json.loads((self.home / "run" / "state.json").read_text())["status"] == "preempted"
        steps = [line["step"] for line in figures(self.home / "run")]
        assert steps == list(range(len(steps)))
        assert not [
            process for node in self.nodes for process in node.processes(r"pretrain|deepspeed")
        ]


@pytest.mark.slow
def test_a_node_cut_off_ends_the_job_everywhere_and_it_goes_on_with_what_is_left_then_with_both(
    two_nodes: list[Node], tiny_data: Path, tmp_path: Path
) -> None:
    run = LongRun(two_nodes, tiny_data, tmp_path)
    assert run.ranks() == [1, 1]
    began = time.monotonic()
    two_nodes[1].link_down()
    run.wait_for("failed: ", 60)
    wait_until(
        lambda: run.ranks()[1] == 0,
        "the rank that is cut off to end",
        60 - (time.monotonic() - began),
    )
    assert "failed: rank 1 (node2) has not answered for 30 s; restart 1 of 1 in " in run.said(), (
        run.said()
    )
    run.wait_for("left out node2", 120)
    run.wait_for_steps()
    assert run.ranks() == [1, 0]
    run.end()
    two_nodes[1].link_up()
    run.start()
    assert run.ranks() == [1, 1]
    assert "continuing from" in run.said()
    run.end()


def test_a_rank_killed_on_one_node_in_mid_run_ends_the_job_on_both_and_it_goes_on(
    two_nodes: list[Node], tiny_data: Path, tmp_path: Path
) -> None:
    run = LongRun(two_nodes, tiny_data, tmp_path)
    two_nodes[1].kill(RANK)
    run.wait_for("failed: ", 60)
    assert (
        "failed: rank 1 (node2) is gone: killed, or its machine failed; restart 1 of 1 in "
        in run.said()
    )
    run.wait_for("restart 1 continues from step-", 60)
    run.wait_for_steps()
    assert run.ranks() == [1, 1]
    run.end()


def test_a_signal_to_the_script_on_a_machine_that_trains_nothing_ends_the_run_well(
    two_nodes: list[Node], tiny_data: Path, tmp_path: Path
) -> None:
    node1 = two_nodes[0]
    write_job(tmp_path, "node2 slots=2\n")
    typed = pretrain(
        tmp_path, tiny_data, "run", "--hostfile", "hosts", train_tokens=20_000 * 6 * 32
    )
    script, metrics = (
        node1.start(typed, tmp_path, tmp_path / "log"),
        tmp_path / "run" / "metrics.jsonl",
    )
    wait_until(
        lambda: script.poll() is not None or (metrics.exists() and bool(figures(tmp_path / "run"))),
        "a step",
    )
    assert [len(node.processes(RANK)) for node in two_nodes] == [0, 2]
    node1.kill(r"supervise\.py", signal.SIGTERM)
    assert script.wait(120) == 0, (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "preempted"
    assert not [process for node in two_nodes for process in node.processes()]


def test_a_signal_while_only_a_part_of_the_ranks_has_come_ends_the_script_at_once(
    two_nodes: list[Node], tiny_data: Path, tmp_path: Path
) -> None:
    write_job(tmp_path)
    log = tmp_path / "log"
    script = two_nodes[0].start(
        pretrain(tmp_path, tiny_data, "run", "--hostfile", "hosts"), tmp_path, log
    )
    launchers = r"deepspeed\.launcher\.launch"
    wait_until(lambda: bool(two_nodes[1].processes(launchers)), "the other node's launcher")
    two_nodes[1].kill(launchers, signal.SIGSTOP)
    wait_until(lambda: bool(two_nodes[0].processes(RANK)), "the first node's rank")
    assert not two_nodes[1].processes(RANK)
    two_nodes[0].kill(r"supervise\.py", signal.SIGTERM)
    two_nodes[1].kill(launchers, signal.SIGCONT)
    assert script.wait(60) == 128 + signal.SIGTERM, log.read_text()
    assert "ended by SIGTERM" in log.read_text()
    wait_until(
        lambda: not any(node.processes() for node in two_nodes),
        "every process on both nodes to end",
        10,
    )


def test_a_node_can_be_cut_off_and_comes_back(two_nodes: list[Node], tmp_path: Path) -> None:
    node1, node2 = two_nodes
    ask = "ssh -o ConnectTimeout=1 node2 hostname"
    assert node1.run(ask, tmp_path).stdout == "node2\n"
    node2.link_down()
    assert node1.run(ask, tmp_path).returncode == 255
    node2.link_up()
    assert node1.run(ask, tmp_path).stdout == "node2\n"
    wait_until(lambda: not node2.processes(), "the sshd of the last one to end", 10)
    assert "10.0.0.2" in node2.run("hostname -I", tmp_path).stdout


def test_nothing_outlives_a_test_that_fails() -> None:
    def fail() -> None:
        with cluster(nodes=3) as nodes:
            node = nodes[2]
            node.run("setsid nohup sleep 600 > /dev/null 2>&1 &", Path("/"))
            wait_until(
                lambda: [process.name() for process in node.processes()] == ["sleep"],
                "it to be there",
                10,
            )
            left.extend(
                [*node.processes(), *(psutil.Process(node.first_process) for node in nodes)]
            )
            raise ZeroDivisionError

    left: list[psutil.Process] = []
    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(left) == 4
    assert not [process for process in left if process.is_running()]


def test_nothing_outlives_a_killed_test() -> None:
    code = UNTIL_KILLED.format(paths=[str(REPOSITORY / "tests")])
    test = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert test.stdout
    left = [psutil.Process(int(pid)) for pid in test.stdout.readline().split()]
    assert len(left) == 3
    test.send_signal(signal.SIGKILL)
    test.communicate()
    wait_until(lambda: not any(process.is_running() for process in left), "the nodes to end", 10)

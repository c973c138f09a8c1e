"""W&B, offline: each start that goes on is a run that names the one before; no key leaves it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.forked_ranks import arguments_of
from support.runs import environment, run_command, steps_of, write_recipe
from support.sink_readers import read_wandb

KEY = "0123456789" * 4  # of the form of a key of W&B

# In a process of its own: W&B asks for its variables once.
PROGRAM = """
import sys
from pathlib import Path
from support.hand_made_runs import trained_step
from pretrain.metrics.told import AboutRun, told
from pretrain.metrics.wandb_sink import WandbSink
run_dir, *starts = sys.argv[1:]
about = AboutRun(
    run_dir=Path(run_dir), config={"seed": 1}, restarts=frozenset(), bytes_per_token=None
)
for number, start in enumerate(starts, start=1):
    begin, past_last = map(int, start.split("-"))
    sink = WandbSink(about)
    for step in range(sink.begin(begin), past_last):
        sink.write(told(trained_step(step, float(number)), about))
    sink.close()
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of three starts."""
    home = tmp_path_factory.mktemp("wandb")
    (home / "run").mkdir()
    variables = {
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": KEY,
        "HOME": str(home),
        "PYTHONPATH": environment()["PYTHONPATH"] + os.pathsep + str(Path(__file__).parents[2]),
    }
    starts = ("0-8", "5-9", "9-10")
    result = run_command(sys.executable, "-c", PROGRAM, f"{home}/run", *starts, **variables)
    assert result.returncode == 0, result.stderr
    assert KEY not in result.stdout + result.stderr
    return home / "run"


def test_each_start_is_a_run_of_all_steps_that_names_the_one_before(run_dir: Path) -> None:
    runs = read_wandb(run_dir)
    drawn = [run.figures["train/loss"] for run in runs]
    assert drawn == [
        list(enumerate([float(n)] * length)) for n, length in ((1, 8), (2, 9), (3, 10))
    ]
    names = [json.loads(run.config).get("continues") for run in runs]
    assert names == [None, runs[0].name, runs[1].name]


def test_the_key_is_in_no_file(run_dir: Path) -> None:
    files = [path for path in run_dir.parent.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_neither_host_nor_command_line_is_told(run_dir: Path) -> None:
    told_of_machine = {"wandb-metadata.json", "diff.patch", "output.log"}
    assert not [path for path in run_dir.rglob("*") if path.name in told_of_machine]
    for directory in (run_dir / "wandb").glob("offline-run-*"):
        shown = run_command("wandb", "leet", "inspect", "--json", str(directory)).stdout
        assert '"host":"not told"' in shown


def test_wandb_itself_shows_the_newest_run(run_dir: Path) -> None:
    """The command of the README."""
    result = run_command("wandb", "leet", "inspect", "--summary", str(run_dir / "wandb"))
    assert result.returncode == 0, result.stderr
    assert read_wandb(run_dir)[-1].name in result.stdout
    assert "train/loss" in result.stdout


def test_without_a_key_nobody_is_asked_for_one_and_the_run_goes_on(
    tiny_data: Path, tmp_path: Path
) -> None:
    """On a terminal, where W&B would ask."""
    recipe = write_recipe(tmp_path / "recipe.yaml")
    flags = arguments_of(recipe, tiny_data, tmp_path / "run", "--log.sinks=wandb")
    env = environment(HOME=str(tmp_path), WANDB_MODE="online", COLUMNS="200")
    env.pop("WANDB_API_KEY", None)
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "pretrain.train", *flags]
    process = subprocess.Popen(command, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    output = b"".join(read_all(ours)).decode()
    assert process.wait(timeout=60) == 0, output
    said = " ".join(output.split())
    # More than once on the wire: the block keeps warnings in sight whenever it is drawn.
    assert "warning: log.sinks: wandb: UsageError: No API key configured" in said
    assert "Enter your choice" not in said
    assert steps_of(tmp_path / "run") == 20


def read_all(descriptor: int) -> Iterator[bytes]:
    """What comes from a terminal until nobody writes to it any more."""
    while True:
        try:
            content = os.read(descriptor, 4096)
        except OSError:  # what Linux answers then
            break
        yield content
    os.close(descriptor)

"""A run's directory: one trainer at a time, and damaged files named."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.forked_ranks import arguments_of, run_ranks, train_on
from support.hand_made_runs import trained_step
from support.runs import counting_dataset, tiny_recipe_content, write_recipe

from data_prep.errors import UserError
from data_prep.locks import lock
from pretrain.config.load import build_recipe, recipe_to_yaml
from pretrain.config.recipe import Recipe
from pretrain.metrics.metrics_file import METRICS_NAME, MetricsFile
from pretrain.metrics.records import read_lines
from pretrain.run.continuing import check_same_run
from pretrain.run.directory import WRITTEN, Identity
from pretrain.run.first_checks import check_arguments
from pretrain.run.state import RunState, note_failure, read_state, write_state

HOLD = """
import time
from pathlib import Path
from data_prep.locks import lock
held = lock(Path({!r}), "training there", "--run-dir")
print("held", flush=True)
time.sleep(60)
"""


def recipe() -> Recipe:
    return build_recipe(tiny_recipe_content(), "tiny.yaml")


def identity(asked: Recipe) -> Identity:
    return Identity(recipe=asked, engine_config={}, fingerprint="f")


def test_only_one_process_holds_a_directory_and_a_kill_frees_it(tmp_path: Path) -> None:
    code = HOLD.format(str(tmp_path))
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process is training there"):
        lock(tmp_path, "training there", "--run-dir")
    holder.kill()
    holder.wait()
    holder.stdout.close()
    lock(tmp_path, "training there", "--run-dir").close()


@pytest.mark.parametrize(
    "content", ["", "[1]", "{", '{"status": 1}', '{"saved_step": "5"}', '{"began": 1.5}']
)
def test_a_damaged_state_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state\.json: damaged"):
        read_state(tmp_path)


@pytest.mark.parametrize("line", ["[]", "{}", "null", "3", '{"step": "x"}', '{"loss": 1.0}'])
def test_a_line_that_is_no_step_is_a_damaged_file_where_it_is_needed(
    tmp_path: Path, line: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' + line + "\n")
    with pytest.raises(
        UserError, match=r"metrics.jsonl: damaged \(line 2: a line without a step\)"
    ):
        MetricsFile(tmp_path, 2)


def test_lines_that_are_missing_are_counted(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}}}\n' for step in (0, 1, 4, 5))
    )
    assert MetricsFile(tmp_path, 5).lacks == 2


def note(run_dir: Path, rank: int) -> None:
    for number in range(200):
        note_failure(run_dir, f"{rank} {number}")
        if rank == 0:
            write_state(run_dir, status="running")


def test_several_ranks_may_note_a_failure_at_once(tmp_path: Path) -> None:
    write_state(tmp_path, status="running")
    processes = [
        multiprocessing.get_context("fork").Process(target=note, args=(tmp_path, rank))
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        assert read_state(tmp_path).status in ("running", "failed")
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_same_run(tmp_path / "file", identity(recipe()))


def test_state_keeps_what_is_not_changed(tmp_path: Path) -> None:
    assert read_state(tmp_path) == RunState()
    write_state(tmp_path, status="running", fingerprint="f")
    write_state(tmp_path, status="done")
    assert read_state(tmp_path) == RunState(status="done", fingerprint="f")


def test_metrics_are_cut_back_to_the_step_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    whole = "".join(json.dumps({"step": step, "loss": float(step)}) + "\n" for step in range(4))
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 4, "lo')
    assert [line["step"] for line in read_lines(tmp_path / METRICS_NAME)] == [0, 1, 2, 3]
    metrics = MetricsFile(tmp_path, 2)
    metrics.append(trained_step(2, 9.0))
    metrics.close()
    assert [line["loss"] for line in read_lines(tmp_path / METRICS_NAME)] == [0.0, 1.0, 9.0]


def test_a_run_that_has_saved_nothing_may_start_over_with_other_values(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe()))
    other = build_recipe(tiny_recipe_content(seed=2), "tiny.yaml")
    check_same_run(tmp_path, identity(other))


# A directory that is no run's


@pytest.mark.parametrize("name", [*WRITTEN, "checkpoints/latest"])
def test_what_a_run_would_replace_and_did_not_make_is_refused_and_left(
    name: str, tiny_data: Path, tmp_path: Path
) -> None:
    recipe, run_dir = write_recipe(tmp_path / "tiny.yaml"), tmp_path / "run"
    path = run_dir / name
    mine = path / "tokenizer.json" if name == "tokenizer" else path
    mine.parent.mkdir(parents=True)
    mine.write_text('{"mine": 1}\n')
    with pytest.raises(
        UserError, match=f"so {name} is somebody else's and would be replaced; move it away"
    ):
        check_arguments(arguments_of(recipe, tiny_data, run_dir), 1)
    assert [found for found in run_dir.rglob("*") if found.is_file()] == [mine]
    assert mine.read_text() == '{"mine": 1}\n'


def test_a_recipe_in_the_place_of_the_run_s_own_is_refused_by_the_command_with_nothing_written(
    tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    recipe = write_recipe(run_dir / "recipe.yaml")
    before = recipe.read_bytes()
    ended = run_ranks(1, recipe, tiny_data, run_dir)
    assert ended.exit_codes == [2]
    assert "so recipe.yaml is somebody else's" in ended.output
    assert (os.listdir(run_dir), recipe.read_bytes()) == (["recipe.yaml"], before)


def test_a_run_may_begin_beside_what_it_does_not_write_and_goes_on_wherever_it_was_killed(
    tiny_data: Path, tmp_path: Path
) -> None:
    recipe, run_dir = write_recipe(tmp_path / "tiny.yaml"), tmp_path / "run"
    for name in (
        "logs/out.txt",
        "corpus/corpus.txt",
        "dataset/manifest.json",
        "hostfile",
        ".lock",
        "notes.md",
    ):
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text("")
    train_on(1, recipe, tiny_data, run_dir, "--stop-at-step=1")
    for path in [path for name in WRITTEN for path in run_dir.glob(name) if name != "recipe.yaml"]:
        path.rename(tmp_path / path.name)
    arguments = arguments_of(recipe, tiny_data, run_dir)
    check_arguments(arguments, 1)  # its checkpoints are its own
    (run_dir / "checkpoints").rename(tmp_path / "checkpoints")
    check_arguments(arguments, 1)  # so is what a start writes before its state
    (run_dir / "recipe.yaml").write_text("# mine\n" + (run_dir / "recipe.yaml").read_text())
    with pytest.raises(UserError, match=r"recipe\.yaml is somebody else's"):
        check_arguments(arguments, 1)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_run_writes_through_no_link(name: str, tiny_data: Path, tmp_path: Path) -> None:
    recipe, elsewhere = write_recipe(tmp_path / "tiny.yaml"), tmp_path / "elsewhere"
    (elsewhere / "checkpoints").mkdir(parents=True)
    run_dir = tmp_path / "run"
    run_dir.symlink_to(elsewhere)  # the directory itself may be one, and where its checkpoints lie
    write_state(run_dir, status="running")
    check_arguments(arguments_of(recipe, tiny_data, run_dir), 1)
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=f"{name}: is a symbolic link, and a run writes there"):
        check_arguments(arguments_of(recipe, tiny_data, run_dir), 1)


@pytest.mark.parametrize("place", [".", "run", "shards/run"])
def test_a_run_does_not_begin_in_its_data_set(place: str, tmp_path: Path) -> None:
    data = counting_dataset(tmp_path / "data")
    (tmp_path / "link").symlink_to(data)
    with pytest.raises(
        UserError, match=r"--run-dir .*: is (the data set's directory|inside of the data set)"
    ):
        check_arguments(
            arguments_of(write_recipe(tmp_path / "r.yaml"), data, tmp_path / "link" / place), 1
        )

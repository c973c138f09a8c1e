"""A comparison of real runs: killed, stopped, grown; what it finds, and what it refuses."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from support.forked_ranks import train_on
from support.processes import processes_of
from support.runs import (
    REPOSITORY,
    counting_dataset,
    environment,
    losses,
    run_command,
    steps_of,
    write_recipe,
)
from support.waiting import wait_until

from data_prep.errors import UserError
from data_prep.manifest import load_manifest
from launch.outcome import standing
from pretrain import compare
from pretrain.comparing.comparison import Comparison, read_comparison
from pretrain.run.state import read_state

STEPS = 20  # of the tiny recipe
BASELINE = "model.input_embedding=learned"
INPUTS = "model.input_embedding=binary_code,learned"


def command(recipe: Path, data: Path, output_dir: Path, *more: str) -> list[str]:
    """A comparison of both inputs."""
    flags = ["--recipe", str(recipe), "--data-dir", str(data), "--output-dir", str(output_dir)]
    flags += ["--vary", INPUTS, "--baseline", BASELINE, *more]
    return [sys.executable, "-m", "pretrain.compare", *flags]


def start(typed: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A comparison that goes on."""
    with log.open("wb") as file:
        return subprocess.Popen(typed, cwd=REPOSITORY, env=environment(), stdout=file, stderr=file)


def are_held_at_six_steps(cells: list[Path]) -> bool:
    """Whether all runs have come so far. One that has is stopped there, so that none is done when
    the last one comes.
    """
    ahead = [cell for cell in cells if steps_of(cell) >= 6]
    for cell in ahead:
        for process in processes_of(cell, "pretrain.train"):
            process.suspend()
    return ahead == cells


def run_dir(output_dir: Path, value: str, seed: int) -> Path:
    return output_dir / "cells" / f"input_embedding={value},seed={seed}"


def comparison_of(output_dir: Path) -> Comparison:
    found = read_comparison(output_dir)
    assert found is not None
    return found


class Finished:
    """A comparison of two inputs over two seeds, and how it came about."""

    def __init__(self, home: Path, data: Path) -> None:
        self.home = home
        self.data = data
        self.output_dir = home / "comparison"
        self.recipe = write_recipe(home / "tiny.yaml")


@pytest.fixture(scope="module")
def finished(text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two cells at once, killed in mid-run; stopped by a signal; then grown by a seed."""
    made = Finished(tmp_path_factory.mktemp("compare"), text_data)
    log = made.home / "log"
    one_seed = command(made.recipe, text_data, made.output_dir, "--vary", "seed=1", "--at-once=2")
    cells = [run_dir(made.output_dir, value, 1) for value in ("binary_code", "learned")]

    job = start(one_seed, log)
    wait_until(lambda: are_held_at_six_steps(cells), "six steps", 200, job=job, log=log)
    job.send_signal(signal.SIGKILL)
    job.wait()
    wait_until(lambda: not processes_of(made.output_dir), "all to end", 20, log=log)
    assert {read_state(cell).status for cell in cells} == {"running"}

    job = start(one_seed, log)
    wait_until(
        lambda: {standing(cell).starts for cell in cells} == {2} and steps_of(cells[0]) > 6,
        "a step of the second start",
        200,
        job=job,
        log=log,
    )
    job.send_signal(signal.SIGTERM)
    assert job.wait(120) == 128 + signal.SIGTERM, log.read_text()
    assert log.read_text().endswith("ended by SIGTERM; the same command continues\n")
    assert not processes_of(made.output_dir)
    assert read_state(cells[0]).status in ("preempted", "done")

    grown = command(made.recipe, text_data, made.output_dir, "--vary", "seed=1,2", "--at-once=2")
    result = run_command(*grown)
    assert result.returncode == 0, result.stderr + result.stdout
    assert "4 of 4 cells" in result.stdout
    return made


@pytest.mark.slow
def test_cells_are_ordinary_runs_whatever_happened_to_the_command(
    finished: Finished, tmp_path: Path
) -> None:
    """Losses bit for bit those of a run by itself, unbroken."""
    for value, seed in (("binary_code", 1), ("learned", 2)):
        flags = [f"--model.input_embedding={value}", f"--seed={seed}"]
        unbroken = tmp_path / f"{value}-{seed}"
        train_on(1, finished.recipe, finished.data, unbroken, *flags)
        cell = run_dir(finished.output_dir, value, seed)
        assert len(losses(cell)) == STEPS
        assert losses(cell) == losses(unbroken)


@pytest.mark.slow
def test_the_result_is_what_the_cells_files_say(finished: Finished) -> None:
    found = comparison_of(finished.output_dir)
    measured = {}
    for cell in found.cells:
        path = finished.output_dir / "cells" / cell.name / "evaluation.json"
        told = json.loads(path.read_text())
        assert (cell.loss, cell.score.bits_per_byte) == (told["loss"], told["bits_per_byte"])
        measured[cell.settings["model.input_embedding"], cell.seed] = cell.loss
    assert not found.missing
    assert found.fingerprint == load_manifest(finished.data).fingerprint
    (group,) = found.groups
    (difference,) = group.differences
    gaps = [measured["binary_code", seed] - measured["learned", seed] for seed in (1, 2)]
    assert difference.seeds == (1, 2)
    assert difference.loss == pytest.approx(sum(gaps) / 2)
    test = difference.over_seeds
    assert test is not None
    # of two pairs, in closed form
    half = math.tan(0.475 * math.pi) * abs(gaps[0] - gaps[1]) / 2
    assert test.interval.low == pytest.approx(difference.loss - half)
    assert test.interval.high == pytest.approx(difference.loss + half)
    score = found.cells[0].score
    bits_of_nat = score.bits_per_byte / score.loss
    assert difference.bits_per_byte == pytest.approx(difference.loss * bits_of_nat)
    learned, code = (
        next(one for one in group.treatments if one.value == value)
        for value in ("learned", "binary_code")
    )
    assert learned.parameters - code.parameters == 512 * 48


@pytest.mark.slow
def test_cells_of_a_seed_are_shown_to_be_matched(finished: Finished) -> None:
    found = comparison_of(finished.output_dir)
    assert [match.seed for match in found.matches] == [1, 2]
    assert all(match.is_matched for match in found.matches)
    assert {match.samples for match in found.matches} == {STEPS * 6}
    first, second = (match.weights for match in found.matches)
    assert first != second


class Text(HTMLParser):
    """What a page says outside of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.slow
def test_text_and_page_show_it(finished: Finished) -> None:
    found = comparison_of(finished.output_dir)
    difference = found.groups[0].differences[0]
    markdown = (finished.output_dir / "comparison.md").read_text()
    assert f"| binary_code | 2 | {difference.loss:+.4f} |" in markdown
    assert "binary_code against learned: 2 seeds can show a difference of" in markdown
    for cell in found.cells:
        assert f"| {cell.name} | {cell.loss:.4f} |" in markdown
    for line in markdown.splitlines():
        assert not line.startswith("| |")
    page = (finished.output_dir / "comparison.html").read_text()
    words = "\n".join(Text(page).words)
    assert "binary_code against learned: 2 seeds can show" in words
    assert "mean of seeds 1, 2" in page  # a band of each input


@pytest.mark.slow
def test_the_same_command_again_trains_nothing_and_finds_the_same(finished: Finished) -> None:
    path = finished.output_dir / "comparison.json"
    before = path.read_bytes()
    starts = [cell.read_bytes() for cell in finished.output_dir.glob("cells/*/starts.jsonl")]
    path.unlink()
    typed = command(
        finished.recipe, finished.data, finished.output_dir, "--vary", "seed=1,2", "--at-once=2"
    )
    result = run_command(*typed)
    assert result.returncode == 0, result.stderr
    assert "4 of 4 cells are there already" in result.stdout
    assert path.read_bytes() == before
    after = [cell.read_bytes() for cell in finished.output_dir.glob("cells/*/starts.jsonl")]
    assert after == starts


@pytest.mark.slow
def test_a_cell_of_another_recipe_or_data_set_is_refused_in_one_line(
    finished: Finished, tmp_path: Path
) -> None:
    output_dir = tmp_path / "comparison"
    shutil.copytree(finished.output_dir, output_dir)
    content = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    other = counting_dataset(tmp_path / "dataset")
    seeds = ("--vary", "seed=1,2")
    cases = {
        ("--optimizer.peak_learning_rate=0.02",): (
            finished.data,
            "started with optimizer.peak_learning_rate=0.01, got 0.02; move that directory away",
        ),
        (): (other, "this run was trained on the data set"),
    }
    for flags, (data, expected) in cases.items():
        result = run_command(*command(finished.recipe, data, output_dir, *seeds, *flags))
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith(f"error: {output_dir}/cells/input_embedding=binary_code")
        assert expected in result.stderr
    now = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    assert now == content


@pytest.mark.slow
def test_a_cell_that_fails_holds_up_no_other_and_is_named(
    finished: Finished, tmp_path: Path
) -> None:
    """One cell's newest checkpoint is damaged, and it has no other."""
    output_dir = tmp_path / "comparison"
    shutil.copytree(finished.output_dir, output_dir)
    bad = run_dir(output_dir, "binary_code", 2)
    (bad / "evaluation.json").unlink()
    for path in bad.glob("checkpoints/step-*/*.safetensors"):
        path.write_bytes(b"damaged")
    typed = command(finished.recipe, finished.data, output_dir, "--vary", "seed=1,2")
    result = run_command(*typed)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert f"cells failed: {bad.name}" in result.stderr
    found = comparison_of(output_dir)
    assert [cell.name for cell in found.missing] == [bad.name]
    assert "checkpoint" in found.missing[0].why
    assert len(found.cells) == 3
    (difference,) = found.groups[0].differences
    assert difference.seeds == (1,)
    assert difference.over_seeds is None
    markdown = (output_dir / "comparison.md").read_text()
    assert f"- {bad.name}: " in markdown
    assert "One seed tells no spread, so there is no interval over seeds" in markdown


# Refused before anything starts


def test_bad_input_is_one_line_and_writes_nothing(tiny_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml")
    output_dir = tmp_path / "comparison"
    (tmp_path / "file").write_text("no directory")
    run = tmp_path / "run"
    run.mkdir()
    (run / "state.json").write_text('{"status": "done", "reason": null}')
    content = yaml.safe_load(recipe.read_text())
    content["batch"]["global_batch_tokens"] = 10**6 * 32
    (tmp_path / "large.yaml").write_text(yaml.safe_dump(content))
    cases = {
        (recipe, output_dir, "--vary=seed=1,x"): "seed: got 'x'",
        (recipe, output_dir, "--vary=sead=1"): "did you mean seed?",
        (
            recipe,
            output_dir,
            "--vary=seed=1",
            "--at-once=0",
        ): "expected a whole number of 1 or more",
        (recipe, output_dir, "--vary=seed=1", "--max-restarts=-1"): "--max-restarts -1",
        (recipe, output_dir, "--vary=seed=1", "--device=h200"): "belongs to --dry-run",
        (recipe, tmp_path / "file", "--vary=seed=1"): "file: is a file; give a directory",
        (recipe, run, "--vary=seed=1"): "run: is a run of pretrain.train",
        (recipe, tiny_data / "in", "--vary=seed=1"): "in: is inside of the data set",
        (tmp_path / "large.yaml", output_dir, "--vary=seed=1"): "training tokens are fewer",
    }
    for (a_recipe, place, *flags), expected in cases.items():
        assert isinstance(a_recipe, Path)
        assert isinstance(place, Path)
        _, _, _, *arguments = command(a_recipe, tiny_data, place, *map(str, flags))
        with pytest.raises(UserError, match=re.escape(expected)) as refused:
            compare.main(arguments)
        assert "\n" not in str(refused.value)
    assert not output_dir.exists()
    result = run_command(*command(recipe, tiny_data, output_dir, "--vary=sead=1"))
    assert result.returncode == 2
    assert result.stderr == "error: --vary sead: unknown key; did you mean seed?\n"
    assert not output_dir.exists()


def test_another_s_result_is_not_replaced(tiny_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml")
    output_dir = tmp_path / "comparison"
    output_dir.mkdir()
    (output_dir / "comparison.json").write_text('{"mine": 1}')
    _, _, _, *arguments = command(recipe, tiny_data, output_dir, "--vary=seed=1")
    expected = r"comparison\.json: not what pretrain\.compare of this version writes"
    with pytest.raises(UserError, match=expected):
        compare.main(arguments)
    assert [path.name for path in output_dir.iterdir()] == ["comparison.json"]

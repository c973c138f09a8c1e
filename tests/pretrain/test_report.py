"""The report of a run: one page that is right, safe, small, and asks for nothing elsewhere."""

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.browser import chromium
from support.reports import EVIL, MEGABYTE, Words, figures_in, look_at, page_of, readout
from support.runs import REPOSITORY, run_command, write_recipe
from support.written_runs import (
    GLOBAL_TOKENS,
    falling_steps,
    recipe_of,
    skipped_step,
    write_run,
)

from data_prep.errors import UserError
from data_prep.manifest import load_manifest
from pretrain.evaluation.task_results import TaskMetric, TaskResult, write_task_results
from pretrain.metrics.metrics_file import read_steps
from pretrain.metrics.step_record import StepRecord
from pretrain.reporting.words import NOT_KNOWN
from pretrain.run.state import write_state
from pretrain.watch.stall_logs import log_path

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def real_run(text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run on real text, evaluated as the README says."""
    run_dir = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(text_run, run_dir)
    command = [sys.executable, "-m", "pretrain.evaluate", "--run-dir", str(run_dir)]
    result = run_command(*command)
    assert result.returncode == 0, result.stderr
    return run_dir


@pytest.fixture(scope="module")
def eventful_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 5,000 steps with skips, restarts, and names that would be obeyed somewhere."""
    run_dir = tmp_path_factory.mktemp("eventful") / "a<script>b"
    steps = [
        skipped_step(step.step, f"loss nan {EVIL}") if step.step in (700, 3000) else step
        for step in falling_steps(5000, outlier_at=4321)
    ]
    write_run(run_dir, steps, recipe_of(5000), {"step": 1000}, {"step": 2500, "commit": EVIL})
    skip = {"step": 700, "worst_row": {"row": 1, "loss": None, "text": f"text {EVIL}"}}
    (run_dir / "skips.jsonl").write_text(json.dumps(skip) + "\n")
    (run_dir / "logs").mkdir()
    write_state(run_dir, status="failed", reason=f"stalled: nothing moved {EVIL}")
    return run_dir


# Figures


def test_a_run_s_figures_are_those_of_its_files(real_run: Path, tmp_path: Path) -> None:
    page = page_of(tmp_path / "report.html", real_run)
    charts = figures_in(page)
    assert charts["steps_in_a_group"] == 1
    (run,) = charts["runs"]
    steps = read_steps(real_run)
    assert len(steps) == 20
    assert run["places"]["steps"] == list(range(1, 21))
    assert run["places"]["tokens"] == [step.tokens for step in steps]
    for name in ("loss", "gradient_norm", "learning_rate"):
        own = [getattr(step, name) for step in steps]
        assert run["series"][name]["mean"] == pytest.approx(own, rel=1e-6)
    seconds = [step.step_s for step in steps if isinstance(step, StepRecord)]
    assert run["places"]["hours"][-1] == pytest.approx(sum(seconds) / 3600, rel=1e-6)
    validated = [step for step in steps if step.val_loss is not None]
    assert run["validation_loss"] == pytest.approx([v.val_loss for v in validated], rel=1e-6)
    assert run["validations"]["steps"] == [step.step + 1 for step in validated]


def test_the_page_tells_what_is_known_of_a_run(real_run: Path, tmp_path: Path) -> None:
    page = page_of(tmp_path / "report.html", real_run)
    text = Words(page).text
    steps = read_steps(real_run)
    best = min(step.val_loss for step in steps if step.val_loss is not None)
    result = json.loads((real_run / "evaluation.json").read_text())
    manifest_path = next((real_run / "checkpoints").glob("step-*/manifest.json"))
    manifest = load_manifest(Path(json.loads(manifest_path.read_text())["data_dir"]))
    bytes_per_token = sum(s.text_bytes for s in manifest.shards_of("validation"))
    bytes_per_token /= manifest.tokens("validation")
    for words in (
        "20 of 20",
        f"{best:.4f} after step",
        f"{best / math.log(2) / bytes_per_token:.4f}",  # as bits per byte
        f"{result['bits_per_byte']:.4f}",
        " to ".join(f"{bound:.4f}" for bound in result["bits_per_byte_interval"]),
        f"{manifest.epochs(20 * GLOBAL_TOKENS)['sotu']:.2f}",
        f"Fingerprint {manifest.fingerprint}",
        "# built by python -m data_prep.build_shards, whose command is not on record, from",
        f"#   sotu: {manifest.sources[0].origin}, weight ",
        "Steps count from 1 here",
        "peak_learning_rate: 0.01",
        "python -m pretrain.train --recipe",
        "checkpoint after step 20",
    ):
        assert words in text
    (run,) = figures_in(page)["runs"]
    assert run["validation_bytes_per_token"] == pytest.approx(bytes_per_token)


# The command, and its own peak: that of getrusage begins with the memory of whoever started it.
MEASURED = """
import sys
from pretrain.report import main
main(sys.argv[1:])
print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")])
"""


def test_a_million_steps_are_a_small_page_that_keeps_a_single_outlier(tmp_path: Path) -> None:
    """And so little memory that the machine which trains can make it."""
    run_dir = write_run(tmp_path / "run", [], recipe_of(1_000_000))
    line = json.dumps(next(falling_steps(1, outlier_at=0)).to_line())
    before, between = line.split('"loss": 99.0')
    before = before.replace('"step": 0', '"step": %d')
    between = between.replace(f'"tokens": {GLOBAL_TOKENS}', '"tokens": %d')
    template = f'{before}"loss": %r{between}\n'
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(1_000_000):
            loss = 98.76543 if step == 765_432 else 2.0 + (step * 7919 % 1000) / 1000
            file.write(template % (step, loss, (step + 1) * GLOBAL_TOKENS))
    output = tmp_path / "report.html"
    result = run_command(sys.executable, "-c", MEASURED, str(run_dir), "--output", str(output))
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) < 500_000  # kB
    assert output.stat().st_size < 2 * MEGABYTE
    (run,) = figures_in(output.read_text())["runs"]
    loss = run["series"]["loss"]
    assert max(loss["high"]) == 98.76543
    group = loss["high"].index(98.76543)
    assert run["places"]["steps"][group - 1] <= 765_432 < run["places"]["steps"][group]
    assert min(loss["low"]) == 2.0
    assert run["places"]["steps"][-1] == 1_000_000


def test_twenty_runs_are_one_page_of_moderate_size(tmp_path: Path) -> None:
    runs = []
    for seed in range(20):
        recipe = recipe_of(10_000, seed=seed)
        runs.append(write_run(tmp_path / f"run-{seed}", falling_steps(2_000, seed), recipe))
    page = page_of(tmp_path / "report.html", *runs)
    assert len(page) < 2 * MEGABYTE
    assert len(figures_in(page)["runs"]) == 20


# Several runs


def test_of_several_runs_only_what_differs_is_told_and_seeds_are_a_band(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"seed{seed}", falling_steps(60, seed), recipe_of(60, seed=seed))
        for seed in (2, 3)
    ]
    # What is logged, and how often it is validated, changes nothing of what is learned.
    watched = recipe_of(60, seed=1, log={"sinks": ["trackio"]}, validation={"every_steps": 7})
    runs.insert(0, write_run(tmp_path / "seed1", falling_steps(60, 1), watched))
    wilder = recipe_of(60, optimizer={"peak_learning_rate": 0.02})
    runs.append(write_run(tmp_path / "wilder", falling_steps(40, 4), wilder))
    page = page_of(tmp_path / "report.html", *runs)
    charts = figures_in(page)
    assert [run["name"] for run in charts["runs"]] == ["seed1", "seed2", "seed3", "wilder"]
    (band,) = charts["bands"]
    assert band["name"] == "mean of seeds 1, 2, 3"
    losses = [[step.loss for step in read_steps(run)] for run in runs[:3]]
    of_step = [sorted(values) for values in zip(*losses, strict=True)]
    drawn = band["series"]["loss"]
    assert drawn["low"] == pytest.approx([values[0] for values in of_step], rel=1e-6)
    assert drawn["high"] == pytest.approx([values[2] for values in of_step], rel=1e-6)
    assert drawn["mean"] == pytest.approx([sum(values) / 3 for values in of_step], rel=1e-6)
    section = page[page.index("What differs") : page.index("<details", page.index("What differs"))]
    keys = re.findall(r'<th scope="row"[^>]*>(.*?)</th>', section)
    expected = ["log.sinks", "optimizer.peak_learning_rate", "seed", "validation.every_steps"]
    assert sorted(keys) == expected
    assert "<td>trackio</td><td>none</td>" in section


def test_runs_of_one_name_are_told_apart_by_the_folders_they_lie_in(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / folder / "run", falling_steps(3), recipe_of(3)) for folder in "ab"]
    charts = figures_in(page_of(tmp_path / "report.html", *runs))
    assert [run["name"] for run in charts["runs"]] == ["a/run", "b/run"]


def test_runs_of_other_vocabularies_share_no_axis_of_nats(real_run: Path, tmp_path: Path) -> None:
    bytes_known = page_of(tmp_path / "report.html", real_run)
    assert figures_in(bytes_known)["is_bits_only"] is False
    larger = recipe_of(5, model={"vocab_size": 1024})
    other = write_run(tmp_path / "other", falling_steps(5), larger)
    with pytest.raises(UserError, match=r"other: these runs have different vocab.*--data-dir"):
        page_of(tmp_path / "both.html", real_run, other)
    assert not (tmp_path / "both.html").exists()
    evaluated = json.loads((real_run / "evaluation.json").read_text())
    (other / "evaluation.json").write_text(json.dumps(evaluated))
    images = tmp_path / "images"
    page = page_of(tmp_path / "both.html", real_run, other, flags=("--svg", str(images)))
    assert figures_in(page)["is_bits_only"] is True
    assert (images / "bits_per_byte.svg").is_file()
    assert not (images / "loss.svg").exists()
    assert "drawn as bits per byte" in Words(page).text


def test_a_stall_that_the_run_outlived_is_marked_where_it_went_on(tmp_path: Path) -> None:
    later = {"step": 30, "time": "2026-01-02T05:00:00Z"}
    run_dir = write_run(tmp_path / "run", falling_steps(100), recipe_of(100), later)
    path = log_path(run_dir, 0)
    path.parent.mkdir()
    path.write_text("\n2026-01-02T04:59:00Z rank 0 (a) stalled\nThread 0x1:\n")
    (run,) = figures_in(page_of(tmp_path / "report.html", run_dir))["runs"]
    marks = run["marks"]
    where = list(zip(marks["kinds"], marks["places"]["steps"], strict=True))
    assert where == [("restart", 30), ("stall", 30)]


def test_what_runs_scored_on_tasks_stands_side_by_side(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", falling_steps(5), recipe_of(5))
    second = write_run(tmp_path / "second", falling_steps(5), recipe_of(5))
    letters = TaskResult(
        step=5, task="first_letter", version="1", samples=1200, limit=None, lm_eval="0.4.13",
        metrics=(TaskMetric(name="acc", filter="none", value=0.25, standard_error=0.0125),),
    )  # fmt: skip
    answers = TaskMetric(name="exact_match", filter="get-answer", value=0.5)
    part = replace(letters, task="sums", limit=10, samples=10, metrics=(answers,))
    write_task_results([letters], first)
    write_task_results([replace(letters, lm_eval="0.4.14"), part], second)
    words = Words(page_of(tmp_path / "report.html", first, second))
    row = words.cells.index("first_letter: acc, 1,200 questions, after step 5")
    assert words.cells[row + 1 : row + 3] == ["0.2500 ± 0.0125", "0.2500 ± 0.0125"]
    row = words.cells.index("sums: exact_match, get-answer, first 10 questions, after step 5")
    assert words.cells[row + 1 : row + 3] == [NOT_KNOWN, "0.5000"]
    assert "By lm-eval 0.4.13, 0.4.14; ± is its standard error." in words.text


# Runs that are not whole


def test_a_run_that_is_still_going_is_reported_up_to_its_last_whole_line(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", falling_steps(7), recipe_of(50))
    write_state(run_dir, status="running")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    page = page_of(tmp_path / "report.html", run_dir)
    assert figures_in(page)["runs"][0]["places"]["steps"] == list(range(1, 8))
    assert {"running", "7 of 50"} <= set(Words(page).cells)


def test_a_run_that_never_trained_gives_a_page_that_says_so(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", [], recipe_of(50))
    (run_dir / "metrics.jsonl").unlink()
    write_state(run_dir, status="running")
    words = Words(page_of(tmp_path / "report.html", run_dir))
    assert "0 of 50" in words.cells
    assert "it has not finished a step yet" in words.text


def test_a_run_whose_data_set_is_gone_says_what_is_missing_and_takes_it_from_elsewhere(
    real_run: Path, text_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(real_run, run_dir)
    for manifest in (run_dir / "checkpoints").glob("step-*/manifest.json"):
        content = json.loads(manifest.read_text())
        content["data_dir"] = str(tmp_path / "gone")
        manifest.write_text(json.dumps(content))
    page = page_of(tmp_path / "report.html", run_dir)
    assert f"its data set is not at {tmp_path / 'gone'}" in capsys.readouterr().err
    assert "--data-dir says where it is" in Words(page).text
    # The evaluation measured the bytes of the same text.
    assert figures_in(page)["runs"][0]["bytes_per_token"] is not None
    flags = ("--data-dir", str(text_data))
    page = page_of(tmp_path / "report.html", run_dir, flags=flags)
    assert "--data-dir says where it is" not in Words(page).text
    assert "Fingerprint" in Words(page).text
    assert "none of these runs" not in capsys.readouterr().err
    other = write_run(tmp_path / "other", falling_steps(3), recipe_of(3))
    page_of(tmp_path / "report.html", other, flags=flags)
    said = f"note: --data-dir {text_data}: the data set of none of these runs"
    assert said in capsys.readouterr().err


def test_missing_lines_and_endless_figures_are_gaps(tmp_path: Path) -> None:
    steps = [step for step in falling_steps(10) if step.step not in (3, 4)]
    run_dir = write_run(tmp_path / "run", steps, recipe_of(10))
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    broken = json.loads(lines[2])
    broken["loss"] = math.nan
    broken["val_loss"] = math.inf
    lines[2] = json.dumps(broken)
    path.write_text("\n".join(lines) + "\n")
    page = page_of(tmp_path / "report.html", run_dir)
    (run,) = figures_in(page)["runs"]
    assert run["places"]["steps"] == [1, 2, 3, 6, 7, 8, 9, 10]
    assert run["series"]["loss"]["mean"][2] is None
    assert None not in run["series"]["loss"]["mean"][3:]
    words = Words(page)
    assert "2 steps have no line" in words.text
    assert "1 step has a loss that is no finite number" in words.text
    assert "the first is step 3" in words.text


def test_a_run_whose_record_is_missing_says_so_and_draws_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has trained: that it has not finished a step yet would be untrue."""
    run_dir = write_run(tmp_path / "run", [], recipe_of(120))
    images = tmp_path / "images"
    for is_there in (True, False):
        if not is_there:
            (run_dir / "metrics.jsonl").unlink()
        flags = ("--png", str(images))
        words = Words(page_of(tmp_path / "report.html", run_dir, flags=flags))
        noted = capsys.readouterr().err
        assert "its record is missing: metrics.jsonl has no line of the 120 steps" in noted
        assert f"note: {images}: no image, since no step is on record" in noted
        assert "120 of 120, 0 in the record" in words.cells
        assert "not finished a step" not in words.text
        assert not images.exists()


def test_what_a_done_run_s_record_lacks_at_its_end_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = write_run(tmp_path / "run", falling_steps(9), recipe_of(10))
    with (run_dir / "starts.jsonl").open("a") as file:
        file.write("{\n")
    words = Words(page_of(tmp_path / "report.html", run_dir))
    noted = capsys.readouterr().err
    assert "1 step has no line at the end of metrics.jsonl" in noted
    assert "1 of the lines of starts.jsonl can't be read" in noted
    assert "10 of 10, 9 in the record" in words.cells


def test_marks_stand_where_things_happened(eventful_run: Path, tmp_path: Path) -> None:
    page = page_of(tmp_path / "report.html", eventful_run)
    (run,) = figures_in(page)["runs"]
    marks = run["marks"]
    where = list(zip(marks["kinds"], marks["places"]["steps"], strict=True))
    assert where == [
        ("restart", 1000),
        ("restart", 2500),
        ("skip", 701),
        ("skip", 3001),
        ("stall", 5000),
    ]
    steps = [step for step in falling_steps(5000) if step.step not in (700, 3000)]
    hours = 2 * sum(step.step_s for step in steps) / 3600  # of two ranks
    assert f"{hours:.4g}" in Words(page).cells


def test_a_run_that_was_rewound_has_each_step_once(tiny_data: Path, tmp_path: Path) -> None:
    """Of a real run, which went back to its checkpoint when a step was bad."""
    from support.poisoned_ranks import poisoned_run

    recipe = write_recipe(tmp_path / "r.yaml", train_tokens=8 * GLOBAL_TOKENS)
    run_dir = tmp_path / "run"
    ended = poisoned_run(1, "5", recipe, tiny_data, run_dir, "--bad_steps.policy=rewind")
    assert "rewinding from step 5" in ended.output
    page = page_of(tmp_path / "report.html", run_dir)
    (run,) = figures_in(page)["runs"]
    assert run["places"]["steps"] == list(range(1, 9))
    losses = run["series"]["loss"]["mean"]
    assert [step for step, loss in enumerate(losses) if loss is None] == [5]
    marks = run["marks"]
    skips = [
        step
        for kind, step in zip(marks["kinds"], marks["places"]["steps"], strict=True)
        if kind == "skip"
    ]
    assert skips == [6]
    words = Words(page)
    assert "8 of 8" in words.cells
    assert re.search(r"step 6 skipped: .*; the run went back to the checkpoint before", words.text)


def test_a_branch_names_its_origin_and_has_the_steps_before_it(
    tiny_data: Path, tmp_path: Path
) -> None:
    from support.forked_ranks import train_on

    recipe = write_recipe(
        tmp_path / "r.yaml",
        train_tokens=6 * GLOBAL_TOKENS,
        schedule={"kind": "constant", "warmup_steps": 1},
    )
    train_on(1, recipe, tiny_data, tmp_path / "trunk", "--checkpoints.every_steps=3")
    origin = tmp_path / "trunk" / "checkpoints" / "step-00000003"
    longer = f"--train_tokens={9 * GLOBAL_TOKENS}"
    train_on(1, recipe, tiny_data, tmp_path / "branch", "--branch-from", str(origin), longer)
    page = page_of(tmp_path / "report.html", tmp_path / "trunk", tmp_path / "branch")
    trunk, branch = figures_in(page)["runs"]
    assert trunk["places"]["steps"] == list(range(1, 7))
    assert branch["places"]["steps"] == list(range(1, 10))
    of_trunk = trunk["series"]["loss"]["mean"]
    of_branch = branch["series"]["loss"]["mean"]
    assert of_branch[:3] == of_trunk[:3]
    text = Words(page).text
    assert f"# branched from {origin}" in text
    assert f"branched from {origin}, 2" in text  # and when
    assert "went on after step" not in text
    assert f"--branch-from {origin}" in text
    section = page[page.index("What differs") : page.index("<details", page.index("What differs"))]
    assert "train_tokens" in section


def test_a_start_is_told_as_the_command_that_starts_all_its_ranks(tmp_path: Path) -> None:
    of_rank = "python -m pretrain.train --local_rank=0 --recipe r.yaml"
    one_host = {"step": 1, "command": of_rank, "ranks": 2, "hosts": {"a": 2}}
    two_hosts = {"step": 2, "command": of_rank, "ranks": 4, "hosts": {"a": 2, "b": 2}}
    run_dir = write_run(tmp_path / "run", falling_steps(4), recipe_of(4), one_host, two_hosts)
    lines = Words(page_of(tmp_path / "report.html", run_dir)).text.splitlines()
    assert "deepspeed --num_gpus 2 --module pretrain.train --recipe r.yaml" in lines
    assert "python -m pretrain.train --recipe r.yaml" in lines
    of_step_2 = [line for line in lines if line.startswith("# after step 2, ")]
    assert "4 ranks, OMP_NUM_THREADS 8 a rank" in of_step_2[0]
    # --run-dir says how the run was called, so that it tells from where
    given = {"step": 3, "command": "python -m pretrain.train --run-dir runs/one", "ranks": 1}
    own = write_run(tmp_path / "runs" / "one", falling_steps(4), recipe_of(4), given)
    lines = Words(page_of(tmp_path / "report.html", own)).text.splitlines()
    assert given["command"] in lines  # as it was typed: no launcher started it
    assert f"# relative paths: from {tmp_path}, unless the run was moved" in lines


def test_on_cpus_utilisation_is_that_of_a_measured_matrix_product(tmp_path: Path) -> None:
    steps = [replace(step, mfu_of_matmul=0.1 + step.step / 100) for step in falling_steps(5)]
    on_cpus = write_run(tmp_path / "cpu", steps, recipe_of(5))
    page = page_of(tmp_path / "report.html", on_cpus)
    series = figures_in(page)["runs"][0]["series"]
    assert series["mfu_of_matmul"]["mean"] == pytest.approx([10, 11, 12, 13, 14])
    assert "mfu" not in series
    cells = Words(page).cells
    assert cells[cells.index("speed against a measured matrix product, median") + 1] == "12.0%"
    assert "MFU, median" not in cells
    on_gpus = [replace(step, mfu=0.4) for step in falling_steps(5)]
    write_run(tmp_path / "gpu", on_gpus, recipe_of(5))
    page = page_of(tmp_path / "both.html", on_cpus, tmp_path / "gpu")
    cells = Words(page).cells
    assert "40.0%" in cells[cells.index("MFU, median") :][:8]
    assert "mfu" in figures_in(page)["runs"][1]["series"]


def test_a_run_is_compared_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It fell to the middle, and is flat from there on; two steps were slow, one had a spike."""
    steps = []
    for step in falling_steps(400, outlier_at=250):
        loss = step.loss
        if step.step != 250:
            loss = max(6.0 - step.step / 50, 2.0) + (step.step * 7919 % 100) / 1000
        slow = 3 if step.step in (100, 101) else 1
        steps.append(replace(step, loss=loss, step_s=0.5 * slow))
    flat = write_run(tmp_path / "flat", steps, recipe_of(400))
    falls = write_run(tmp_path / "falls", steps[:200], recipe_of(400))
    words = Words(page_of(tmp_path / "report.html", flat, falls))
    printed = capsys.readouterr().out
    trend = "training loss, last tenth of the steps against the tenth before"
    assert f"flat: {trend}: flat (2.0" in printed
    assert f"falls: {trend}: still falling (2." in printed
    slow = "slow steps, of twice the median time or more: 2, which cost 2 s beyond the median"
    assert f"flat: {slow}" in printed
    assert "flat: steps whose loss stands out: 251 (99.0000)" in printed
    assert "falls: steps whose loss stands out: none lies more than 0." in printed
    assert "flat: that tenth against a power law of the tokens N: " in printed
    assert "2, which cost 2 s beyond the median" in words.cells
    worst = words.cells[words.cells.index("flat, steps whose loss stands out") :]
    assert worst[worst.index("251") + 1] == "99.0000"


# Bad input


def test_bad_input_gets_one_line_and_leaves_what_was_there(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", falling_steps(4), recipe_of(4))
    (tmp_path / "empty").mkdir()
    twice = write_run(tmp_path / "twice", [*falling_steps(4), *falling_steps(2)], recipe_of(4))
    damaged = write_run(tmp_path / "damaged", falling_steps(4), recipe_of(4))
    content = (damaged / "metrics.jsonl").read_text()
    (damaged / "metrics.jsonl").write_text(content.replace('"step": 2,', '"step": 2;'))
    lacking = write_run(tmp_path / "lacking", falling_steps(4), recipe_of(4))
    content = (lacking / "metrics.jsonl").read_text()
    (lacking / "metrics.jsonl").write_text(content.replace('"forward"', '"onward"'))
    worded = write_run(tmp_path / "worded", falling_steps(4), recipe_of(4))
    lines = (worded / "metrics.jsonl").read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), "loss": "x"})
    (worded / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    page = tmp_path / "report.html"
    page_of(page, good)
    before = page.read_text()
    own_page = tmp_path / "mine.HTML"
    own_page.write_text("<html>mine</html>")
    cases = {
        (own_page,): "mine.HTML: is a file; give the directory of a run",
        (tmp_path / "none",): "none: no such directory",
        (tmp_path / "empty",): "empty: no run of pretrain.train is there",
        (good, good): "good: the same run as",
        (twice,): "metrics.jsonl: line 5: is of step 0, and the line before it of step 3",
        (damaged,): "metrics.jsonl: line 3: damaged",
        (worded,): "metrics.jsonl: line 3: damaged (a figure is missing or no number: must be real",
        (lacking,): "metrics.jsonl: line 1: damaged (a figure is missing or no number: 'forward')",
    }
    for runs, expected in cases.items():
        with pytest.raises(UserError, match=re.escape(expected)):
            page_of(page, *runs)
    for output, expected in (
        (tmp_path / "report.txt", "give one that ends in .html"),
        (tmp_path / "page", "page: not the name of a page; give one that ends in .html"),
        (good / "recipe.yaml", "not the name of a page"),
        (own_page, "is there already and no report; give another name"),
    ):
        with pytest.raises(UserError, match=expected):
            page_of(output, good)
    with pytest.raises(UserError, match=r"--svg .*mine\.HTML: is a file; give a directory"):
        page_of(page, good, flags=("--svg", str(own_page)))
    assert page.read_text() == before
    assert own_page.read_text() == "<html>mine</html>"
    other = write_run(tmp_path / "other", falling_steps(4), recipe_of(4))
    assert "<h1>other</h1>" in page_of(page, other)  # an earlier report gives way
    page_of(tmp_path / "new.HTM", good)
    assert (tmp_path / "new.HTM").is_file()


def test_an_output_that_can_t_be_written_is_one_line(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", falling_steps(4), recipe_of(4))
    (tmp_path / "file").write_text("no folder")
    output = tmp_path / "file" / "report.html"
    command = [sys.executable, "-m", "pretrain.report", str(run_dir), "--output", str(output)]
    result = run_command(*command)
    assert result.returncode == 2
    error = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert len(error) == 1
    assert error[0].startswith(f"error: {tmp_path / 'file'}")


@pytest.mark.parametrize(("package", "flags"), [("uplot", []), ("matplotlib", ["--svg", "images"])])
def test_a_missing_package_is_one_line_that_says_how_to_get_it(
    package: str, flags: list[str], tmp_path: Path
) -> None:
    run_dir = write_run(tmp_path / "run", falling_steps(4), recipe_of(4))
    arguments = [str(run_dir), "--output", str(tmp_path / "report.html"), *flags]
    program = (
        "import sys, importlib.machinery as m\n"
        "find = m.PathFinder.find_spec\n"
        f"lacks = lambda name, *more: None if name == {package!r} else find(name, *more)\n"
        "m.PathFinder.find_spec = lacks\n"
        "from data_prep.commands import exit_code\n"
        "from pretrain.report import main\n"
        "sys.exit(exit_code(lambda: main(sys.argv[1:])))"
    )
    result = run_command(sys.executable, "-c", program, *arguments)
    assert result.returncode == 2
    assert "pip install 'tablefree[report]'" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_name_that_is_no_text_is_spelled_out(tmp_path: Path) -> None:
    name = os.fsdecode(b"r\xffn")
    run_dir = write_run(tmp_path / name, falling_steps(3), recipe_of(3))
    page = page_of(tmp_path / "report.html", run_dir)
    assert "r\\udcffn" in Words(page).text


# Safety, and a real browser


def test_what_a_run_brings_in_is_text_and_nothing_is_asked_for(
    eventful_run: Path, tmp_path: Path
) -> None:
    page = page_of(tmp_path / "report.html", eventful_run)
    words = Words(page)
    assert EVIL in words.text  # of the sample, as it stands there
    assert "a<script>b" in words.text
    scripts = [attributes for tag, attributes in words.tags if tag == "script"]
    assert len(scripts) == 5
    # a name ends in no script, nor leads one out of the page
    assert EVIL not in page
    addresses = [
        address
        for _, attributes in words.tags
        for name, address in attributes.items()
        if name in ("src", "href", "action", "srcset", "poster")
    ]
    assert addresses == ["data:,"]


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as found:
        yield found


def test_a_browser_draws_it_switches_it_and_asks_for_nothing(
    browser: "Browser", eventful_run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    page_of(path, eventful_run)
    page, seen = look_at(browser, path)
    assert page.title() == "a<script>b: report"
    assert page.locator("#charts figure").count() == 6
    before = page.locator("#chart-loss canvas").screenshot()
    for axis in ("steps", "hours", "flops", "tokens"):
        page.select_option("#axis", axis)
    page.check("#log")
    page.fill("#smoothing", "60")
    page.check("#calm")
    assert page.locator("#chart-loss canvas").screenshot() != before
    # by keyboard alone: to the chart, and along it
    page.locator("#chart-loss .plot").focus()
    page.keyboard.press("Home")
    page.wait_for_function(
        "document.querySelector('#chart-loss .legend').innerText.includes('at ')"
    )
    at_the_beginning = readout(page)
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(100)
    assert readout(page) != at_the_beginning
    page.keyboard.press("+")
    page.emulate_media(media="print")
    page.pdf()
    assert seen == []
    page.context.close()


def test_the_figure_under_the_cursor_is_that_of_the_record(
    browser: "Browser", tmp_path: Path
) -> None:
    run_dir = write_run(tmp_path / "run", falling_steps(30), recipe_of(30))
    path = tmp_path / "report.html"
    page_of(path, run_dir)
    page, seen = look_at(browser, path)
    losses = [step.loss for step in read_steps(run_dir)]
    page.locator("#chart-loss .plot").focus()
    page.keyboard.press("Home")
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    page.wait_for_timeout(100)
    assert losses[7] is not None
    assert f"run {float(f'{losses[7]:.5g}'):g}" in readout(page)
    assert f"at {8 * GLOBAL_TOKENS / 1000:.4g} k tokens" in readout(page)
    assert seen == []
    page.context.close()


def test_axes_have_labels_and_no_point_or_dash_is_lost(browser: "Browser", tmp_path: Path) -> None:
    steps = [*falling_steps(80)]
    refused = [*steps[:78], skipped_step(78, "loss nan"), steps[79]]
    run_dir = write_run(tmp_path / "run", refused, recipe_of(80))
    path = tmp_path / "report.html"
    page_of(path, run_dir)
    page, seen = look_at(browser, path)
    # a step between a skip and the end of the run is a point of its own
    (run,) = figures_in(path.read_text())["runs"]
    losses = run["series"]["loss"]["mean"]
    assert page.evaluate("values => reportAxes.lonePlaces(values)", losses) == [79]
    gaps = "reportAxes.lonePlaces([1, null, 2, undefined, 3, null, undefined, 4, null, 5, 6])"
    assert page.evaluate(gaps) == [0, 7]
    for least, most in ((5.2, 7.1), (2_051.8, 23_000), (0.29, 0.71), (1e-5, 0.2), (3.0, 3.0001)):
        labels = page.evaluate(
            "([least, most]) => reportAxes.logSplits(least, most).map(reportAxes.short)",
            [least, most],
        )
        assert 3 <= len(labels) <= 9
        assert max(map(len, labels)) <= 7
    least, most = page.evaluate("reportAxes.logRange(2000, 24000)")
    assert 1500 < least < 2000
    assert 24000 < most < 30000
    keys = page.locator("#chart-loss .legend .key")
    assert "gradient" not in str(keys.nth(0).get_attribute("style"))
    assert "repeating-linear-gradient" in str(keys.nth(1).get_attribute("style"))
    assert page.locator(".mark").all_inner_texts() == ["skip"]  # and no kind that never occurred
    assert seen == []
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_two_runs_fit_a_phone_and_axe_finds_nothing_serious(
    browser: "Browser", scheme: str, eventful_run: Path, tmp_path: Path
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    other = write_run(tmp_path / "other", falling_steps(400, 2), recipe_of(400))
    path = tmp_path / "report.html"
    page_of(path, eventful_run, other)
    # axe is a script of its own, which the page's policy would refuse
    phone = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme, "bypass_csp": True}
    page, seen = look_at(browser, path, **phone)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    box = page.get_by_role("checkbox", name="other", exact=True)
    box.uncheck()
    assert "other" not in readout(page)
    box.check()
    found = Axe().run(page).response
    assert len(found["passes"]) > 10
    serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert not serious, [(v["id"], v["nodes"][0]["html"]) for v in serious]
    assert seen == []
    page.context.close()


def test_runs_of_no_step_of_one_and_of_skipped_ones_are_drawn_without_complaint(
    browser: "Browser", tmp_path: Path
) -> None:
    single = write_run(tmp_path / "single", falling_steps(1), recipe_of(1))
    none = write_run(tmp_path / "none", [], recipe_of(9))
    skipped = [skipped_step(step, "loss nan") for step in range(5)]
    refused = write_run(tmp_path / "refused", skipped, recipe_of(9))
    path = tmp_path / "report.html"
    for runs, charts in (((single,), 6), ((none,), 0), ((refused,), 1), ((none, single), 6)):
        page_of(path, *runs)
        page, seen = look_at(browser, path)
        assert page.locator("#charts canvas").count() == charts
        page.select_option("#axis", "hours")
        page.check("#log")
        page.check("#calm")
        assert seen == []
        page.context.close()


# The README, and images


def test_the_readme_s_commands_are_as_they_stand_there(real_run: Path, tmp_path: Path) -> None:
    readme = (REPOSITORY / "pretrain" / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## The report of a run") :]
    block = section[section.index("```") : section.index("```\n\n")]
    commands = [line for line in block.splitlines() if line.startswith("python -m")]
    assert len(commands) == 3
    for name in ("run", "run-a", "run-b"):
        shutil.copytree(real_run, tmp_path / name)
    for command in commands:
        _, *arguments = command.split()
        result = run_command(sys.executable, *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "images" / "loss.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "images" / "bits_per_byte.svg").read_text()
    assert svg.startswith("<?xml")


def test_images_have_the_page_s_colours_and_the_band_of_seeds(tmp_path: Path) -> None:
    """As in the page's style and its script: runs in order, the band after them."""
    runs = [
        write_run(tmp_path / f"seed{seed}", falling_steps(60, seed), recipe_of(60, seed=seed))
        for seed in (1, 2)
    ]
    page = page_of(tmp_path / "report.html", *runs, flags=("--svg", str(tmp_path / "images")))
    colours = dict(re.findall(r"--(c\d): (#[0-9a-f]{6});", page[: page.index("dark)")]))
    assert len(colours) == 8
    loss = (tmp_path / "images" / "loss.svg").read_text()
    drawn = [colour for colour in colours.values() if f"stroke: {colour}" in loss]
    assert drawn == [colours["c0"], colours["c1"], colours["c2"]]
    assert loss.count(f"fill: {colours['c2']}; fill-opacity: 0.25") == 1
    norm = (tmp_path / "images" / "gradient_norm.svg").read_text()
    assert colours["c2"] not in norm  # a band is of losses alone


def test_the_benchmark_of_reports_runs() -> None:
    script = "tests/benchmarks/report_speed.py"
    few = ("--steps", "500", "--runs", "2", "--steps-of-each", "60", "--documents", "1000000")
    result = run_command(sys.executable, script, *few)
    assert result.returncode == 0, result.stderr
    assert "| 1 run of 500 steps | " in result.stdout
    assert "lengths of 1,000,000 of 1,000,000 documents" in result.stdout

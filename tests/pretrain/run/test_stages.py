"""Branches onto other data: what they train on, how they go on, what is said of their stages."""

import contextlib
import io
import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.forked_ranks import arguments_of, end_of, logs_of, run_ranks, start_ranks, train_on
from support.prep_helpers import build, source, speeches, write_jsonl, write_mixture
from support.reports import Words, figures_in, page_of
from support.runs import losses, steps_of, write_recipe
from support.waiting import wait_until

from data_prep.errors import UserError
from data_prep.manifest import load_manifest
from data_prep.shards import ShardReader
from pretrain import evaluate, export_hf, trace
from pretrain.checkpoint.find import load_for_reading
from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.checkpoint.reader import load_model
from pretrain.data.loader import TrainingLoader
from pretrain.data.text_size import bytes_per_token
from pretrain.hf.marker import read_marker, why_precious
from pretrain.metrics.metrics_file import steps_between
from pretrain.metrics.told import AboutRun, told
from pretrain.reporting.data_set import documents_of_steps
from pretrain.reporting.reading import data_of_stages
from pretrain.reporting.reading import recipe_of as recipe_of_run
from pretrain.reporting.reported_run import StandsOut, WorstSteps, ratio_of
from pretrain.run.prepare import earlier_texts
from pretrain.run.state import read_state

ROWS = 6
STEP = ROWS * 32  # tokens
STEPS = 15
BRANCHED = 5


def later_speeches(trunk: Path, home: Path, first: int, last: int) -> Path:
    """A data set of other addresses, with the tokenizer of a run."""
    texts = [text[-5000:] for text in speeches(last, 10_000)[first:]]
    write_jsonl(home / "later.jsonl", texts)
    own = source("later", "later.jsonl", format="jsonl", text_field="text", license="CC0-1.0")
    mixture = write_mixture(home, trunk / "tokenizer", [own])
    build(mixture, home / "dataset")
    return home / "dataset"


@pytest.fixture(scope="module")
def other_data(trunk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return later_speeches(trunk, tmp_path_factory.mktemp("other"), 40, 60)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 steps, whose rate decays after the fifth; a checkpoint every five."""
    return write_recipe(
        tmp_path_factory.mktemp("recipe") / "r.yaml",
        schedule={"kind": "wsd", "warmup_steps": 2, "decay_steps": 10, "warmup_fraction": 0.0},
        checkpoints={"keep_last": 4},
        train_tokens=STEPS * STEP,
    )


@pytest.fixture(scope="module")
def trunk(recipe: Path, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A longer run, still at its peak rate after five steps."""
    run_dir = tmp_path_factory.mktemp("trunk") / "run"
    longer = f"--train_tokens={2 * STEPS * STEP}"
    train_on(1, recipe, text_data, run_dir, longer, "--stop-at-step", "5")
    return run_dir


@pytest.fixture(scope="module")
def branched(
    recipe: Path, trunk: Path, other_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The trunk's fifth step, and ten on the other data."""
    run_dir = tmp_path_factory.mktemp("branch") / "run"
    output = train_on(1, recipe, other_data, run_dir, *from_step(trunk, BRANCHED))
    other = load_manifest(other_data).fingerprint
    assert f"data set {other} from step 5 on: {other_data}" in output
    return run_dir


def from_step(run_dir: Path, step: int) -> list[str]:
    return ["--branch-from", str(run_dir / "checkpoints" / f"step-{step:08d}")]


def refusal(recipe: Path, data: Path, run_dir: Path, *more: str) -> str:
    """The one line of a start that is refused."""
    ended = run_ranks(1, recipe, data, run_dir, *more)
    assert ended.exit_codes == [2], ended.output
    assert "Traceback" not in ended.output
    (line,) = [line for line in ended.output.splitlines() if line.startswith("error:")]
    return line


def loss_on(run_dir: Path, step: int, data: Path, samples: range) -> float:
    """What the weights after some steps make of samples of a data set."""
    model = load_model(load_for_reading(run_dir, step)).eval()
    loader = TrainingLoader(ShardReader(data), seq_len=32, seed=1)
    ids = torch.from_numpy(loader.samples(np.array(samples)).astype("int64"))
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def test_a_branch_trains_on_the_other_data_from_its_first_sample_on(
    branched: Path, trunk: Path, text_data: Path, other_data: Path
) -> None:
    found = losses(branched)
    assert found[:BRANCHED] == losses(trunk)
    assert len(found) == STEPS
    first = loss_on(branched, 5, other_data, range(ROWS))
    assert found[5] == pytest.approx(first, rel=1e-6)
    sixth_of_stage = loss_on(branched, 10, other_data, range(5 * ROWS, 6 * ROWS))
    assert found[10] == pytest.approx(sixth_of_stage, rel=1e-6)
    # which other rows would not give
    for data, samples in ((text_data, range(5 * ROWS, 6 * ROWS)), (other_data, range(ROWS, 12))):
        assert loss_on(branched, 5, data, samples) != pytest.approx(first, rel=1e-4)


def test_state_and_checkpoints_record_the_stages(
    branched: Path, trunk: Path, text_data: Path, other_data: Path
) -> None:
    saved = load_for_reading(branched).manifest
    assert saved.fingerprint == load_manifest(other_data).fingerprint
    places = [(own.fingerprint, own.first_step, own.samples_before) for own in saved.stages]
    assert places == [
        (load_manifest(text_data).fingerprint, 0, 0),
        (saved.fingerprint, BRANCHED, BRANCHED * ROWS),
    ]
    assert [stage.data_dir for stage in saved.stages] == [str(text_data), str(other_data)]
    assert [stage.sources[0]["name"] for stage in saved.stages] == ["sotu", "later"]
    assert read_state(branched).stages == saved.stages == read_state(branched).data_stages
    # of one data set, nothing is written that earlier code did not write
    assert "stages" not in json.loads((trunk / "state.json").read_bytes())
    of_trunk = load_for_reading(trunk)
    assert "stages" not in json.loads((of_trunk.path / "manifest.json").read_bytes())
    (only,) = of_trunk.manifest.data_stages
    assert (only.fingerprint, only.first_step) == (of_trunk.manifest.fingerprint, 0)
    assert CheckpointManifest.from_json(saved.to_json()) == saved


def test_a_branch_killed_goes_on_bit_for_bit_and_on_other_numbers_of_ranks(
    recipe: Path, trunk: Path, other_data: Path, tmp_path: Path
) -> None:
    longer = f"--train_tokens={60 * STEP}"
    flags = [*from_step(trunk, BRANCHED), longer]
    train_on(1, recipe, other_data, tmp_path / "whole", *flags)
    run_dir = tmp_path / "run"
    logs = logs_of(1, run_dir)
    (rank,) = start_ranks(arguments_of(recipe, other_data, run_dir, *flags), logs)
    wait_until(lambda: steps_of(run_dir) >= 12, "12 steps", every_s=0.002)
    rank.kill()
    assert end_of([rank], logs).exit_codes == [-signal.SIGKILL]
    output = train_on(1, recipe, other_data, run_dir, *flags, "--stop-at-step", "57")
    assert "continuing from" in output
    assert losses(run_dir) == losses(tmp_path / "whole")[:57]
    # what it was branched from need not be said again
    train_on(2, recipe, other_data, run_dir, longer)
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert len(load_for_reading(run_dir).manifest.stages) == 2


def test_a_branch_whose_own_checkpoints_are_gone_goes_back_to_its_trunk_s_and_on(
    branched: Path, recipe: Path, trunk: Path, other_data: Path, text_data: Path, tmp_path: Path
) -> None:
    """As one killed before its first save: its only checkpoint tells of the trunk alone."""
    run_dir = tmp_path / "run"
    flags = from_step(trunk, BRANCHED)
    train_on(1, recipe, other_data, run_dir, *flags, "--stop-at-step", "6")
    own = run_dir / "checkpoints" / "step-00000006"
    own.rename(tmp_path / "gone")
    state = json.loads((run_dir / "state.json").read_bytes())
    (run_dir / "state.json").write_text(json.dumps(state | {"saved_step": 5}))
    said = refusal(recipe, text_data, run_dir)
    first, second = (load_manifest(data).fingerprint for data in (text_data, other_data))
    assert (
        f"step-00000005: from step 5 on this run has the data set {second}, got {first}, its data "
        f"set from step 0 to 4; give --data-dir {other_data}, or where that data set is now"
    ) in said
    train_on(1, recipe, other_data, run_dir, "--stop-at-step", "10")
    assert losses(run_dir) == losses(branched)[:10]
    # without its state, checkpoints of its own tell of both
    (run_dir / "state.json").unlink()
    assert f"has the data set {second}, got {first}" in refusal(recipe, text_data, run_dir)
    train_on(1, recipe, other_data, run_dir, "--stop-at-step", "11")
    assert losses(run_dir) == losses(branched)[:11]


def test_a_branch_of_a_branch_has_three_stages(
    branched: Path, recipe: Path, tmp_path: Path
) -> None:
    third = later_speeches(branched, tmp_path, 60, 80)
    flags = from_step(branched, 10)
    train_on(1, recipe, third, tmp_path / "run", *flags, "--stop-at-step", "12")
    train_on(1, recipe, third, tmp_path / "run", *flags)
    train_on(1, recipe, third, tmp_path / "whole", *flags)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert losses(tmp_path / "run")[:10] == losses(branched)[:10]
    stages = load_for_reading(tmp_path / "run").manifest.stages
    assert [stage.first_step for stage in stages] == [0, 5, 10]
    assert len({stage.fingerprint for stage in stages}) == 3
    assert losses(tmp_path / "run")[10] == pytest.approx(
        loss_on(tmp_path / "run", 10, third, range(ROWS)), rel=1e-6
    )


def test_a_branch_of_a_branch_on_the_same_data_goes_on_where_that_was(
    branched: Path, recipe: Path, other_data: Path, tmp_path: Path
) -> None:
    train_on(1, recipe, other_data, tmp_path / "run", *from_step(branched, 10))
    assert losses(tmp_path / "run") == losses(branched)
    assert read_state(tmp_path / "run").stages == read_state(branched).stages


def test_a_dry_run_shows_the_stages_and_counts_epochs_of_the_new_data(
    recipe: Path, trunk: Path, text_data: Path, other_data: Path, tmp_path: Path
) -> None:
    said = train_on(
        1, recipe, other_data, tmp_path / "run", *from_step(trunk, BRANCHED), "--dry-run"
    )
    first, second = (load_manifest(data) for data in (text_data, other_data))
    assert f"  data set {first.fingerprint} from step 0 to 4: {text_data}\n" in said
    assert f"  data set {second.fingerprint} from step 5 on: {other_data}\n" in said
    epochs = second.epochs((STEPS - BRANCHED) * STEP)
    assert f"epochs: later {epochs['later']:.2f};" in said
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_or_end_of_documents_is_refused_before_anything_is_written(
    recipe: Path, trunk: Path, tiny_data: Path, other_data: Path, tmp_path: Path
) -> None:
    said = refusal(recipe, tiny_data, tmp_path / "run", *from_step(trunk, BRANCHED))
    assert f"{tiny_data}: its tokenizer (sha256 ) is not that of --branch-from {trunk}" in said
    assert f"build the data set with --tokenizer {trunk / 'tokenizer'}" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stages", ["[]", "[1]", '[{"fingerprint": "a"}]', "5", '{"a": 1}'])
def test_stages_that_are_none_are_refused_by_their_file(stages: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(f'{{"status": "done", "stages": {stages}}}')
    with pytest.raises(UserError, match=r"state.json: damaged \(.*stages of data"):
        read_state(tmp_path)


# What is said of a run of several data sets


def test_trace_knows_which_data_set_a_step_is_of(
    branched: Path, text_data: Path, other_data: Path, tmp_path: Path
) -> None:
    """By whichever of the two it is given; of one that is gone it says so."""
    first, second = (load_manifest(data).fingerprint for data in (text_data, other_data))
    for given in (text_data, other_data):
        said = traced(branched, given, 4, 5)
        assert said.startswith(f"data set   {first}, from step 0 to 4\n           {text_data}\n")
        assert "\nsample     29: row 5 of step 4, which has 6 rows\nsource     sotu, " in said
        said = traced(branched, given, 5, 0)
        assert said.startswith(f"data set   {second}, from step 5 on\n           {other_data}\n")
        assert "\nsample     0: row 0 of step 5, which has 6 rows\nsource     later, " in said
    moved = shutil.copytree(branched, tmp_path / "run")
    state = json.loads((moved / "state.json").read_bytes())
    state["stages"][0]["data_dir"] = str(tmp_path / "gone")
    (moved / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError) as refused:
        traced(moved, other_data, 4, 5)
    assert str(refused.value) == (
        f"step 4: from step 0 to 4 {moved} was trained on the data set {first}, which is not whole "
        f"({tmp_path}/gone: no such directory; build a data set with python -m "
        "data_prep.build_shards); give --data-dir with where it is now"
    )
    assert "source     sotu, " in traced(moved, text_data, 4, 5)


def test_evaluate_measures_on_either_and_says_which_steps_were_trained_on_it(
    branched: Path, text_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(branched, tmp_path / "run")
    evaluate.main(["--run-dir", str(run_dir), "--data-dir", str(text_data)])
    first = load_manifest(text_data).fingerprint
    says = f" on {text_data} ({first}), which the run was trained on from step 0 to 4"
    assert says in capsys.readouterr().out
    evaluate.main(["--run-dir", str(run_dir)])
    assert "which the run was" not in capsys.readouterr().out


def test_an_export_names_both_data_sets_and_their_sources(
    branched: Path, text_data: Path, other_data: Path, tmp_path: Path
) -> None:
    first, second = (load_manifest(data).fingerprint for data in (text_data, other_data))
    flags = ["--run-dir", str(branched), "--architecture", "tablefree"]
    export_hf.main([*flags, "--output-dir", str(tmp_path / "export")])
    card = (tmp_path / "export" / "README.md").read_text()
    assert (
        f"Data sets, one after the other (fingerprints): `{first}` from step 0 to 4, `{second}` "
        "from step 5 on.\n"
    ) in card
    assert "\n| from step 0 to 4 | sotu | " in card
    assert "\n| from step 5 on | later | later.jsonl | 1 | CC0-1.0 |\n" in card
    marker = json.loads((tmp_path / "export" / "tablefree_export.json").read_bytes())
    assert marker["fingerprint"] == second
    assert marker["data_stages"] == [
        {"fingerprint": first, "first_step": 0},
        {"fingerprint": second, "first_step": 5},
    ]
    # it may be made again in its place, but not by a run that had the newer data set alone
    checkpoint = load_for_reading(branched)
    written = read_marker(tmp_path / "export")
    assert written is not None
    assert why_precious(tmp_path / "export", written, checkpoint) is None
    newer_alone = replace(written, data_stages=None)
    why = why_precious(tmp_path / "export", newer_alone, checkpoint)
    assert why is not None
    assert why.startswith("holds an export of another run (data_stages None, here [")


def test_sinks_draw_bits_per_byte_of_each_validation_set_and_mark_the_change(
    branched: Path, text_data: Path, other_data: Path
) -> None:
    stages = read_state(branched).data_stages
    ratios = [bytes_per_token(load_manifest(data)) for data in (text_data, other_data)]
    assert ratios[0] != ratios[1]
    about = AboutRun(
        run_dir=branched,
        config={},
        restarts=frozenset(),
        bytes_per_token=ratios[1],
        earlier_texts=earlier_texts(stages),
    )
    drawn = [told(record, about).figures for record in steps_between(branched, 0, STEPS)]
    for step, ratio in ((4, ratios[0]), (9, ratios[1]), (14, ratios[1])):
        assert ratio is not None
        bits = drawn[step]["validation/loss"] / math.log(2) / ratio
        assert drawn[step]["validation/bits_per_byte"] == pytest.approx(bits)
    assert [step for step, figures in enumerate(drawn) if "marks/other_data" in figures] == [5]
    gone = (replace(stages[0], data_dir=str(branched)), *stages[1:])
    about = replace(about, earlier_texts=earlier_texts(gone))
    before = told(next(steps_between(branched, 4, 5)), about).figures
    assert "validation/loss" in before
    assert "validation/bits_per_byte" not in before


def test_the_report_tells_of_each_data_set(
    branched: Path, text_data: Path, other_data: Path, tmp_path: Path
) -> None:
    first, second = (load_manifest(data) for data in (text_data, other_data))
    page = page_of(tmp_path / "report.html", branched, flags=("--png", str(tmp_path / "images")))
    text = Words(page).text
    assert f"other data from step 6 on: {second.fingerprint}" in text
    assert f"# data set of steps 1 to 5: fingerprint {first.fingerprint}" in text
    assert f"# data set of steps 6 to 15: fingerprint {second.fingerprint}" in text
    assert f"# and found at {text_data}" in text
    assert f"Fingerprint {first.fingerprint}, 512 ids." in text
    epochs = second.epochs(10 * STEP)["later"]
    assert f"{epochs:.2f}" in text
    (run,) = figures_in(page)["runs"]
    assert "data" in run["marks"]["kinds"]
    of_data = run["marks"]["kinds"].index("data")
    assert run["marks"]["places"]["steps"][of_data] == BRANCHED
    ratios = [ratio_of(data, "validation") for data in (first, second)]
    assert run["validation_bytes_per_token"] == pytest.approx([ratios[0], ratios[1], ratios[1]])
    assert len(run["bytes_per_token"]) == len(run["series"]["loss"]["mean"]) == STEPS
    assert len(set(run["bytes_per_token"][:5])) == len(set(run["bytes_per_token"][5:])) == 1
    # the best is of the newest validation set alone
    validations = [record.val_loss for record in steps_between(branched, 5, STEPS)]
    best = min(loss for loss in validations if loss is not None)
    assert ratios[1] is not None
    assert f"{best / math.log(2) / ratios[1]:.4f}" in text
    assert (tmp_path / "images" / "bits_per_byte.png").is_file()


def test_the_report_names_documents_of_each_data_set(branched: Path, text_data: Path) -> None:
    recipe = recipe_of_run(branched, None, [])
    notes: list[str] = []
    worst = WorstSteps(
        steps=tuple(StandsOut(done=done, loss=9.0, above=1.0) for done in (5, 6)),
        before=5,
        least=0.1,
    )
    stages = read_state(branched).data_stages
    found = data_of_stages(stages, [], recipe, worst, notes)
    assert notes == []
    assert found.documents[4] == documents_of_steps(text_data, recipe, [4])[4]
    assert all(name.startswith("addresses.jsonl, row ") for name in found.documents[4].named)
    assert all(name.startswith("later.jsonl, row ") for name in found.documents[5].named)
    gone = (replace(stages[0], data_dir="/gone"), *stages[1:])
    found = data_of_stages(gone, [], recipe, worst, notes)
    assert list(found.documents) == [5]
    (note,) = notes
    assert note.startswith(f"the data set {stages[0].fingerprint} of its steps 1 to 5 is not at ")


def traced(run_dir: Path, data: Path, step: int, row: int) -> str:
    """What pretrain.trace prints of a row."""
    said = io.StringIO()
    flags = ["--run-dir", str(run_dir), "--data-dir", str(data), "--row", str(row)]
    with contextlib.redirect_stdout(said):
        trace.main([*flags, "--step", str(step)])
    return said.getvalue()

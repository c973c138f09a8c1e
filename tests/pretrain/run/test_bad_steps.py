"""Steps that must not reach the weights: found, decided alike on every rank, recorded, and
replayed from the record.
"""

import json
import math
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.forked_ranks import be_a_rank, run_ranks, train_on
from support.hand_made_runs import manifest_of
from support.hand_made_shards import write_dataset, write_source
from support.poisoned_ranks import be_a_poisoned_rank, poisoned_run
from support.runs import counting_documents, write_recipe

from data_prep.errors import UserError
from pretrain.checkpoint.find import load_for_reading
from pretrain.checkpoint.layout import saved_steps
from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.checkpoint.reader import Checkpoint
from pretrain.config.recipe import BadStepsRecipe
from pretrain.distributed.world import World
from pretrain.engine.figures import no_number
from pretrain.metrics.metrics_file import read_steps
from pretrain.metrics.step_record import SkippedStep, StepRecord, tokens_per_second
from pretrain.run.bad_steps import FEWEST_STEPS, RUNNING_STEPS, BadSteps, Decision

ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)
STEPS = 190
NOISE = range(50, 1200, 230)
LONG = f"--train_tokens={STEPS * 6 * 32}"
TIMINGS = (
    "tokens_per_s",
    "tokens_per_s_per_rank",
    "step_s",
    "seconds",
    "peak_memory_bytes",
    "slowest",
    "mfu_of_matmul",
)
SPIKES = "--bad_steps.spike_deviations=6"


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock measured; exactly one for every step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def skips(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "skips.jsonl").read_text().splitlines()]


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    checkpoint = load_for_reading(run_dir)
    states = ("master", "exp_avg", "exp_avg_sq")
    return {
        f"{name}/{state}": checkpoint.parameter(name, state)
        for name in checkpoint.shapes
        for state in states
    }


def is_same(left: Path, right: Path) -> bool:
    """Whether two runs took the same steps and ended in the same state, bit for bit."""
    ours, theirs = final_state(left), final_state(right)
    trained = [
        [{**line, "val_loss": 0, "val_perplexity": 0} for line in metrics(run)]
        for run in (left, right)
    ]
    return trained[0] == trained[1] and all(torch.equal(ours[name], theirs[name]) for name in ours)


# The judge


def judge_of(tmp_path: Path, **recipe: Any) -> BadSteps:
    return BadSteps(tmp_path, BadStepsRecipe(**recipe), ALONE)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_bad_from_the_first_step_on(value: float, tmp_path: Path) -> None:
    assert no_number(1.0, value)
    assert no_number(value, 1.0)
    assert no_number(1.0, 1e30) is None
    assert judge_of(tmp_path).judge(1.0, value) == f"loss 1.0, gradient norm {value}"


@given(
    values=st.lists(st.floats(0.5, 1.5), min_size=FEWEST_STEPS, max_size=200),
    limit=st.floats(3.0, 20.0),
)
def test_a_spike_is_what_lies_so_many_deviations_above_the_median_of_the_steps_before(
    values: list[float], limit: float
) -> None:
    judge = judge_of(Path("nowhere"), spike_deviations=limit)
    judge.recent.extend((value, 1.0) for value in values)
    window = np.array(values[-RUNNING_STEPS:])
    deviation = 1.4826 * np.median(np.abs(window - np.median(window)))
    edge = float(np.median(window) + limit * deviation)
    before = list(judge.recent)
    reason = judge.judge(edge * (1 + 1e-9) + 1e-9, 1.0)
    assert reason is not None
    assert reason.startswith("loss ")
    assert list(judge.recent) == before  # what was refused moves nothing
    assert judge.judge(edge * (1 - 1e-9) - 1e-9, 1.0) is None
    assert len(judge.recent) == min(RUNNING_STEPS, len(before) + 1)


def test_spikes_of_the_norm_count_too_downward_ones_and_early_ones_do_not(tmp_path: Path) -> None:
    judge = judge_of(tmp_path, spike_deviations=5.0)
    assert [
        judge.judge(2.0 + 0.1 * (i % 3), 1.0 + 0.1 * (i % 5)) for i in range(FEWEST_STEPS - 1)
    ].count(None) == 31
    assert judge.judge(90.0, 1.0) is None  # too early to tell
    assert "gradient norm 9" in (judge.judge(2.0, 9.0) or "")
    assert judge.judge(0.001, 0.001) is None
    assert judge_of(tmp_path).judge(1e9, 1e9) is None  # by default nothing is a spike


def test_after_so_many_bad_steps_in_a_row_the_run_stops(tmp_path: Path) -> None:
    judge = judge_of(tmp_path, max_in_a_row=3)
    decided = []
    for step in (4, 5, 7, 8, 9, 10):
        decided.append(judge.decide(step))
        judge.record(decision_on(step, policy=decided[-1]), {})
    assert decided == ["skip", "skip", "skip", "skip", "skip", "stop"]
    assert [judge.replayed(step) is not None for step in range(4, 12)] == [
        True,
        True,
        False,
        *[True] * 3,
        False,
        False,
    ]


def decision_on(step: int, policy: str = "skip") -> Decision:
    return Decision(step=step, reason="loss nan", policy=policy, loss=None, gradient_norm=1.5)


def test_decisions_survive_torn_lines_and_a_lost_file(tmp_path: Path) -> None:
    first = judge_of(tmp_path)
    first.judge(1.5, 0.1)
    first.record(decision_on(3), {"documents": [["a.txt", 7]]})
    first.record(decision_on(9), {})
    with (tmp_path / "skips.jsonl").open("a") as file:
        file.write('{"step": 11, "reas')
    second = judge_of(tmp_path)
    second.restore(None)
    assert second.decisions == first.decisions == {3: decision_on(3), 9: decision_on(9)}
    second.record(decision_on(12), {})
    assert [record["step"] for record in skips(tmp_path)] == [3, 9, 12]
    assert skips(tmp_path)[0]["documents"] == [["a.txt", 7]]
    (tmp_path / "skips.jsonl").unlink()
    third = judge_of(tmp_path)
    manifest = manifest_of(9, {}, skips=first.skips_before(9), recent_steps=tuple(first.recent))
    third.restore(CheckpointManifest.from_json(manifest.to_json()))
    assert third.decisions == {3: decision_on(3)}  # of those before the checkpoint's step
    assert list(third.recent) == [(1.5, 0.1)]
    (tmp_path / "skips.jsonl").write_text("no json\n")
    with pytest.raises(UserError, match=r"skips.jsonl: damaged"):
        judge_of(tmp_path).restore(None)


# Real runs: a document of noise among such that can be learned


@pytest.fixture(scope="module")
def noisy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents that count up in few ids, and some of noise in others, long enough for two
    windows.
    """
    data_dir = tmp_path_factory.mktemp("noisy") / "dataset"
    documents = counting_documents(1200, 40, 1)
    for row in NOISE:
        documents[row] = np.random.default_rng(row).integers(41, 512, 70).tolist()
    validation = write_source(data_dir, "validation", "up", counting_documents(12, 40, 3), 0)
    return write_dataset(
        data_dir,
        [write_source(data_dir, "train", "up", documents, 0), validation],
        {"up": 1.0},
        512,
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sections: dict[str, Any] = {
        "validation": {"every_steps": 95},
        "checkpoints": {"every_steps": 10, "keep_last": 20},
    }
    sections["batch"] = {"micro_batch_size": 3}  # two micro-steps on one rank, one on two
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", **sections)


@pytest.fixture(scope="module")
def skipped(recipe: Path, noisy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that met spikes and skipped them."""
    run_dir = tmp_path_factory.mktemp("skipped") / "run"
    output = train_on(1, recipe, noisy_data, run_dir, LONG, SPIKES)
    assert "is skipped: " in output
    assert "skips.jsonl tells why" in output
    return run_dir


def test_a_spike_is_skipped_and_its_record_leads_to_the_document_that_made_it(
    skipped: Path,
) -> None:
    records = skips(skipped)
    assert 1 <= len(records) <= 4
    for record in records:
        worst = record["documents"][record["worst_row"]["row"]]
        assert [row for _, row in worst if row in NOISE], record
        step = record["step"]
        assert record["samples"] == list(range(6 * step, 6 * step + 6))
        assert record["policy"] == "skip"
        assert len(record["documents"]) == 6
        line = metrics(skipped)[step]
        assert (line["loss"], line["gradient_norm"]) == (record["loss"], record["gradient_norm"])
        assert line["skipped"] == record["reason"]
        assert "running median" in record["reason"]
    manifest = load_for_reading(skipped).manifest
    assert manifest.optimizer_step == STEPS - len(records)
    assert [record["step"] for record in manifest.skips] == [record["step"] for record in records]
    assert len(manifest.recent_steps) == RUNNING_STEPS


def test_recorded_decisions_are_replayed_not_made_again(
    skipped: Path, recipe: Path, noisy_data: Path, tmp_path: Path
) -> None:
    """The run goes back to the checkpoint before its first skip, and on without the key that
    made it.
    """
    run_dir = tmp_path / "run"
    shutil.copytree(skipped, run_dir)
    first = skips(run_dir)[0]["step"]
    for path in (run_dir / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > first:
            shutil.rmtree(path)
    state = json.loads((run_dir / "state.json").read_text())
    (run_dir / "state.json").write_text(json.dumps({**state, "status": "running"}))
    train_on(1, recipe, noisy_data, run_dir, LONG)
    assert is_same(run_dir, skipped)
    assert skips(run_dir) == skips(skipped)


def test_a_run_stopped_anywhere_decides_as_an_unbroken_one_on_other_ranks_too(
    skipped: Path, recipe: Path, noisy_data: Path, tmp_path: Path
) -> None:
    first = skips(skipped)[0]["step"]
    train_on(
        1, recipe, noisy_data, tmp_path / "run", LONG, SPIKES, "--stop-at-step", str(first - 3)
    )
    train_on(1, recipe, noisy_data, tmp_path / "run", LONG, SPIKES)
    assert is_same(tmp_path / "run", skipped)
    train_on(2, recipe, noisy_data, tmp_path / "two", LONG, SPIKES)
    assert [record["step"] for record in skips(tmp_path / "two")] == [
        record["step"] for record in skips(skipped)
    ]
    assert [line["loss"] for line in metrics(tmp_path / "two")] == pytest.approx(
        [line["loss"] for line in metrics(skipped)], rel=1e-3
    )


def test_rewind_goes_back_to_a_checkpoint_and_skips_the_step_when_it_comes_to_it(
    skipped: Path, recipe: Path, noisy_data: Path, tmp_path: Path
) -> None:
    output = train_on(
        1, recipe, noisy_data, tmp_path / "run", LONG, SPIKES, "--bad_steps.policy=rewind"
    )
    records = skips(tmp_path / "run")
    for record in records:
        assert (
            f"continuing from {tmp_path}/run/checkpoints/step-{record['step'] // 10 * 10:08d}"
            in output
        )
    assert [record["policy"] for record in records] == ["rewind"] * len(records)
    assert is_same(tmp_path / "run", skipped)  # what went wrong was the batch, not the state


def test_stop_ends_the_run_with_one_line_and_the_same_command_goes_on_with_skip(
    skipped: Path, recipe: Path, noisy_data: Path, tmp_path: Path
) -> None:
    ended = run_ranks(
        1, recipe, noisy_data, tmp_path / "run", LONG, SPIKES, "--bad_steps.policy=stop"
    )
    assert ended.exit_codes == [2]
    (line,) = [line for line in ended.output.splitlines() if line.startswith("error:")]
    first = skips(skipped)[0]
    assert f"step {first['step']}: {first['reason']}; nothing of it reached the weights" in line
    assert "--bad_steps.policy=skip the same command goes on without it" in line
    assert "Traceback" not in ended.output
    assert json.loads((tmp_path / "run" / "state.json").read_text())["status"] == "failed"
    train_on(1, recipe, noisy_data, tmp_path / "run", LONG, SPIKES)
    assert is_same(tmp_path / "run", skipped)


# No number, on one rank of two


def test_a_gradient_that_is_no_number_on_one_rank_is_skipped_on_all_and_its_text_kept(
    text_data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    ended = poisoned_run(2, "3 7", recipe, text_data, tmp_path / "run")
    assert ended.exit_codes == [0, 0], ended.output
    records = skips(tmp_path / "run")
    assert [record["step"] for record in records] == [3, 7]
    assert all("gradient norm" in record["reason"] for record in records)
    assert all(record["gradient_norm"] is None for record in records)
    text = records[0]["worst_row"]["text"]
    assert sum(character.isalpha() for character in text) > 20
    checkpoint = load_for_reading(tmp_path / "run")
    assert (checkpoint.step, checkpoint.manifest.optimizer_step) == (20, 18)
    assert all(
        bool(torch.isfinite(values).all()) for values in final_state(tmp_path / "run").values()
    )
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.5  # it learned all the same
    steps = read_steps(tmp_path / "run")
    assert [step.step for step in steps if isinstance(step, SkippedStep)] == [3, 7]
    seconds = [step.step_s for step in steps if isinstance(step, StepRecord)]
    assert tokens_per_second(steps) == pytest.approx(18 * 6 * 32 / sum(seconds))


def test_the_quick_start_s_summary_takes_a_run_that_skipped_steps(
    text_data: Path, tmp_path: Path
) -> None:
    """The last step too, whose line has no times either."""
    from launch.demo import summary
    from pretrain import evaluate, export_hf

    run_dir = tmp_path / "run"
    recipe = write_recipe(tmp_path / "r.yaml", train_tokens=8 * 6 * 32)
    assert poisoned_run(1, "3 7", recipe, text_data, run_dir).exit_codes == [0]
    shutil.copytree(text_data, run_dir / "dataset")
    evaluate.main(["--run-dir", str(run_dir)])
    export_hf.main(["--run-dir", str(run_dir), "--output-dir", str(run_dir / "hf")])
    summary.main([str(run_dir), "4", str(time.time() - 100)])
    figures = json.loads((run_dir / "summary.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "skipped" not in line]
    assert len(trained) == 6
    seconds = sum(line["step_s"] for line in trained)
    assert figures["tokens_per_s"] == pytest.approx(6 * 6 * 32 / seconds)
    assert (figures["steps"], figures["train_tokens"]) == (8, 8 * 6 * 32)
    page = (run_dir / "summary.txt").read_text()
    assert f"1,536 tokens in 8 steps at {figures['tokens_per_s']:,.0f} tokens/s" in page
    assert "█" * 32 + "\n" in page
    assert figures["sample"].startswith("The state of the Union")
    assert re.search(r"\n  whole job    1 min 4\d s\n", page)
    assert page.endswith(f"\n  report       {run_dir / 'report.html'}\n")


def test_a_run_that_diverges_stops_after_so_many_bad_steps(tiny_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", bad_steps={"max_in_a_row": 4})
    ended = poisoned_run(1, "6 7 8 9 10 11 12", recipe, tiny_data, tmp_path / "run")
    assert ended.exit_codes == [2]
    (line,) = [line for line in ended.output.splitlines() if line.startswith("error:")]
    assert line.startswith("error: step 10: ")
    assert "All 4 steps before it were bad too: training diverged" in line


def saved(run_dir: Path) -> list[int]:
    return [Checkpoint(path).step for path in saved_steps(run_dir)]


def test_while_steps_are_bad_no_checkpoint_of_before_is_dropped(
    tiny_data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml", checkpoints={"every_steps": 2, "keep_last": 1}, train_tokens=8 * 6 * 32
    )
    ended = poisoned_run(1, "5", recipe, tiny_data, tmp_path / "one", "--stop-at-step", "6")
    assert ended.exit_codes == [0], ended.output
    assert saved(tmp_path / "one") == [6, 4]  # training may have diverged by step 5
    assert poisoned_run(1, "", recipe, tiny_data, tmp_path / "one").exit_codes == [0]
    assert saved(tmp_path / "one") == [8]
    ended = poisoned_run(1, "4 5", recipe, tiny_data, tmp_path / "both", "--stop-at-step", "7")
    assert ended.exit_codes == [0], ended.output
    assert "step-00000006" not in ended.output
    assert saved(tmp_path / "both") == [7]  # none of step 6, whose state was that of step 4
    ended = poisoned_run(1, "4 5", recipe, tiny_data, tmp_path / "end", "--stop-at-step", "6")
    assert saved(tmp_path / "end") == [6, 4]  # where a run ends it is saved


def be_a_rank_whose_weights_are_spoilt(
    arguments: list[str], variables: dict[str, str], log: Path
) -> None:
    """Body of a forked rank in which one weight is no number any more after so many steps, as a
    failing device does.
    """
    from pretrain.engine.engine import Engine

    after, calls, honest = int(variables["SPOILT_AFTER"]), iter(range(1, 10**6)), Engine.train_step

    def train_step(engine: Engine, *step: Any) -> Any:
        figures = honest(engine, *step)
        if next(calls) == after:
            if engine.world.is_main:
                next(engine.zero_state.owned()).states["master"][0] = torch.nan
            engine.deepspeed.optimizer.update_lp_params()  # all ranks: it gathers
        return figures

    Engine.train_step = train_step  # type: ignore[method-assign]
    be_a_rank(arguments, variables, log)


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_are_no_numbers_end_a_run_before_anything_is_lost_for_them(
    ranks: int, tiny_data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", checkpoints={"keep_last": 1})
    run_dir, body = tmp_path / "run", be_a_rank_whose_weights_are_spoilt
    ended = run_ranks(ranks, recipe, tiny_data, run_dir, body=body, SPOILT_AFTER="8")
    # the device may be well again: --max-restarts tries
    assert ended.exit_codes == [1] * ranks, ended.output
    (said,) = {line for line in ended.output.splitlines() if line.startswith("error:")}
    assert "step-00000010: not written: " in said
    assert "holds what is no number" in said
    assert saved(run_dir) == [5]
    train_on(ranks, recipe, tiny_data, run_dir)
    assert saved(run_dir) == [20]
    # what was skipped stays so
    assert load_for_reading(run_dir).manifest.optimizer_step == 20 - len(skips(run_dir))


def test_rewind_in_the_first_steps_goes_back_to_the_start(tiny_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    rewound = poisoned_run(
        2, "2", recipe, tiny_data, tmp_path / "rewound", "--bad_steps.policy=rewind"
    )
    assert rewound.exit_codes == [0, 0], rewound.output
    assert "continuing from" in rewound.output
    assert "step-00000000" in rewound.output
    assert poisoned_run(2, "2", recipe, tiny_data, tmp_path / "skipped").exit_codes == [0, 0]
    assert is_same(tmp_path / "rewound", tmp_path / "skipped")


def be_a_poisoned_rank_that_loads_slowly(
    arguments: list[str], variables: dict[str, str], log: Path
) -> None:
    """Body of a forked rank that has steps whose gradients are no numbers, and takes 7 s to go
    back.
    """
    from pretrain.run import lifecycle, trainer

    honest = trainer.restore
    seconds = iter([0, 7])  # at the start, and when it rewinds

    def restore(*what: Any) -> int:
        time.sleep(next(seconds))
        return honest(*what)

    lifecycle.restore = restore  # type: ignore[attr-defined]
    trainer.restore = restore
    be_a_poisoned_rank(arguments, variables, log)


def test_a_rewind_may_load_for_longer_than_a_run_may_stall(tiny_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml", bad_steps={"policy": "rewind"}, stalls={"after_s": 2.0}
    )
    body = be_a_poisoned_rank_that_loads_slowly
    ended = run_ranks(1, recipe, tiny_data, tmp_path / "run", body=body, POISONED="12")
    assert "rewinding from step 12" in ended.output
    assert ended.exit_codes == [0], ended.output


def test_a_run_that_starts_over_with_other_values_has_no_decisions_to_replay(
    tiny_data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", checkpoints={"every_steps": 100})
    diverging = ("--optimizer.peak_learning_rate=1e30", "--optimizer.gradient_clipping=1e30")
    ended = run_ranks(1, recipe, tiny_data, tmp_path / "run", *diverging)
    assert ended.exit_codes == [2]
    assert len(skips(tmp_path / "run")) > 5
    output = train_on(1, recipe, tiny_data, tmp_path / "run")
    assert "skipped" not in output
    assert not (tmp_path / "run" / "skips.jsonl").exists()
    assert load_for_reading(tmp_path / "run").manifest.optimizer_step == 20

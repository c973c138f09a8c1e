"""The trainer's records: complete whoever looks at them, and read back as they were."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.forked_ranks import be_a_rank, run_ranks
from support.hand_made_runs import trained_step
from support.runs import write_recipe

from pretrain.metrics.metrics_file import read_steps
from pretrain.metrics.step_record import (
    RankFigures,
    SkippedStep,
    StepRecord,
    step_of_line,
)

MEASURED = {
    "tokens_per_s",
    "tokens_per_s_per_rank",
    "step_s",
    "seconds",
    "peak_memory_bytes",
    "slowest",
    "mfu",
}


def be_a_rank_on_a_known_device(
    arguments: list[str], variables: dict[str, str], log: Path, *, shows: bool = True
) -> None:
    """Body of a forked rank whose device has a peak; without `shows`, nothing is displayed."""
    from pretrain.costs.devices import find_device
    from pretrain.metrics import utilisation
    from pretrain.view.progress import Progress

    known = find_device("NVIDIA H200")
    assert known
    utilisation.find_device = lambda *_: known  # type: ignore[assignment]
    if not shows:
        Progress.show = lambda *_: None  # type: ignore[assignment, method-assign]
    be_a_rank(arguments, variables, log)


def be_a_rank_that_shows_nothing(
    arguments: list[str], variables: dict[str, str], log: Path
) -> None:
    """The same with its display off."""
    be_a_rank_on_a_known_device(arguments, variables, log, shows=False)


def what_is_not_measured(step: StepRecord) -> dict[str, Any]:
    """Of a line, all that two runs must have in common."""
    line = step.to_line()
    return {name: value for name, value in line.items() if name not in MEASURED}


def test_a_run_with_its_display_off_writes_the_same_lines(tiny_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    bodies = {"shown": be_a_rank_on_a_known_device, "quiet": be_a_rank_that_shows_nothing}
    steps: dict[str, list[StepRecord]] = {}
    for name, body in bodies.items():
        ended = run_ranks(1, recipe, tiny_data, tmp_path / name, body=body)
        assert ended.exit_codes == [0], ended.output
        assert ("MFU" in ended.output) == (name == "shown")
        found = read_steps(tmp_path / name)
        steps[name] = [step for step in found if isinstance(step, StepRecord)]
        keys = [list(json.loads(line)) for line in (tmp_path / name / "metrics.jsonl").open()]
        assert {len(each) for each in keys} == {len(keys[0]), len(keys[0]) + 2}  # validations
        assert all(each[-1] == "mfu" for each in keys)
        assert all(step.mfu is not None and step.mfu > 0 for step in steps[name])
    shown, quiet = steps.values()
    assert len(shown) == 20
    assert list(map(what_is_not_measured, shown)) == list(map(what_is_not_measured, quiet))


@pytest.mark.parametrize(
    "step",
    [
        trained_step(3),
        StepRecord(
            **{
                **vars(trained_step(4)),
                "slowest": RankFigures(rank=1, seconds={"data": 0.5}, peak_memory_bytes=7),
                "val_loss": 2.5,
                "mfu": 0.25,
            }
        ),
        StepRecord(**{**vars(trained_step(4)), "mfu_of_matmul": 0.25}),
        SkippedStep(
            step=5,
            loss=None,
            gradient_norm=1.5,
            learning_rate=1e-3,
            tokens=1152,
            skipped="loss nan, gradient norm 1.5",
            val_loss=2.25,
        ),
    ],
    ids=["trained", "with all there is", "on a CPU", "skipped"],
)
def test_a_record_is_read_back_as_it_was_written(step: StepRecord | SkippedStep) -> None:
    line = json.loads(json.dumps(step.to_line()))
    assert step_of_line(line) == step
    assert list(step_of_line(line).to_line()) == list(line)  # the order of its fields, too

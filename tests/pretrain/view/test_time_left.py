"""The time a run still takes counts validations and saves, and a long validation is no silence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.runs import tiny_recipe_content

from pretrain.config.load import build_recipe
from pretrain.config.recipe import Recipe
from pretrain.distributed.agree import LOG
from pretrain.distributed.world import World
from pretrain.view.progress import Progress
from pretrain.view.time_left import TimeLeft, times_due

ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)


def recipe(**sections: object) -> Recipe:
    return build_recipe(tiny_recipe_content(**sections), "tiny.yaml")


@given(every=st.integers(1, 30), done=st.integers(0, 60), total=st.integers(1, 60))
def test_what_is_due_is_counted_as_the_trainer_counts_it(every: int, done: int, total: int) -> None:
    steps = range(done, total)
    assert times_due(every, done, total) == sum(
        (step + 1) % every == 0 or step + 1 == total for step in steps
    )


def test_validations_and_saves_to_come_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    left = TimeLeft(recipe(), validation_tokens=256)  # 20 steps, a validation and a save every 5
    for step_s in (2.0, 2.0, 50.0):  # one slow step is no reason to think that all are
        left.saw_step(step_s, 0.5)
    left.pause_s = {"validation": 100.0, "save": 7.0}
    assert left.seconds(3) == 17 * 2 + 4 * 107
    assert left.seconds(15) == 5 * 2 + 107
    assert left.seconds(20) == 0


def test_a_validation_that_was_not_made_yet_is_thought_to_take_forward_passes() -> None:
    left = TimeLeft(recipe(), validation_tokens=192 * 1000)  # steps are of 192 tokens
    left.saw_step(2.0, 0.5)
    assert left.seconds(19) == 2.0 + 1000 * 0.5
    with left.during("validation"):
        pass
    assert left.seconds(19) < 3


def progress_of(world: World, every_s: float) -> Progress:
    return Progress(TimeLeft(recipe(log={"every_s": every_s}), 0), 0, world)


def test_a_long_validation_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    progress = progress_of(ALONE, 1e-9)  # as if every batch took longer than that
    seen = list(progress.validating(iter("abcd"), 4))
    assert seen == list("abcd")
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("validating: ")
    ]
    assert [line.split()[1] for line in lines] == ["25%", "50%", "75%"]
    assert all(line.endswith(" left of it") for line in lines)


def test_short_validations_other_ranks_and_quiet_runs_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = World(rank=1, world_size=2, local_rank=1, local_world_size=2)
    assert list(progress_of(ALONE, 15.0).validating(iter("abcd"), 4)) == list("abcd")
    assert list(progress_of(other, 1e-9).validating(iter("abcd"), 4)) == list("abcd")
    monkeypatch.setattr(LOG, "is_quiet", True)
    assert list(progress_of(ALONE, 1e-9).validating(iter("abcd"), 4)) == list("abcd")
    assert capsys.readouterr().err == ""

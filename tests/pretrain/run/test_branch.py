import shutil
from pathlib import Path

import pytest
from support.forked_ranks import run_ranks, train_on
from support.runs import losses, write_recipe

WSD = {"kind": "wsd", "warmup_steps": 2, "decay_steps": 3, "warmup_fraction": 0.0}
STEP = 6 * 32  # tokens


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps, stable from the third to the seventeenth, a checkpoint every five."""
    path = tmp_path_factory.mktemp("recipe") / "wsd.yaml"
    return write_recipe(path, schedule=WSD, checkpoints={"keep_last": 4}, train_tokens=20 * STEP)


@pytest.fixture(scope="module")
def trunk(recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run to branch from, at its end."""
    run_dir = tmp_path_factory.mktemp("trunk") / "run"
    train_on(1, recipe, tiny_data, run_dir)
    return run_dir


def branch(trunk: Path, step: int, *more: str) -> list[str]:
    return ["--branch-from", str(trunk / "checkpoints" / f"step-{step:08d}"), *more]


@pytest.mark.parametrize("length", [13, 25])
def test_a_branch_of_another_length_is_what_a_run_of_that_length_is(
    length: int, trunk: Path, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    tokens = f"--train_tokens={length * STEP}"
    output = train_on(1, recipe, tiny_data, tmp_path / "branch", *branch(trunk, 10, tokens))
    assert f"branching from {trunk}/checkpoints/step-00000010" in output
    train_on(1, recipe, tiny_data, tmp_path / "whole", tokens)
    assert len(losses(tmp_path / "branch")) == length
    # bit for bit, the steps of the trunk too
    assert losses(tmp_path / "branch") == losses(tmp_path / "whole")


def test_a_branch_stopped_goes_on_by_the_same_command_and_leaves_its_trunk_alone(
    trunk: Path, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in trunk.rglob("*") if path.is_file()}
    flags = branch(trunk, 10, f"--train_tokens={15 * STEP}")
    train_on(1, recipe, tiny_data, tmp_path / "run", *flags, "--stop-at-step", "12")
    output = train_on(1, recipe, tiny_data, tmp_path / "run", *flags)
    assert "step-00000012" in output
    ended = run_ranks(
        1, recipe, tiny_data, tmp_path / "run", *branch(trunk, 15, f"--train_tokens={15 * STEP}")
    )
    assert ended.exit_codes == [2]
    assert (
        f"has checkpoints already, branched from {trunk}/checkpoints/step-00000010; leave"
        in ended.output
    )
    assert len(losses(tmp_path / "run")) == 15
    assert {path: path.read_bytes() for path in trunk.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("step", "more", "says"),
    [
        (20, ["--train_tokens=4800"], "step 17 had learning rate 0.007"),  # already in the decay
        (10, ["--schedule.warmup_steps=4"], "give the warm-up as schedule.warmup_steps=2"),
        (10, ["--seed=7"], "this run was started with seed=1, got 7"),
        (10, ["--train_tokens=1920"], "10 steps are taken, train_tokens asks for 10; ask for more"),
        (10, ["--deepspeed-config", "zero2_bf16"], "bf16.enabled=None, got True"),
        (11, [], "; beside it: step-00000020, step-00000015, step-00000010, step-00000005"),
    ],
)
def test_a_branch_that_its_trunk_could_not_have_grown_is_refused(
    step: int,
    more: list[str],
    says: str,
    trunk: Path,
    recipe: Path,
    tiny_data: Path,
    tmp_path: Path,
) -> None:
    ended = run_ranks(1, recipe, tiny_data, tmp_path / "run", *branch(trunk, step, *more))
    assert ended.exit_codes == [2]
    (line,) = [line for line in ended.output.splitlines() if line.startswith("error:")]
    assert says in line
    assert "Traceback" not in ended.output
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_no_origin(
    trunk: Path, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(trunk, tmp_path / "trunk")
    file = next((tmp_path / "trunk" / "checkpoints" / "step-00000010").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    ended = run_ranks(1, recipe, tiny_data, tmp_path / "run", *branch(tmp_path / "trunk", 10))
    assert ended.exit_codes == [2]
    assert "differs from its digest" in ended.output
    # rather than a start from nothing
    assert "step 10 was saved, but no good checkpoint is left" in ended.output
    assert "loss" not in ended.output


def test_a_run_named_in_place_of_its_checkpoint_is_told_from_one(
    trunk: Path, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(trunk, tmp_path / "begun", ignore=shutil.ignore_patterns("checkpoints"))
    newest = trunk / "checkpoints" / "step-00000020"
    for origin, advice in ((trunk, f"name one of its checkpoints, such as {newest}"),
                           (tmp_path / "begun", "it has no checkpoint yet")):  # fmt: skip
        ended = run_ranks(1, recipe, tiny_data, tmp_path / "run", "--branch-from", str(origin))
        assert ended.exit_codes == [2]
        assert f"error: --branch-from {origin}: a run, not a checkpoint; {advice}" in ended.output

import json
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.hand_made_runs import manifest_of
from torch import Tensor

from data_prep.errors import UserError
from data_prep.files import digest_file
from pretrain.checkpoint.find import load_for_reading, newest_good
from pretrain.checkpoint.layout import checkpoints_dir, saved_steps
from pretrain.checkpoint.manifest import CheckpointManifest, pointer_to, sidecar_of
from pretrain.checkpoint.reader import UNREADABLE, Checkpoint, Fragment, load_model
from pretrain.checkpoint.retention import prune
from pretrain.checkpoint.saving import Savers, save_checkpoint, write_fragments
from pretrain.config.recipe import ModelRecipe
from pretrain.distributed.world import World
from pretrain.model.build import model_config
from pretrain.modeling_tablefree import (
    TableFreeForCausalLM,
    checkpoint_parameters,
    initialise_parameters,
)

SHAPES = {"matrix": [3, 4], "vector": [5], "cube": [2, 2, 2]}
STATES = ("master", "exp_avg", "exp_avg_sq")
TENSORS, MANIFEST, SIDECAR = (
    "rank-00000-of-00001.safetensors",
    "manifest.json",
    "manifest.json.xxh3_128",
)
ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)


def about(step: int, **more: Any) -> CheckpointManifest:
    return replace(manifest_of(step, SHAPES, optimizer_step=7), **more)


def values_of(step: int = 0) -> dict[str, dict[str, Tensor]]:
    """Each state of each parameter, flat; every element its own number."""
    numbers = iter(range(10_000))
    return {
        name: {
            state: torch.tensor(
                [step + next(numbers) / 7 for _ in range(torch.Size(shape).numel())]
            )
            for state in STATES
        }
        for name, shape in SHAPES.items()
    }


def fragments_between(low: int, high: int) -> list[Fragment]:
    """What a rank owns of all parameters laid one after another, from element `low` up to
    `high`.
    """
    fragments, first = [], 0
    for name, states in values_of().items():
        size = len(states["master"])
        start, end = max(low - first, 0), min(high - first, size)
        if start < end:
            owned = {state: values[start:end] for state, values in states.items()}
            fragments.append(Fragment(name=name, start=start, states=owned))
        first += size
    return fragments


def save_as_ranks(run_dir: Path, cuts: list[int]) -> Checkpoint:
    """A checkpoint whose ranks own the elements between one cut and the next."""
    path = checkpoints_dir(run_dir) / "step-00000007"
    path.mkdir(parents=True)
    bounds = [0, *sorted(cuts), 25]
    files = [
        write_fragments(
            path / f"rank-{rank:05d}-of-{len(cuts) + 1:05d}.safetensors",
            fragments_between(low, high),
        )
        for rank, (low, high) in enumerate(pairwise(bounds))
    ]
    manifest = about(7, files=tuple(files))
    (path / "manifest.json").write_bytes(manifest.to_json())
    (path / "manifest.json.xxh3_128").write_bytes(sidecar_of(path))
    (path.parent / "latest").write_bytes(pointer_to(path))
    return Checkpoint(path)


def save(run_dir: Path, step: int) -> Path:
    """A checkpoint of one rank, the way training saves it."""
    fragments = [
        Fragment(name=name, start=0, states=states) for name, states in values_of(step).items()
    ]
    return save_checkpoint(run_dir, fragments, about(step), Savers(world=ALONE))


def assert_holds(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    assert checkpoint.step == step
    for name, shape in SHAPES.items():
        for state in STATES:
            assert torch.equal(
                checkpoint.parameter(name, state), values_of(step)[name][state].view(shape)
            )


# What is saved reads back


@settings(max_examples=40)
@given(cuts=st.lists(st.integers(0, 25), max_size=3), data=st.data())
def test_any_range_of_any_parameter_reads_back_whatever_ranks_saved_it(
    cuts: list[int], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(SHAPES)))
    state = data.draw(st.sampled_from(STATES))
    expected = values_of()[name][state]
    start = data.draw(st.integers(0, len(expected)))
    count = data.draw(st.integers(0, len(expected) - start))
    with TemporaryDirectory() as directory:
        checkpoint = save_as_ranks(Path(directory), cuts)
        assert torch.equal(
            checkpoint.read(name, state, start, count), expected[start : start + count]
        )
        assert torch.equal(checkpoint.parameter(name, state), expected.view(SHAPES[name]))
        assert checkpoint.damage() is None
        assert newest_good(Path(directory))[1] == []


def test_a_saved_checkpoint_is_plain_safetensors_and_json(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    assert sorted(file.name for file in path.iterdir()) == [MANIFEST, SIDECAR, TENSORS]
    tensors = load_file(path / "rank-00000-of-00001.safetensors")
    assert sorted(tensors) == sorted(f"{name}/{state}" for name in SHAPES for state in STATES)
    assert torch.equal(tensors["vector/exp_avg"], values_of(5)["vector"]["exp_avg"])
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["step"], manifest["optimizer_step"], manifest["parameters"]) == (5, 7, SHAPES)
    pointer = json.loads((path.parent / "latest").read_text())
    digest = digest_file(path / "manifest.json")
    assert pointer == {"checkpoint": "step-00000005", "manifest_xxh3_128": digest}
    # as `xxh128sum --check` reads it
    assert (path / SIDECAR).read_text() == f"{digest}  manifest.json\n"
    assert json.loads((path / MANIFEST).read_text())["files"][0]["xxh3_128"] == digest_file(
        path / TENSORS
    )


def test_a_part_that_no_file_holds_is_missed(tmp_path: Path) -> None:
    checkpoint = save_as_ranks(tmp_path, [6])
    checkpoint._where["matrix"] = checkpoint._where["matrix"][:1]
    with pytest.raises(UserError, match="holds 6 of 12 elements of matrix"):
        checkpoint.parameter("matrix")


def test_a_model_s_masters_come_back_as_the_training_class(tmp_path: Path) -> None:
    recipe = ModelRecipe(
        vocab_size=40,
        d_model=24,
        num_layers=2,
        num_heads=2,
        seq_len=8,
        input_embedding="affine_code",
        code_bits=8,
    )
    model = TableFreeForCausalLM(model_config(recipe))
    initialise_parameters(model, 1)
    shapes = {name: list(value.shape) for name, value in checkpoint_parameters(model)}
    flat = {name: value.detach().flatten() for name, value in checkpoint_parameters(model)}
    fragments = [
        Fragment(name=n, start=0, states=dict.fromkeys(STATES, v)) for n, v in flat.items()
    ]
    for fragment in fragments:
        fragment.states.update({state: values.clone() for state, values in fragment.states.items()})
    more = {"parameters": shapes, "model_config": model.config.to_diff_dict()}
    save_checkpoint(tmp_path, fragments, about(1, **more), Savers(world=ALONE))
    loaded, ids = load_model(load_for_reading(tmp_path)), torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


# Damage


def flip_byte(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damaged", "how", "reason"),
    [
        (
            TENSORS,
            flip_byte,
            f"{TENSORS} differs from its digest: [0-9a-f]{{32}}, expected [0-9a-f]{{32}}",
        ),
        (TENSORS, truncate, rf"{TENSORS} has [\d,]+ bytes, expected [\d,]+"),
        (TENSORS, Path.unlink, f"{TENSORS} is missing"),
        (
            MANIFEST,
            flip_byte,
            f"manifest.json: digest [0-9a-f]{{32}}, {SIDECAR} says [0-9a-f]{{32}}  manifest.json",
        ),
        (
            MANIFEST,
            truncate,
            f"manifest.json: digest [0-9a-f]{{32}}, {SIDECAR} says [0-9a-f]{{32}}  manifest.json",
        ),
        (MANIFEST, Path.unlink, "FileNotFoundError.*manifest.json'"),
        (SIDECAR, flip_byte, f"manifest.json: digest [0-9a-f]{{32}}, {SIDECAR} says"),
        (SIDECAR, truncate, f"manifest.json: digest [0-9a-f]{{32}}, {SIDECAR} says"),
        (SIDECAR, Path.unlink, f"FileNotFoundError.*{SIDECAR}"),
        ("optimizer.pt", Path.touch, "optimizer.pt is not named in manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason_and_the_older_one_used(
    damaged: str, how: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    assert_holds(newest_good(tmp_path)[0], 10)
    how(newest / damaged)
    checkpoint, passed_over = newest_good(tmp_path)
    assert_holds(checkpoint, 5)
    assert len(passed_over) == 1
    assert re.search(rf"step-00000010: .*{reason}.*; passed over$", passed_over[0]), passed_over
    assert load_for_reading(tmp_path).step == 5


@settings(max_examples=30)
@given(file=st.sampled_from([TENSORS, MANIFEST]), place=st.floats(0, 1))
def test_one_flipped_bit_anywhere_in_the_newest_checkpoint_is_found(
    file: str, place: float
) -> None:
    with TemporaryDirectory() as directory:
        run_dir = Path(directory)
        save(run_dir, 5)
        flip_byte(save(run_dir, 10) / file, place)
        checkpoint, passed_over = newest_good(run_dir)
        assert_holds(checkpoint, 5)
        assert len(passed_over) == 1


@settings(max_examples=30)
@given(
    st.sampled_from(["[]", "{}", "3", "null", '{"format": 1}', '"x"', "{", ""])
    | st.text(max_size=5)
)
def test_whatever_the_pointer_or_an_older_manifest_says_a_good_checkpoint_is_found(
    text: str,
) -> None:
    with TemporaryDirectory() as directory:
        run_dir = Path(directory)
        save(run_dir, 5)
        newest = save(run_dir, 10)
        (checkpoints_dir(run_dir) / "latest").write_text(text)
        checkpoint, (said,) = newest_good(run_dir)
        assert_holds(checkpoint, 10)
        assert re.search(r"checkpoints/latest: .*; passed over$", said, re.DOTALL)
        (newest / MANIFEST).write_text(text)
        assert_holds(newest_good(run_dir)[0], 5)


def test_a_pointer_with_another_s_digest_is_said_with_both_values(tmp_path: Path) -> None:
    pointer, save_again = checkpoints_dir(tmp_path) / "latest", []
    for step in (5, 10):
        save_again.append(pointer_to(save(tmp_path, step)).decode())
    pointer.write_text(save_again[1].replace("step-00000010", "step-00000005"))
    checkpoint, (said,) = newest_good(tmp_path)
    assert_holds(checkpoint, 10)
    assert said == f"{pointer}: says {pointer.read_text()}, expected {save_again[0]}; passed over"


def test_a_run_that_has_saved_nothing_has_nothing_to_say(tmp_path: Path) -> None:
    assert newest_good(tmp_path) == (None, [])


def test_a_file_of_a_checkpoint_that_is_not_of_its_format_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    (path / MANIFEST).write_text(json.dumps({"format": "another", "format_version": 1}))
    (path / SIDECAR).write_bytes(sidecar_of(path))
    with pytest.raises(ValueError, match="is not of format tablefree-checkpoint 1"):
        Checkpoint(path)


def test_the_first_rank_s_bad_file_is_named_among_many(tmp_path: Path) -> None:
    checkpoint = save_as_ranks(tmp_path, [6, 12])
    flip_byte(checkpoint.path / "rank-00001-of-00003.safetensors", 0.99)
    # two ranks share three files
    found = [Checkpoint(checkpoint.path).damage(part, 2) for part in (0, 1)]
    assert found[0] is None
    assert str(found[1]).startswith("rank-00001-of-00003.safetensors differs from its digest: ")


def test_a_checkpoint_removed_by_hand_is_said_to_be_missing(tmp_path: Path) -> None:
    save(tmp_path, 5)
    shutil.rmtree(save(tmp_path, 10))
    checkpoint, passed_over = newest_good(tmp_path)
    assert_holds(checkpoint, 5)
    assert passed_over == [f"{checkpoints_dir(tmp_path)}/step-00000010: missing; passed over"]


def test_reading_says_what_is_wrong_when_there_is_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory; train first"):
        load_for_reading(tmp_path / "absent")
    with pytest.raises(UserError, match="no checkpoints; train with "):
        load_for_reading(tmp_path)
    tensors = save(tmp_path, 5) / TENSORS
    with pytest.raises(
        UserError,
        match=rf"the folder of a run's checkpoints; give the run, {re.escape(str(tmp_path))}$",
    ):
        load_for_reading(checkpoints_dir(tmp_path))
    flip_byte(tensors)
    with pytest.raises(UserError, match=r"1 damaged checkpoints \(.*differs from its digest"):
        load_for_reading(tmp_path)


# Names that lead elsewhere


@pytest.mark.parametrize(
    "name",
    [
        "../rank-00000-of-00001.safetensors",
        "/tmp/rank-00000-of-00001.safetensors",
        "..",
        "",
        "manifest.json",
        7,
    ],
)
def test_a_manifest_may_name_files_of_a_checkpoint_alone(name: object, tmp_path: Path) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    shutil.copyfile(newest / TENSORS, newest.parent / TENSORS)
    manifest = json.loads((newest / MANIFEST).read_text())
    manifest["files"][0]["name"] = name
    (newest / MANIFEST).write_text(json.dumps(manifest))
    (newest / SIDECAR).write_bytes(sidecar_of(newest))
    (newest / TENSORS).unlink()
    with pytest.raises(UNREADABLE):
        Checkpoint(newest)
    good, said = newest_good(tmp_path)
    assert_holds(good, 5)
    assert len([line for line in said if f"{newest}: " in line]) == 1


@pytest.mark.parametrize(
    "name", ["../checkpoints/step-00000005", "/tmp", "..", ".", "", "step-5", 7, None, ["a"]]
)
def test_a_pointer_may_name_a_checkpoint_alone(name: object, tmp_path: Path) -> None:
    save(tmp_path, 5)
    pointer = checkpoints_dir(tmp_path) / "latest"
    pointer.write_text(json.dumps({"checkpoint": name, "manifest_xxh3_128": "0" * 32}))
    good, (said,) = newest_good(tmp_path)
    assert_holds(good, 5)
    assert said.startswith(f"{pointer}: ")
    assert said.endswith("; passed over")


# What is no number


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("state", STATES)
def test_states_that_are_no_numbers_are_not_saved(value: float, state: str, tmp_path: Path) -> None:
    save(tmp_path, 5)
    fragments = [
        Fragment(name=name, start=0, states=states) for name, states in values_of(10).items()
    ]
    fragments[1].states[state][-1] = value
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        UserError, match=f"step-00000010: not written: vector/{state} holds what is no number"
    ) as raised:
        save_checkpoint(tmp_path, fragments, about(10), Savers(world=ALONE))
    assert raised.value.exit_code == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert_holds(newest_good(tmp_path)[0], 5)


def test_weights_of_before_that_are_no_numbers_are_passed_over_and_no_step_to_ask_for(
    tmp_path: Path,
) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    spoil(newest, "cube")
    good, said = newest_good(tmp_path)
    assert_holds(good, 5)
    spoilt = "cube/master holds what is no number: the weights were spoilt before they were saved"
    assert said == [f"{newest}: {spoilt}; passed over"]
    with pytest.raises(UserError, match=f"step-00000010: {spoilt}; steps there: 10, 5"):
        load_for_reading(tmp_path, 10)
    spoil(newest.with_name("step-00000005"), "matrix")
    with pytest.raises(UserError, match=r"2 damaged checkpoints .* restore one"):
        load_for_reading(tmp_path)


def spoil(path: Path, name: str) -> None:
    """Make a parameter's last weight of a checkpoint NaN, as a run of before this was checked
    saved it.
    """
    tensors = {key: values.clone() for key, values in load_file(path / TENSORS).items()}
    tensors[f"{name}/master"][-1] = float("nan")
    (path / TENSORS).unlink()
    fragments = [
        Fragment(name=key, start=0, states={state: tensors[f"{key}/{state}"] for state in STATES})
        for key in SHAPES
    ]
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"] = [asdict(write_fragments(path / TENSORS, fragments))]
    (path / MANIFEST).write_text(json.dumps(manifest))
    (path / SIDECAR).write_bytes(sidecar_of(path))
    (path.parent / "latest").write_bytes(pointer_to(path))


# Saving


def test_a_save_that_was_killed_half_way_is_ignored_then_cleared_away(tmp_path: Path) -> None:
    good = save(tmp_path, 5)
    staging = good.with_name(".step-00000010.tmp")
    shutil.copytree(good, staging)
    assert_holds(newest_good(tmp_path)[0], 5)
    assert newest_good(tmp_path)[1] == []
    save(tmp_path, 10)
    assert sorted(path.name for path in good.parent.iterdir()) == [
        "latest",
        "step-00000005",
        "step-00000010",
    ]
    assert_holds(newest_good(tmp_path)[0], 10)


def test_a_full_disk_leaves_the_older_checkpoint_and_the_next_save_works(tmp_path: Path) -> None:
    save(tmp_path, 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # no file of this process may grow beyond 100 bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(
            UserError, match=r"step-00000010: not written: .*File too large; it needs 300 bytes"
        ):
            save(tmp_path, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_holds(newest_good(tmp_path)[0], 5)
    assert newest_good(tmp_path)[1] == []
    save(tmp_path, 10)
    assert_holds(newest_good(tmp_path)[0], 10)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    flip_byte(save(tmp_path, 5) / TENSORS)
    assert newest_good(tmp_path)[0] is None
    save(tmp_path, 5)
    assert_holds(newest_good(tmp_path)[0], 5)


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, step)
    prune(saved_steps(tmp_path)[0], 2)
    assert [path.name for path in saved_steps(tmp_path)] == ["step-00000020", "step-00000015"]
    assert not list(checkpoints_dir(tmp_path).glob(".*"))
    assert_holds(newest_good(tmp_path)[0], 20)


def test_pruning_keeps_every_so_many_th_step(tmp_path: Path) -> None:
    for step in (4, 5, 8, 10, 12, 15, 17):
        prune(save(tmp_path, step), 2, 5)
    assert [int(path.name[-2:]) for path in saved_steps(tmp_path)] == [17, 15, 10, 5]
    prune(saved_steps(tmp_path)[0], 1)
    assert [int(path.name[-2:]) for path in saved_steps(tmp_path)] == [17]


def test_pruning_never_removes_the_checkpoint_just_saved_for_a_newer_damaged_one(
    tmp_path: Path,
) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step)
    for path in saved_steps(tmp_path)[:2]:
        flip_byte(path / TENSORS)
    prune(save(tmp_path, 7), 1)  # training went on from step 5
    assert_holds(newest_good(tmp_path)[0], 7)


def test_a_checkpoint_under_another_step_s_name_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10).rename(checkpoints_dir(tmp_path) / "step-00000018")
    good, said = newest_good(tmp_path)
    assert_holds(good, 5)
    assert any(
        "step-00000018: its manifest.json is of step 10: it was renamed; passed over" in line
        for line in said
    )

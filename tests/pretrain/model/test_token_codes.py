"""Two codes are one input to a decoder with LayerNorm: which ids that meets, that only these,
and what is done.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.forked_ranks import train_on
from support.hand_made_shards import write_dataset, write_source
from support.runs import counting_dataset, write_recipe

from data_prep import shards
from data_prep.shards import ShardReader
from pretrain.checkpoint.manifest import pointer_to, sidecar_of
from pretrain.checkpoint.reader import Checkpoint
from pretrain.config.recipe import ModelRecipe
from pretrain.model.build import model_config
from pretrain.model.token_codes import (
    DRAWN,
    about_one_input,
    affine_code,
    aliased_ids,
    code_of_id,
    config_of_run,
    remedy,
    saved_config,
    solve_gf2,
    warnings,
)
from pretrain.modeling_tablefree import (
    TableFreeConfig,
    TableFreeForCausalLM,
    TokenCode,
    draw_affine_code,
)
from pretrain.plan import plan

V = 512
NINE_BITS: dict[str, Any] = {"d_model": 36, "num_heads": 2, "code_bits": 9}  # none to spare


def recipe(input_embedding: str = "affine_code", **changes: Any) -> ModelRecipe:
    sizes = {"vocab_size": V, "num_layers": 2, "seq_len": 32, **NINE_BITS, **changes}
    return ModelRecipe(input_embedding=input_embedding, **sizes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    """Every id occurs; the tokenizer names none as special."""
    return ShardReader(counting_dataset(tmp_path_factory.mktemp("data") / "dataset"))


# The decoder


def logits_of_every_id(config: TableFreeConfig) -> torch.Tensor:
    """After a text of that id, and of that id and three more: shape (V, 4 V), fp64."""
    model = TableFreeForCausalLM(config).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5, 1.0, generator=generator)
        ids = torch.cat([torch.arange(V)[:, None], torch.tensor([[7, 300, 7]]).expand(V, 3)], dim=1)
        return model(ids).logits.flatten(1)


@pytest.mark.parametrize(
    "model",
    [
        recipe("binary_code"), recipe("affine_code"), recipe("affine_code", code_seed=5),
        recipe("binary_code", code_bits=12), recipe("affine_code", code_bits=18), recipe("learned"),
        recipe("permuted_code"), recipe("permuted_code", code_bits=12),
    ],
)  # fmt: skip
def test_the_decoder_tells_all_ids_apart_but_the_two_of_constant_code(model: ModelRecipe) -> None:
    config = model_config(model)
    pair = aliased_ids(config.to_dict())
    assert (pair is None) == (model.code_bits != 9 or model.input_embedding == "learned")
    logits = logits_of_every_id(config)
    apart = torch.cdist(logits, logits, compute_mode="donot_use_mm_for_euclid_dist") / logits.std()
    apart.fill_diagonal_(torch.inf)
    if pair:
        assert apart[pair] < 1e-9
        apart[pair] = apart[pair[::-1]] = torch.inf
    assert apart.min() > 1e-3


DRAWN_CODES = sorted(DRAWN)


@pytest.mark.parametrize("input_embedding", DRAWN_CODES)
@pytest.mark.parametrize("code_seed", range(5))
def test_the_two_ids_of_a_drawn_code_are_those_of_the_codes_of_zeros_and_of_ones(
    code_seed: int, input_embedding: str
) -> None:
    sizes = {"vocab_size": 65_536, "d_model": 64, "code_bits": 16}
    config = model_config(recipe(input_embedding, code_seed=code_seed, **sizes))
    codes = TokenCode(config).code(torch.arange(65_536)[None])[0].sum(dim=1)
    constant = torch.nonzero((codes == 0) | (codes == 16)).flatten().tolist()
    assert aliased_ids(config.to_dict()) == tuple(constant)
    assert {code_of_id(config.to_dict(), token_id) for token_id in constant} == {0, 0xFFFF}


@given(st.integers(1, 62), st.integers(0, 1000), st.data())
def test_gf2_equations_are_solved(bits: int, seed: int, data: st.DataObject) -> None:
    rows, _ = draw_affine_code(bits, seed)
    x = data.draw(st.integers(0, 2**bits - 1))
    assert solve_gf2(rows, affine_code(rows, 0, x)) == x


# What a run does about it


@pytest.mark.parametrize("input_embedding", DRAWN_CODES)
@pytest.mark.parametrize("code_seed", range(8))
@pytest.mark.parametrize("special", [{"<s>": 3, "</s>": 0, "<pad>": 511}, {"</s>": 0, "<pad>": 1}])
def test_a_new_drawn_code_makes_an_id_of_no_text_one_of_the_two(
    code_seed: int, special: dict[str, int], input_embedding: str, data: ShardReader
) -> None:
    manifest = replace(data.manifest, special_tokens=special)
    model = recipe(input_embedding, code_seed=code_seed)
    config = config_of_run(model, manifest)
    pair = aliased_ids(config.to_dict())
    assert pair
    assert {*pair} & {*special.values()} - {manifest.eos_id}
    key, _ = DRAWN[input_embedding]
    assert getattr(config, key) == getattr(model_config(model), key)
    assert config.to_dict() == config_of_run(model, manifest).to_dict()


@pytest.mark.parametrize("input_embedding", DRAWN_CODES)
def test_codes_are_drawn_once_where_that_harms_nobody(
    input_embedding: str, data: ShardReader
) -> None:
    """No two ids share an input; or the first draw is good already; or no id is free, and both
    are named.
    """
    small = replace(data.manifest, vocab_size=300, special_tokens={"</s>": 0})
    all_seeds = [recipe(input_embedding, code_seed=seed) for seed in range(20)]
    kept = [
        config_of_run(model, small).to_dict() == model_config(model).to_dict()
        for model in all_seeds
    ]
    harmless = [max(aliased_ids(model_config(model).to_dict()) or ()) >= 300 for model in all_seeds]
    assert kept == harmless
    assert {*kept} == {True, False}
    for model in (recipe(input_embedding, code_bits=18), recipe("binary_code"), recipe("learned")):
        assert config_of_run(model, data.manifest).to_dict() == model_config(model).to_dict()
    config = config_of_run(recipe(input_embedding), data.manifest)
    assert config.to_dict() == model_config(recipe(input_embedding)).to_dict()
    (line,) = warnings(config, data)
    assert all(f"id {i}" in line for i in aliased_ids(config.to_dict()) or ())


@pytest.mark.parametrize("input_embedding", DRAWN_CODES)
def test_a_run_goes_on_with_the_code_that_its_checkpoints_hold(
    input_embedding: str, text_data: Path, tmp_path: Path
) -> None:
    """As a run that was begun before codes were drawn around the tokenizer's special ids."""
    sizes = {**NINE_BITS, "input_embedding": input_embedding}
    path = write_recipe(tmp_path / "r.yaml", model=sizes)
    run_dir, model = tmp_path / "run", recipe(input_embedding)
    key, offset = DRAWN[input_embedding]
    train_on(1, path, text_data, run_dir, "--stop-at-step", "2")
    step = run_dir / "checkpoints" / "step-00000002"
    manifest = json.loads((step / "manifest.json").read_bytes())
    drawn = manifest["model_config"][offset]
    assert 511 in (aliased_ids(manifest["model_config"]) or ())  # <pad>
    first = model_config(model).to_dict()
    assert first[key] == manifest["model_config"][key]
    assert first[offset] != drawn
    manifest["model_config"][offset] = first[offset]
    (step / "manifest.json").write_text(json.dumps(manifest))
    (step / "manifest.json.xxh3_128").write_bytes(sidecar_of(step))
    (step.parent / "latest").write_bytes(pointer_to(step))
    branch = tmp_path / "branch"
    for own, more in ((run_dir, []), (branch, ["--branch-from", str(step)])):
        train_on(1, path, text_data, own, "--stop-at-step", "4", *more)
        after = Checkpoint(own / "checkpoints" / "step-00000004").manifest.model_config
        assert after == manifest["model_config"]
    assert saved_config(model, run_dir, None) == manifest["model_config"]
    assert saved_config(recipe("binary_code"), run_dir, None) is None


# What is said


def test_a_start_names_both_ids_their_counts_and_the_remedy(
    data: ShardReader, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path / "r.yaml", model=NINE_BITS)
    ids = np.concatenate([data.tokens(shard) for shard in data.manifest.shards])
    counts = (
        f"{np.count_nonzero(ids == 0)} and {np.count_nonzero(ids == 511)} times in all "
        f"{len(ids):,} tokens"
    )
    for flag in ("--dry-run", "--stop-at-step=1"):
        said = train_on(1, path, data.data_dir, tmp_path / "run", flag)
        assert "id 0 and id 511 are one input to this decoder" in said
        assert counts in said
        assert "in a new run model.code_bits=12 tells them apart" in said
    assert "are one input" not in train_on(
        1, path, data.data_dir, tmp_path / "wide", "--dry-run", "--model.code_bits=12"
    )


def test_nothing_is_said_where_one_of_the_two_never_occurs(
    data: ShardReader, text_data: Path, tmp_path: Path
) -> None:
    config = model_config(recipe("binary_code"))
    assert warnings(config, ShardReader(text_data)) == []  # <pad> is the last id
    written = [
        write_source(tmp_path, split, "a", [[1, 510]], 0) for split in ("train", "validation")
    ]
    assert warnings(config, ShardReader(write_dataset(tmp_path, written, {"a": 1}, V))) == []
    assert len(warnings(config, data)) == 1
    assert warnings(model_config(recipe("learned")), data) == []


def test_of_a_large_data_set_some_tokens_are_counted_evenly(
    data: ShardReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(shard.tokens for shard in data.manifest.shards)
    monkeypatch.setattr(shards, "COUNTED_PIECE", 16)
    monkeypatch.setattr(shards, "COUNTED_TOKENS", total // 4)
    (zeros, last), counted = data.count_ids((0, 511))
    assert total // 6 < counted <= total // 4
    assert zeros > last >= 0
    (line,) = warnings(model_config(recipe("binary_code")), data)
    assert f"times in {counted:,} tokens counted" in line.replace("of ", "")
    counts, counted = data.count_ids(range(V))
    assert sum(counts) == counted


@pytest.mark.parametrize(
    ("d_model", "code_bits", "says"),
    [
        (1024, 16, "model.code_bits=32"),
        (128, 16, "model.code_bits=32"),
        (48, 16, "model.code_bits=24"),
        (16, 16, "a model.d_model with a divisor above 16"),
    ],
)
def test_the_remedy_is_the_next_divisor_of_the_width(
    d_model: int, code_bits: int, says: str
) -> None:
    assert remedy(d_model, code_bits) == says


def test_a_plan_says_which_two_and_whether_it_matters(
    data: ShardReader, text_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_recipe(tmp_path / "r.yaml", model=NINE_BITS))
    for more, said in (
        ([], "one input    ids 0 and 511; harmless where no text gives one of them"),
        (
            ["--data-dir", str(data.data_dir)],
            "one input    ids 0 and 511; model.code_bits=12 tells them apart",
        ),
        (
            ["--data-dir", str(text_data)],
            "one input    ids 0 and 511; harmless, no text gives one of them",
        ),
    ):
        plan(["--recipe", path, "--device", "l4", *more])
        assert said in capsys.readouterr().out
    assert about_one_input(recipe("learned"), None) is None
    assert about_one_input(recipe(code_bits=12), None) is None
    with_pad = replace(data.manifest, special_tokens={"<pad>": 5})
    assert "harmless" in str(about_one_input(recipe(), with_pad))
    assert "tells them apart" in str(about_one_input(recipe("binary_code"), with_pad))

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import TINY_VOCAB_SIZE, tiny_recipe_content
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.shards import Tokens
from pretrain.checkpoint import load_for_reading, save_checkpoint
from pretrain.config import Recipe, build_recipe
from pretrain.distributed import World
from pretrain.engine import (
    DS_CONFIGS_DIR,
    OWNED_BY_RECIPE,
    Engine,
    accumulation_steps,
    load_engine_config,
    merge_config,
    start_process_group,
)
from pretrain.modeling_tablefree import TableFreeForCausalLM
from pretrain.train import build_model

ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """This process as a world of one rank; its environment as it was afterwards."""
    before = dict(os.environ)
    yield start_process_group(ALONE)
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def recipe_of(**sections: Any) -> Recipe:
    return build_recipe(tiny_recipe_content(**sections), "tiny.yaml")


def engine_for(recipe: Recipe, device: torch.device, model: TableFreeForCausalLM | None = None) -> Engine:
    config = merge_config(recipe, load_engine_config(recipe.engine), 1)
    return Engine(model or build_model(recipe), recipe, config, ALONE, device)


def batch_of(step: int, windows: int = 6) -> Tokens:
    random = np.random.default_rng(step)
    return random.integers(0, TINY_VOCAB_SIZE, (windows, 33)).astype(np.uint16)


def take_step(engine: Engine, step: int, rate: float = 1e-3) -> tuple[float, float]:
    rows = [engine.rows_of(i) for i in range(engine.accumulation_steps)]
    return engine.train_step([batch_of(step)[own] for own in rows], rate)


def masters(engine: Engine) -> dict[str, torch.Tensor]:
    return {fragment.name: fragment.states["master"].clone() for fragment in engine.read_state()[0]}


# The engine computes what plain torch does

# Key biases have no gradient but rounding noise (softmax ignores them), which Adam with a tiny eps would blow up.
EPS = 1e-5


@pytest.mark.parametrize("micro_batch_size", [6, 2, 1])
@pytest.mark.parametrize("clipping", [0.05, 100.0])
def test_steps_equal_a_plain_torch_loop(micro_batch_size: int, clipping: float, device: torch.device) -> None:
    recipe = recipe_of(
        batch={"micro_batch_size": micro_batch_size},
        optimizer={"gradient_clipping": clipping, "eps": EPS, "weight_decay": 0.5},
    )
    model = build_model(recipe)
    plain = copy.deepcopy(model)
    engine = engine_for(recipe, device, model)
    assert engine.accumulation_steps == 6 // micro_batch_size

    matrices = [p for p in plain.parameters() if p.ndim == 2]
    vectors = [p for p in plain.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=EPS, foreach=False)
    for step, rate in enumerate([1e-3, 3e-3, 2e-3, 1e-3]):
        ids = torch.from_numpy(batch_of(step).astype("int64"))
        expected = F.cross_entropy(plain(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clipping)
        assert (expected_norm > clipping) == (clipping < 1)  # the small limit clips, the large one doesn't
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

        loss, norm = take_step(engine, step, rate)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert norm == pytest.approx(expected_norm.item(), rel=1e-5)
    trained = masters(engine)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach().flatten(), rtol=1e-5, atol=1e-5)


def test_the_validation_figure_is_the_mean_over_all_targets_and_trains_nothing(device: torch.device) -> None:
    engine = engine_for(recipe_of(), device)
    take_step(engine, 0)
    before = masters(engine)
    batches = [batch_of(1, windows=3), batch_of(2, windows=1)]
    figure = engine.mean_nats(iter(batches))
    ids = torch.from_numpy(np.concatenate(batches).astype("int64"))
    with torch.no_grad():
        logits = engine.deepspeed.module.model(ids[:, :-1]).logits
    assert figure == pytest.approx(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item(), rel=1e-6)
    assert all(torch.equal(before[name], after) for name, after in masters(engine).items())


@pytest.mark.parametrize("precision", ["zero2_fp32", "zero2_bf16"])
def test_a_state_written_into_a_new_engine_goes_on_bitwise_equal(
    precision: str, device: torch.device, tmp_path: Path
) -> None:
    recipe = recipe_of(engine=precision)
    first = engine_for(recipe, device)
    for step in range(3):
        take_step(first, step)
    fragments, optimizer_step = first.read_state()
    assert optimizer_step == 3
    about = {"optimizer_step": optimizer_step, "parameters": first.parameter_shapes()}
    save_checkpoint(tmp_path, 3, fragments, about, ALONE)
    expected = [take_step(first, step) for step in range(3, 6)]

    second = engine_for(recipe_of(engine=precision, seed=2), device)  # other initial weights: all must come from disk
    second.write_state(load_for_reading(tmp_path))
    assert [take_step(second, step) for step in range(3, 6)] == expected
    assert all(torch.equal(values, masters(first)[name]) for name, values in masters(second).items())
    assert second.read_state()[1] == 6


def test_bf16_trains_bf16_weights_with_fp32_masters_accumulation_and_moments(device: torch.device) -> None:
    engine, exact = engine_for(recipe_of(engine="zero2_bf16"), device), engine_for(recipe_of(), device)
    for step in range(3):
        loss, norm = take_step(engine, step)
        expected_loss, expected_norm = take_step(exact, step)
        assert loss == pytest.approx(expected_loss, rel=2e-3)
        assert norm == pytest.approx(expected_norm, rel=3e-2)
    assert {p.dtype for p in engine.deepspeed.module.parameters()} == {torch.bfloat16}
    fragments, _ = engine.read_state()
    assert {values.dtype for fragment in fragments for values in fragment.states.values()} == {torch.float32}
    weights = {name: p.detach().flatten() for name, p in engine.deepspeed.module.model.named_parameters()}
    for fragment in fragments:
        master = fragment.states["master"]
        assert torch.equal(master.bfloat16(), weights[fragment.name])
    assert not all(torch.equal(f.states["master"], f.states["master"].bfloat16().float()) for f in fragments)
    assert engine.deepspeed.get_data_types()[1] == torch.float32  # of gradient accumulation
    assert engine.deepspeed.communication_data_type == torch.float32


def test_every_parameter_is_owned_whole_and_once(device: torch.device) -> None:
    engine = engine_for(recipe_of(), device)
    take_step(engine, 0)
    fragments, optimizer_step = engine.read_state()
    assert optimizer_step == 1
    shapes = engine.parameter_shapes()
    assert {f.name: (f.start, f.states["master"].numel()) for f in fragments} == {
        name: (0, torch.Size(shape).numel()) for name, shape in shapes.items()
    }
    assert len(fragments) == len(shapes)
    assert shapes["output_projection.weight"] == [512, 48]


def test_deepspeed_keeps_its_state_where_engine_py_reads_and_writes_it(device: torch.device) -> None:
    engine = engine_for(recipe_of(), device)
    take_step(engine, 0)
    zero = engine.deepspeed.optimizer
    moved = (
        f"DeepSpeed {deepspeed.__version__} moved what checkpoints are made of: {{}}. Checkpoints would be wrong or "
        f"impossible. Read the new release's runtime/zero/stage_1_and_2.py and utils/mixed_precision_linkage.py, mend "
        f"Engine._owned, read_state and write_state in pretrain/engine.py, or keep DeepSpeed below it in pyproject.toml"
    )
    for name in ("single_partition_of_fp32_groups", "_lazy_init_hp_params_optimizer_state", "update_lp_params"):
        assert hasattr(zero, name), moved.format(f"{type(zero).__name__}.{name} is gone")
    for flat in zero.single_partition_of_fp32_groups:
        state = zero.optimizer.state.get(flat, {})
        assert {"step", "exp_avg", "exp_avg_sq"} <= set(state), moved.format(f"the moments are {sorted(state)}")
        assert state["exp_avg"].shape == flat.shape, moved.format("a moment is no longer shaped as its partition")
    for parameter_name, parameter in engine.deepspeed.module.model.named_parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        assert mapping is not None, moved.format(f"{parameter_name} has no _hp_mapping")
        for place in ("lp_fragment_address", "hp_fragment_address"):
            assert {"start", "numel"} <= set(dir(getattr(mapping, place, None))), moved.format(f"_hp_mapping.{place}")
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        own = flat.narrow(0, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel)
        assert torch.equal(own.view_as(parameter), parameter), moved.format(f"{parameter_name} lies elsewhere")
    with torch.no_grad():
        zero.single_partition_of_fp32_groups[0].fill_(0.25)
    zero.update_lp_params()
    refreshed = engine.deepspeed.module.model.output_projection.weight
    assert torch.all(refreshed == 0.25), moved.format("update_lp_params no longer refreshes the weights")


# The DeepSpeed JSON


def json_refusal(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "engine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        load_engine_config(str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


STAGE_2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("path", sorted(DS_CONFIGS_DIR.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_engine_is_zero2_with_fp32_accumulation_and_reduction(path: Path) -> None:
    config = load_engine_config(path.stem)
    assert config["zero_optimization"]["stage"] == 2
    assert config["data_types"]["grad_accum_dtype"] == config["communication_data_type"] == "fp32"


@pytest.mark.parametrize("key", sorted(OWNED_BY_RECIPE))
def test_a_json_that_repeats_the_recipe_is_refused_with_the_key_s_home(key: str, tmp_path: Path) -> None:
    message = json_refusal(tmp_path, {**STAGE_2, key: 1})
    assert f"{key} belongs to the recipe ({OWNED_BY_RECIPE[key]}); remove it here" in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({**STAGE_2, "bf16": {"enabled": "auto"}}, 'holds an "auto" value'),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, 'holds an "auto" value'),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, expected 2"),
        ({}, "zero_optimization.stage is 0, expected 2"),
        ({"zero_optimization": 2}, "zero_optimization is 2, expected a JSON object"),
        ({**STAGE_2, "zero_optimisation": {}}, "unknown key zero_optimisation; did you mean zero_optimization?"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucketsize": 5}},
            "unknown key zero_optimization.reduce_bucketsize; did you mean reduce_bucket_size?",
        ),
        ({**STAGE_2, "bf16": {}}, "bf16 has no key enabled"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {}}}, "offload_optimizer is not supported"),
        ({**STAGE_2, "fp16": {"enabled": True}}, "fp16 is not supported; use bf16"),
        ({**STAGE_2, "fp16": True}, "fp16 is True, expected a JSON object"),
        ("{", "not valid JSON"),
        ("[2]", "expected a JSON object"),
    ],
)
def test_a_json_that_this_pipeline_cannot_honour_is_refused(content: Any, says: str, tmp_path: Path) -> None:
    assert says in json_refusal(tmp_path, content)


def test_an_engine_that_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"engine zero2_bf61: no such .*; did you mean zero2_bf16\?"):
        load_engine_config("zero2_bf61")
    with pytest.raises(UserError, match=r"/absent\.json: no such file"):
        load_engine_config("/absent.json")


def test_the_merged_configuration_is_the_json_and_what_the_recipe_owns() -> None:
    recipe = recipe_of(batch={"micro_batch_size": 1}, optimizer={"gradient_clipping": 0.7})
    engine_config = load_engine_config("zero2_fp32")
    merged = merge_config(recipe, engine_config, world_size=2)
    added = {key: value for key, value in merged.items() if key not in engine_config}
    assert added == {
        "train_batch_size": 6,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 3,  # 6 windows / (2 ranks x 1)
        "gradient_clipping": 0.7,
        "steps_per_print": 2**31,
    }
    assert {key: merged[key] for key in engine_config} == engine_config == load_engine_config("zero2_fp32")


def test_a_json_that_says_nothing_of_it_gets_fp32_accumulation_and_reduction_and_one_that_does_keeps_it() -> None:
    silent = merge_config(recipe_of(), STAGE_2, world_size=1)
    assert silent["data_types"] == {"grad_accum_dtype": "fp32"}
    assert silent["communication_data_type"] == "fp32"
    asked = merge_config(recipe_of(), {**STAGE_2, "communication_data_type": "bf16"}, world_size=1)
    assert asked["communication_data_type"] == "bf16"


# Dividing the batch


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do() -> None:
    recipe = recipe_of(batch={"global_batch_tokens": 6 * 32, "micro_batch_size": 2})
    with pytest.raises(UserError) as caught:
        accumulation_steps(recipe, world_size=2)
    assert str(caught.value) == (
        "a step of 6 windows does not divide over 2 ranks x micro-batch 2; nearest that do: "
        "batch.global_batch_tokens 128 or 256, or batch.micro_batch_size 1, or 1 rank"
    )


@given(windows=st.integers(1, 60), micro_batch_size=st.integers(1, 12), world_size=st.integers(1, 16))
def test_a_batch_divides_into_whole_micro_batches_or_every_suggestion_does(
    windows: int, micro_batch_size: int, world_size: int
) -> None:
    recipe = recipe_of(batch={"global_batch_tokens": windows * 32, "micro_batch_size": micro_batch_size})
    if windows % (micro_batch_size * world_size) == 0:
        assert accumulation_steps(recipe, world_size) * micro_batch_size * world_size == windows
        return
    with pytest.raises(UserError) as caught:
        accumulation_steps(recipe, world_size)
    text = str(caught.value).partition("nearest that do:")[2]
    tokens = re.search(r"global_batch_tokens (\d+)(?: or (\d+))?", text)
    assert tokens is not None
    for suggested in filter(None, tokens.groups()):
        changed = recipe_of(batch={"global_batch_tokens": int(suggested), "micro_batch_size": micro_batch_size})
        accumulation_steps(changed, world_size)
        assert abs(int(suggested) - windows * 32) < 32 * micro_batch_size * world_size
    if micro := re.search(r"micro_batch_size (\d+)", text):
        changed = recipe_of(batch={"global_batch_tokens": windows * 32, "micro_batch_size": int(micro[1])})
        accumulation_steps(changed, world_size)
    if ranks := re.search(r"(\d+) ranks?$", text):
        accumulation_steps(recipe, int(ranks[1]))

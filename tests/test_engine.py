import copy
import os
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

from data_prep.shards import Tokens
from pretrain.checkpoint import load_for_reading, save_checkpoint
from pretrain.config import Recipe, build_recipe
from pretrain.distributed import World
from pretrain.engine import Engine, start_process_group
from pretrain.engine_config import load_engine_config, merge_config
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
    figures = engine.train_step([engine.pinned(batch_of(step)[own]) for own in rows], rate)
    return figures.loss, figures.gradient_norm


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

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.forked_ranks import become_a_rank, run_ranks
from support.hand_made_runs import manifest_of, rows_of_rank
from support.runs import TINY_VOCAB_SIZE, tiny_recipe_content, write_recipe

from data_prep.errors import UserError
from data_prep.shards import Tokens
from pretrain.checkpoint.find import load_for_reading
from pretrain.checkpoint.saving import Savers, save_checkpoint
from pretrain.config.deepspeed import load_engine_config, merge_config
from pretrain.config.load import build_recipe
from pretrain.config.recipe import Recipe
from pretrain.data.batches import widened
from pretrain.distributed.world import World
from pretrain.engine.engine import Engine
from pretrain.engine.process_group import start_process_group
from pretrain.model.build import build_model
from pretrain.modeling_tablefree import TableFreeForCausalLM, checkpoint_parameters

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


def engine_for(
    recipe: Recipe, device: torch.device, model: TableFreeForCausalLM | None = None
) -> Engine:
    config = merge_config(recipe, load_engine_config(recipe.engine), 1)
    return Engine(model or build_model(recipe), recipe, config, ALONE, device)


def batch_of(step: int, windows: int = 6) -> Tokens:
    random = np.random.default_rng(step)
    return random.integers(0, TINY_VOCAB_SIZE, (windows, 33)).astype(np.uint16)


def micro_batches_of(engine: Engine, step: int) -> list[torch.Tensor]:
    return [widened(batch_of(step)[own], pinned=False) for own in rows_of_rank(engine)]


def take_step(engine: Engine, step: int, rate: float = 1e-3) -> tuple[float, float]:
    figures = engine.train_step(micro_batches_of(engine, step), rate)
    return figures.loss, figures.gradient_norm


def masters(engine: Engine) -> dict[str, torch.Tensor]:
    return {fragment.name: fragment.states["master"].clone() for fragment in engine.read_state()[0]}


def test_the_validation_figure_is_the_mean_over_all_targets_and_trains_nothing(
    device: torch.device,
) -> None:
    engine = engine_for(recipe_of(), device)
    take_step(engine, 0)
    before = masters(engine)
    batches = [batch_of(1, windows=3), batch_of(2, windows=1)]
    figure = engine.mean_nats(iter(batches))
    ids = torch.from_numpy(np.concatenate(batches).astype("int64")).to(device)
    with torch.no_grad():
        logits = engine.deepspeed.module.model(ids[:, :-1]).logits
    assert figure == pytest.approx(
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item(), rel=1e-6
    )
    assert all(torch.equal(before[name], after) for name, after in masters(engine).items())


@pytest.mark.parametrize("precision", ["zero2_fp32", "zero2_bf16", "zero2_bf16_offload"])
def test_a_state_written_into_a_new_engine_goes_on_bitwise_equal(
    precision: str, device: torch.device, tmp_path: Path
) -> None:
    recipe = recipe_of(engine=precision)
    first = engine_for(recipe, device)
    for step in range(3):
        take_step(first, step)
    fragments, optimizer_step = first.read_state()
    assert optimizer_step == 3
    manifest = manifest_of(3, first.parameter_shapes(), optimizer_step=optimizer_step)
    save_checkpoint(tmp_path, fragments, manifest, Savers(world=ALONE))
    expected = [take_step(first, step) for step in range(3, 6)]

    # other initial weights: all must come from disk
    second = engine_for(recipe_of(engine=precision, seed=2), device)
    second.write_state(load_for_reading(tmp_path))
    assert [take_step(second, step) for step in range(3, 6)] == expected
    assert all(
        torch.equal(values, masters(first)[name]) for name, values in masters(second).items()
    )
    assert second.read_state()[1] == 6


def test_bf16_trains_bf16_weights_with_fp32_masters_accumulation_and_moments(
    device: torch.device,
) -> None:
    engine, exact = (
        engine_for(recipe_of(engine="zero2_bf16"), device),
        engine_for(recipe_of(), device),
    )
    for step in range(3):
        loss, norm = take_step(engine, step)
        expected_loss, expected_norm = take_step(exact, step)
        assert loss == pytest.approx(expected_loss, rel=2e-3)
        assert norm == pytest.approx(expected_norm, rel=3e-2)
    assert {p.dtype for p in engine.deepspeed.module.parameters()} == {torch.bfloat16}
    fragments, _ = engine.read_state()
    assert {values.dtype for fragment in fragments for values in fragment.states.values()} == {
        torch.float32
    }
    weights = {
        name: p.detach().flatten()
        for name, p in checkpoint_parameters(engine.deepspeed.module.model)
    }
    for fragment in fragments:
        master = fragment.states["master"]
        assert torch.equal(master.bfloat16(), weights[fragment.name])
    assert not all(
        torch.equal(f.states["master"], f.states["master"].bfloat16().float()) for f in fragments
    )
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


# DeepSpeed's internals, stage by stage; test_engine_numerics.py holds each against plain torch on
# several ranks

BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
STAGES = {
    "stage 0": {"zero_optimization": {"stage": 0}},
    "stage 1": {"zero_optimization": {"stage": 1}},
    "stage 1 in bf16": {"zero_optimization": {"stage": 1}, **BF16},
    "stage 2": {"zero_optimization": {"stage": 2}},
    "stage 2 in bf16 with offload": {"zero_optimization": {"stage": 2, **OFFLOAD}, **BF16},
}
every_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)


def staged_engine(stage: dict[str, Any], device: torch.device) -> Engine:
    recipe = recipe_of()
    return Engine(build_model(recipe), recipe, merge_config(recipe, stage, 1), ALONE, device)


@every_stage
def test_deepspeed_keeps_its_state_where_engine_py_reads_and_writes_it(
    stage: dict[str, Any], device: torch.device
) -> None:
    engine = staged_engine(stage, device)
    take_step(engine, 0)
    moved = (
        f"DeepSpeed {deepspeed.__version__} moved what checkpoints are made of: {{}}. Checkpoints "
        "would be wrong or impossible. Read the new release's runtime/zero/stage_1_and_2.py, "
        "runtime/bf16_optimizer.py and utils/mixed_precision_linkage.py, mend ZeroState in "
        "pretrain/engine/zero_state.py, or keep DeepSpeed below it in pyproject.toml"
    )
    flats = [flat for group in engine.optimizer.param_groups for flat in group["params"]]
    for flat in flats:
        state = engine.optimizer.state.get(flat, {})
        assert flat.dtype == torch.float32, moved.format(
            "the optimizer no longer steps fp32 masters"
        )
        assert {"step", "exp_avg", "exp_avg_sq"} <= set(state), moved.format(
            f"the moments are {sorted(state)}"
        )
        assert state["exp_avg"].shape == flat.shape, moved.format(
            "a moment is no longer shaped as its partition"
        )
    weights = dict(checkpoint_parameters(engine.deepspeed.module.model))
    try:
        fragments, _ = engine.read_state()
    except (AttributeError, KeyError, IndexError, RuntimeError) as error:
        pytest.fail(moved.format(f"{type(error).__name__}: {error}"))
    assert {fragment.name for fragment in fragments} == set(weights), moved.format(
        "some parameters are owned by none"
    )
    for fragment in fragments:
        weight = weights[fragment.name].detach().flatten()
        own = fragment.states["master"].to(weight.device, weight.dtype)
        assert torch.equal(own, weight), moved.format(f"{fragment.name} lies elsewhere")
    if engine.deepspeed.zero_optimization():
        with torch.no_grad():
            flats[0].fill_(0.25)
        engine.deepspeed.optimizer.update_lp_params()
    else:
        assert flats[0] is next(p for p in weights.values() if p.ndim == 2), moved.format(
            "stage 0 steps copies"
        )
        return
    refreshed = weights["output_projection.weight"]
    assert torch.all(refreshed == 0.25), moved.format(
        "update_lp_params no longer refreshes the weights"
    )


def whole_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Masters, moments and the weights that the next forward pass takes, copied."""
    fragments, _ = engine.read_state()
    weights = {
        name: p.detach().clone() for name, p in checkpoint_parameters(engine.deepspeed.module.model)
    }
    return weights | {
        f"{f.name}/{state}": values.clone() for f in fragments for state, values in f.states.items()
    }


def is_same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(values, after[name]) for name, values in before.items()
    )


@every_stage
@pytest.mark.parametrize("factor", [torch.inf, torch.nan], ids=["inf", "nan"])
def test_a_step_whose_gradient_norm_is_no_number_is_a_no_op(
    factor: float, stage: dict[str, Any], device: torch.device
) -> None:
    engine = staged_engine(stage, device)
    take_step(engine, 0)
    before = whole_state(engine)
    hook = engine.deepspeed.module.model.model.final_norm.weight.register_hook(
        lambda grad: grad * factor
    )
    figures = engine.train_step(micro_batches_of(engine, 1), 0.01)
    hook.remove()
    assert figures.refused
    assert "gradient norm" in figures.refused
    assert np.isfinite(figures.loss)
    assert is_same(before, whole_state(engine))


@every_stage
@pytest.mark.parametrize("first", [0, 2])
def test_a_refused_step_leaves_no_trace_in_those_that_follow(
    first: int, stage: dict[str, Any], device: torch.device
) -> None:
    """Refused steps, the very first ones too, against a run that never came to them: bit for
    bit.
    """
    with_bad, without = staged_engine(stage, device), staged_engine(stage, device)
    for step in range(first):
        assert take_step(with_bad, step) == take_step(without, step)
    for step in (7, 8):
        before = whole_state(with_bad)
        with_bad.judge = lambda loss, norm: f"{loss} and {norm} are not wanted"
        refused = with_bad.train_step(micro_batches_of(with_bad, step), 0.01).refused
        assert refused
        assert refused.endswith("are not wanted")
        assert is_same(before, whole_state(with_bad))
    with_bad.judge = without.judge
    for step in range(first, first + 3):
        assert take_step(with_bad, step) == take_step(without, step)
    assert is_same(whole_state(with_bad), whole_state(without))
    assert with_bad.read_state()[1] == without.read_state()[1] == first + 3  # Adam's steps


@every_stage
def test_the_rows_of_a_step_are_told_apart_by_their_losses(
    stage: dict[str, Any], device: torch.device
) -> None:
    engine = staged_engine(stage, device)
    nats = engine.row_nats(micro_batches_of(engine, 5))
    assert len(nats) == len(batch_of(5))
    assert len(set(nats)) == len(nats)
    expected = take_step(engine, 5)[0]
    assert sum(nats) / len(nats) == pytest.approx(
        expected, rel=1e-5 if "bf16" not in stage else 1e-2
    )


def test_what_deepspeed_alone_refuses_is_one_line_too(device: torch.device) -> None:
    with pytest.raises(
        UserError, match="the DeepSpeed configuration: allgather_bucket_size must be a multiple of"
    ):
        staged_engine({"zero_optimization": {"stage": 2, "allgather_bucket_size": 101}}, device)
    with pytest.raises(
        UserError, match=r"the DeepSpeed configuration: reduce_bucket_size: got -1; "
    ):
        staged_engine({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, device)
    with pytest.raises(UserError, match="the DeepSpeed configuration: "):
        staged_engine(
            {"zero_optimization": {"stage": 2}, "communication_data_type": "float"}, device
        )


COMPILER_MODULES = ("torch._inductor.compiler_bisector", "torch._inductor.codegen.common")


def be_a_rank_that_counts_the_compiler_s_modules(
    arguments: list[str], variables: dict[str, str], log: Path
) -> None:
    """Body of a forked rank that exits with how many of COMPILER_MODULES its training imported."""
    become_a_rank(variables, log)
    from pretrain.train import main

    assert main(arguments) == 0
    sys.exit(sum(name in sys.modules for name in COMPILER_MODULES))


def test_a_rank_that_compiles_nothing_does_not_import_torch_s_compiler(
    tiny_data: Path, tmp_path: Path
) -> None:
    # as long as torch calls them so
    assert all(importlib.util.find_spec(name) for name in COMPILER_MODULES)
    recipe = write_recipe(tmp_path / "r.yaml", train_tokens=6 * 32)
    body = be_a_rank_that_counts_the_compiler_s_modules
    ended = run_ranks(1, recipe, tiny_data, tmp_path / "run", body=body)
    assert ended.exit_codes == [0], ended.output


def test_a_recipe_that_masks_documents_is_not_trained_before_their_end_is_told(
    device: torch.device,
) -> None:
    engine = engine_for(recipe_of(intra_document_masking=True), device)
    with pytest.raises(ValueError, match="mask_documents"):
        take_step(engine, 0)
    engine.mask_documents(0)
    assert np.isfinite(take_step(engine, 0)).all()

"""Every shipped recipe loads, and counts what its readers were promised."""

import re

import pytest
import torch
import yaml
from support.runs import REPOSITORY, overrides_of

from pretrain.config.changes import flatten
from pretrain.config.load import RECIPES_DIR, build_recipe, load_recipe, recipe_to_dict
from pretrain.config.recipe import Recipe
from pretrain.model.build import model_config
from pretrain.modeling_tablefree import TableFreeForCausalLM

SHIPPED = sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))
PAPER = ["paper_affine_code", "paper_binary_code", "paper_learned", "paper_permuted_code"]


def load_shipped(name: str) -> Recipe:
    return load_recipe(name, overrides_of(name))


def model_without_memory(recipe: str) -> TableFreeForCausalLM:
    with torch.device("meta"):
        return TableFreeForCausalLM(model_config(load_shipped(recipe).model))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def test_the_paper_recipes_are_shipped() -> None:
    assert set(PAPER) <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_loads_and_builds(name: str) -> None:
    recipe = load_shipped(name)
    model = model_without_memory(name)
    assert len(model.model.layers) == recipe.model.num_layers
    assert recipe.total_steps > 0
    assert recipe.global_batch_size % recipe.batch.micro_batch_size == 0


@pytest.mark.parametrize(
    ("name", "trainable", "in_the_input"),
    [
        ("paper_binary_code", 470_190_080, 0),
        ("paper_affine_code", 470_190_080, 0),
        ("paper_permuted_code", 470_190_080, 0),
        ("paper_learned", 537_298_944, 67_108_864),  # 65,536 x 1,024 more
        ("compare_small", 1_841_920, 524_288),
        ("binary_code_1b3", 1_342_820_352, 0),
        ("binary_code_3b", 3_000_130_560, 0),
    ],
)
def test_models_have_the_number_of_parameters_that_their_recipe_says(
    name: str, trainable: int, in_the_input: int
) -> None:
    model = model_without_memory(name)
    assert f"{trainable:,}" in (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8")
    assert count(model) == trainable
    assert count(model.model.input_embedding) == in_the_input


def test_the_four_paper_recipes_differ_in_one_key() -> None:
    flat = [flatten(recipe_to_dict(load_recipe(name))) for name in PAPER]
    assert all(recipe.keys() == flat[0].keys() for recipe in flat)
    differing = {key for key in flat[0] if len({str(recipe[key]) for recipe in flat}) > 1}
    assert differing == {"model.input_embedding"}
    assert [recipe["model.input_embedding"] for recipe in flat] == [
        "affine_code",
        "binary_code",
        "learned",
        "permuted_code",
    ]


def test_the_paper_recipes_are_the_runs_that_design_md_states() -> None:
    recipe = load_recipe("paper_binary_code")
    assert recipe.total_steps == 32_425
    assert recipe.global_batch_size == 512  # 524,288 tokens in windows of 1,024
    assert (recipe.model.d_model, recipe.model.num_layers, recipe.model.num_heads) == (
        1_024,
        32,
        32,
    )
    assert (recipe.model.vocab_size, recipe.model.code_bits, recipe.model.seq_len) == (
        65_536,
        16,
        1_024,
    )
    assert (recipe.optimizer.peak_learning_rate, recipe.optimizer.weight_decay) == (6e-4, 0.1)
    assert (recipe.optimizer.beta1, recipe.optimizer.beta2, recipe.optimizer.gradient_clipping) == (
        0.9,
        0.95,
        1.0,
    )
    assert (recipe.schedule.warmup_fraction, recipe.schedule.final_fraction) == (0.01, 0.1)
    assert recipe.validation.eval_tokens == 2_097_152
    assert recipe.engine == "zero2_bf16"


def test_the_recipe_in_the_readme_is_one() -> None:
    readme = (REPOSITORY / "pretrain" / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```yaml\n(.*?)```", readme, re.DOTALL)
    assert block
    assert build_recipe(yaml.safe_load(block[1]), "pretrain/README.md").total_steps == 1221

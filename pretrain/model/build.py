"""From a recipe to the decoder that is trained."""

import copy
from dataclasses import asdict

from pretrain.config.recipe import ModelRecipe, Recipe
from pretrain.model.activation_checkpointing import apply_activation_checkpointing
from pretrain.model.compilation import apply_compile
from pretrain.modeling_tablefree import (
    TableFreeConfig,
    TableFreeForCausalLM,
    bits_needed,
    draw_affine_code,
    initialise_parameters,
)


def model_config(model: ModelRecipe) -> TableFreeConfig:
    """The architecture as the modelling file wants it, the affine code drawn."""
    code_bits = model.code_bits or bits_needed(model.vocab_size)
    architecture = asdict(model) | {"code_bits": code_bits}  # type: ignore[call-overload]
    seed = architecture.pop("code_seed")
    if model.input_embedding == "affine_code":
        architecture["affine_rows"], architecture["affine_offset"] = draw_affine_code(
            code_bits, seed
        )
    return TableFreeConfig(**architecture)


def build_model(
    recipe: Recipe, architecture: TableFreeConfig | None = None
) -> TableFreeForCausalLM:
    """The decoder with its initial weights; without an architecture, that of the recipe alone."""
    # transformers writes into a model's config
    own = copy.deepcopy(architecture) or model_config(recipe.model)
    model = TableFreeForCausalLM(own)
    initialise_parameters(model, recipe.seed)
    checkpointing = recipe.activation_checkpointing
    apply_activation_checkpointing(model, checkpointing.mode, checkpointing.every_n_layers)
    if recipe.compile:
        apply_compile(model)
    return model

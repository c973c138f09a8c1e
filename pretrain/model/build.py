"""From a recipe to the decoder that is trained."""

import copy
from dataclasses import asdict
from typing import Any

from pretrain.config.recipe import ModelRecipe, Recipe
from pretrain.model.activation_checkpointing import apply_activation_checkpointing
from pretrain.model.compilation import apply_compile
from pretrain.modeling_tablefree import (
    TableFreeConfig,
    TableFreeForCausalLM,
    bits_needed,
    draw_affine_code,
    draw_permuted_code,
    initialise_parameters,
)


def model_config(model: ModelRecipe) -> TableFreeConfig:
    """The architecture as the modelling file wants it, an affine or permuted code drawn."""
    architecture: dict[str, Any] = asdict(model)
    code_bits = model.code_bits or bits_needed(model.vocab_size)
    architecture["code_bits"] = code_bits
    seed = architecture.pop("code_seed")
    if model.input_embedding == "affine_code":
        rows, offset = draw_affine_code(code_bits, seed)
        architecture["affine_rows"] = rows
        architecture["affine_offset"] = offset
    elif model.input_embedding == "permuted_code":
        keys, offset = draw_permuted_code(code_bits, seed)
        architecture["permutation_keys"] = keys
        architecture["permutation_offset"] = offset
    return TableFreeConfig(**architecture)


def build_model(
    recipe: Recipe, architecture: TableFreeConfig | None = None
) -> TableFreeForCausalLM:
    """The decoder with its initial weights; without an architecture, that of the recipe alone.

    In this order: weights, then which blocks recompute, then what is compiled.
    """
    if architecture is None:
        architecture = model_config(recipe.model)
    own = copy.deepcopy(architecture)  # transformers writes into a model's config
    model = TableFreeForCausalLM(own)
    initialise_parameters(model, recipe.seed)
    checkpointing = recipe.activation_checkpointing
    apply_activation_checkpointing(model, checkpointing.mode, checkpointing.every_n_layers)
    if recipe.compile:
        apply_compile(model)
    return model

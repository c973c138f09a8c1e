"""The recipe of a run that begins with imported weights: whose architecture is theirs."""

import json
from typing import Any

from data_prep.errors import UserError
from pretrain.config.load import dotted_keys, load_recipe
from pretrain.config.recipe import ModelRecipe, Recipe
from pretrain.hf.marker import Marker
from pretrain.importing.decoder import Decoder, sizes_of
from pretrain.importing.foreign import Foreign

# Settings where no recipe is given and no export tells them: those of the recipe to begin with.
BASE_RECIPE = "small"
BATCH_TOKENS = 8192  # of a step, about
CODE_KEYS = ("input_embedding", "code_seed")


def hints_of(foreign: Foreign, asked: Recipe | None, marker: Marker | None) -> list[ModelRecipe]:
    """What a recipe and an export's marker say of the input, the recipe's first."""
    told: list[dict[str, Any]] = []
    if asked is not None:
        told.append({key: getattr(asked.model, key) for key in CODE_KEYS})
    if marker is not None:
        told.append({key: marker.recipe.get(f"model.{key}") for key in CODE_KEYS})
    hints = []
    for keys in told:
        content = {**sizes_of(foreign), **keys}
        try:
            hints.append(ModelRecipe(**content))
        except ValueError as error:
            raise UserError(
                f"{foreign.where}: no architecture of a recipe ({first_line(error)}); it can't be "
                "imported"
            ) from None
    return hints


def first_line(error: Exception) -> str:
    """What pydantic found first."""
    return " ".join(str(error).split("\n")[1:3]).strip()


def recipe_asked(name: str, vocab_size: int) -> Recipe:
    """The recipe that was given, its `auto` vocabulary that of the weights. Raises UserError."""
    return load_recipe(name, [f"--model.vocab_size={vocab_size}"])


def recipe_of(decoder: Decoder, asked: Recipe | None, marker: Marker | None) -> Recipe:
    """The recipe of the run: what was asked, else what the marker tells, else the defaults.

    Raises UserError, naming the key, where a recipe asks for another architecture.
    """
    if asked is not None:
        refuse_another_architecture(decoder, asked.model)
        return asked
    told = {} if marker is None else dict(marker.recipe)
    seq_len = decoder.foreign.seq_len
    settings: dict[str, Any] = {
        "batch.global_batch_tokens": max(1, BATCH_TOKENS // seq_len) * seq_len,
        "batch.micro_batch_size": 1,
    }
    # Keys of other versions tell nothing here.
    known = set(dotted_keys(Recipe))
    settings |= {key: value for key, value in told.items() if key in known}
    settings |= {f"model.{key}": value for key, value in sizes_of(decoder.foreign).items()}
    settings["model.input_embedding"] = decoder.config.input_embedding
    if decoder.config.input_embedding != "learned":
        settings["model.code_bits"] = decoder.config.code_bits
    overrides = [f"--{key}={json.dumps(value)}" for key, value in settings.items()]
    return load_recipe(BASE_RECIPE, overrides)


def refuse_another_architecture(decoder: Decoder, model: ModelRecipe) -> None:
    """Raise UserError where a recipe has another value than the weights, naming the key."""
    config = decoder.config
    told: dict[str, Any] = dict(sizes_of(decoder.foreign))
    told["input_embedding"] = config.input_embedding
    if config.input_embedding != "learned" and model.code_bits is not None:
        told["code_bits"] = config.code_bits
    for key, value in told.items():
        asked = getattr(model, key)
        if asked != value:
            raise UserError(
                f"--recipe: model.{key} is {asked!r}, and {value!r} in "
                f"{decoder.foreign.directory}; give a recipe with that, or leave --recipe out"
            )

"""Whether the tokenizer of an export is as an export is made to hold it today."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.shards import read_tokenizer
from pretrain.data.tokenizer import CONFIG_NAME, DEFINITION_NAME
from pretrain.hf.check_model import ExportedModel
from pretrain.hf.ids import check_ids, hard_texts
from pretrain.hf.names import AGAIN, CONFIG_FILE
from pretrain.hf.tokenizer import PLAIN_CLASS, ExportedTokenizer, as_exported, merged_config

# transformers 5 gives the plain one the second name when it saves it.
PLAIN_CLASSES = (PLAIN_CLASS, "TokenizersBackend")
# A template that adds nothing, which transformers 5 writes when it saves a tokenizer without one.
EMPTY_TEMPLATE = [{"Sequence": {"id": "A", "type_id": 0}}]

Json = dict[str, Any]
Problems = Iterator[str]  # each a line: where, what, and what to do


def tokenizer_problems(directory: Path, model: ExportedModel) -> Problems:
    """Where the tokenizer would give other ids than the data, or never the special ones."""
    files = read_tokenizer(directory)
    try:
        made_today = as_exported(files, directory, seq_len=0, names_unknown=model.is_stock)
    except UserError as error:
        yield str(error)
        return
    definition = files[DEFINITION_NAME]
    if in_effect(made_today.files[DEFINITION_NAME]) != in_effect(definition):
        does = (
            "adds tokens to texts, cuts or pads them, or merges at random, which the data did not"
        )
        yield f"{directory / DEFINITION_NAME}: {does}; {AGAIN}"
    told = merged_config(files, directory)
    yield from class_problems(directory / CONFIG_NAME, told)
    for left_out in made_today.left_out:
        yield f"{directory / CONFIG_NAME}: {left_out}; {AGAIN}"
    yield from special_id_problems(directory / CONFIG_FILE, model.config, made_today)
    yield from input_name_problems(directory / CONFIG_NAME, told, made_today)
    try:
        check_ids(directory, made_today.reference, hard_texts(made_today.reference), directory)
    except UserError as error:
        yield str(error)


def in_effect(definition: bytes) -> Json:
    """A tokenizer.json without a template that adds nothing."""
    content: Json = json.loads(definition)
    template = content.get("post_processor")
    if isinstance(template, dict) and template.get("single") == EMPTY_TEMPLATE:
        content["post_processor"] = None
    return content


def class_problems(path: Path, told: Json) -> Problems:
    """A class, or a flag of it, under which tokenizer.json is read otherwise."""
    class_name = told.get("tokenizer_class")
    if class_name not in PLAIN_CLASSES:
        other = (
            f"tokenizer_class {class_name}, which transformers 5 builds otherwise than "
            f"{DEFINITION_NAME} says"
        )
        yield f"{path}: {other}; write {PLAIN_CLASS} there"
    if told.get("split_special_tokens"):
        yield (
            f"{path}: split_special_tokens keeps the end of a text from being learnt in "
            "fine-tuning; remove it"
        )


def special_id_problems(path: Path, config: Json, made_today: ExportedTokenizer) -> Problems:
    """Ids in the model's configuration that are not the tokenizer's."""
    eos_id = made_today.roles.get("eos_token")
    eos_told = config.get("eos_token_id")
    # A list is right too: generation takes several.
    if eos_id is not None and eos_told not in (eos_id, [eos_id]):
        yield f"{path}: eos_token_id {eos_told}, the tokenizer's is {eos_id}; {AGAIN}"
    pad_id = made_today.roles.get("pad_token")
    pad_told = config.get("pad_token_id")
    if pad_id is not None and pad_told != pad_id:
        yield f"{path}: pad_token_id {pad_told}, the tokenizer's is {pad_id}; {AGAIN}"


def input_name_problems(path: Path, told: Json, made_today: ExportedTokenizer) -> Problems:
    """Inputs that the model refuses, given by a tokenizer that is not told which it takes."""
    names = json.loads(made_today.files[CONFIG_NAME])["model_input_names"]
    if told.get("model_input_names") != names:
        refused = "so transformers 4 refuses model.generate(**tokenizer(text))"
        yield f"{path}: no model_input_names, {refused}; write {json.dumps(names)} there"

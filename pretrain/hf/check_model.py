"""Whether modelling file, configuration and weights of an export fit each other.

And whether they fit the transformers of today.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import GPTNeoXConfig, PretrainedConfig

from data_prep.errors import UserError, explained, nearest, one_line, parse_json
from data_prep.files import digest_file
from pretrain.hf.names import AGAIN, CONFIG_FILE, INDEX_FILE, MODELING_FILE, WEIGHTS_FILE
from pretrain.modeling_tablefree import TableFreeConfig

# Modelling files of earlier versions by their xxh3-128, and the commits that made them. Their
# `forward` takes the KV cache as `past_key_values` and swallows everything else: from transformers
# 5.24 on, which calls it `cache`, each new token sees itself alone. With a static cache each token
# takes the place of the one before under 4.57 to 5.4.
WRONG_WITH_A_CACHE = {
    "7a0296e2ee0e298a713d86b54f882ce9": "3656bb5",
    "6b633a04658d33af5fdb0a05e59b3f17": "0d352b1",
    "d3424042a8323ff3382679c112c4918c": "ae212bb",
    "87ef316171b55631f51920cb214ab43f": "a137ccc",
    "49cbdb31938afb58a5a013c4febc855f": "1c562c8",
    "36494bca65eed132a8e892095df99b38": "f80dc49",
    "f819b8e24e853d9c8336dc900c77b77e": "1df34c4",
}
# What a config.json of any class may hold, beside what the installed transformers has itself.
OF_ANY_MODEL = {
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "is_decoder",
    "_name_or_path",
}
# The words of transformers 4 and 5 for the angles of GPT-NeoX's positions.
OF_ROTARY = {
    "rotary_pct",
    "rotary_emb_base",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "partial_rotary_factor",
}
# What the configuration of every stock export tells, where it tells it: another value is another
# model.
OF_EVERY_STOCK_EXPORT = {
    "use_parallel_residual": False,
    "hidden_act": "gelu",
    "attention_bias": True,
    "tie_word_embeddings": False,
    "rotary_pct": 1.0,
    "partial_rotary_factor": 1.0,
}
# The output projection, in each form and version.
HEADS = {"embed_out.weight", "lm_head.weight", "output_projection.weight"}
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
VERSION_KEY = "modeling_version"
FIRST_VERSION = 1  # of modelling files, which did not say it

Json = dict[str, Any]
Problems = Iterator[str]  # each a line: where, what, and what to do


@dataclass(frozen=True)
class ExportedModel:
    """What an export's config.json says."""

    config: Json

    @property
    def kind(self) -> Any:
        """Its model_type."""
        return self.config.get("model_type")

    @property
    def is_stock(self) -> bool:
        """Whether it is a GPT-NeoX of transformers, not the class that trained it."""
        return bool(self.kind == GPTNeoXConfig.model_type)


def read_model(directory: Path) -> ExportedModel:
    """The model of an export in Hugging Face format. Raises UserError for an unreadable file."""
    return ExportedModel(read_object(directory / CONFIG_FILE))


def is_of_an_export(model: ExportedModel) -> bool:
    """Whether a model is of a kind that exports are of."""
    return model.is_stock or model.kind == TableFreeConfig.model_type


def model_problems(directory: Path, model: ExportedModel, *, has_marker: bool) -> Problems:
    """What is wrong with a model; a marker, where there is one, has told of missing files.

    Raises UserError for a file that can't be read.
    """
    path = directory / CONFIG_FILE
    if not is_of_an_export(model):
        yield f"{path}: model_type {model.kind!r} is of no export; {AGAIN}"
        return
    if model.is_stock:
        yield from stock_config_problems(path, model.config)
    else:
        yield from modelling_file_problems(directory, has_marker=has_marker)
        yield from own_config_problems(directory, model.config)
    has_weights = any((directory / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))
    if not has_marker and not has_weights:
        yield f"{directory / WEIGHTS_FILE}: missing; {AGAIN}"
    yield from weight_problems(directory / WEIGHTS_FILE, model)


def read_object(path: Path) -> Json:
    """A JSON object of an export. Raises UserError for anything else."""
    content = parse_json(path.read_bytes(), str(path), AGAIN)
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON {type(content).__name__}, expected an object; {AGAIN}")
    return content


def modelling_file_problems(directory: Path, *, has_marker: bool) -> Problems:
    """Versions of the modelling file that give wrong text, and files that are none of ours."""
    path = directory / MODELING_FILE.name
    mend = f"cp {shlex.quote(str(MODELING_FILE))} {shlex.quote(str(directory))} mends it"
    if not path.is_file():
        if not has_marker:
            yield f"{path}: missing; {mend}"
        return
    digest = digest_file(path)
    if digest in WRONG_WITH_A_CACHE:
        wrong = (
            "of a version that generates wrong text with a KV cache under transformers 5.24 and "
            "newer"
        )
        yield f"{path}: {wrong}, and with a static one below 5.5; {mend}"
    elif not has_marker and digest != digest_file(MODELING_FILE):
        # Versions that are not listed above are younger than markers, which hold their digests.
        yield f"{path}: of no version of ours, so it was edited; {mend}"


def unknown_keys(path: Path, config: Json, read: set[str], known: set[str]) -> Problems:
    """Keys of a config.json that the class which reads it passes over in silence.

    `read` are those that it reads, `known` those of our own exports.
    """
    of_transformers = PretrainedConfig().to_dict().keys()
    for key in sorted(config.keys() - read - OF_ANY_MODEL - of_transformers):
        what = f"unknown key; {nearest(key, known)}"
        if key in known:
            what = "a key of later versions"
        yield f"{path}: {key}: nothing reads it: {what}; remove it, or {AGAIN}"


def stock_config_problems(path: Path, config: Json) -> Problems:
    """What GPT-NeoX would pass over in a stock export's configuration, or what changes it."""
    of_stock = GPTNeoXConfig().to_dict().keys() | OF_ROTARY
    yield from unknown_keys(path, config, of_stock, of_stock)
    for key, value in OF_EVERY_STOCK_EXPORT.items():
        if config.get(key, value) != value:
            yield f"{path}: {key} is {config[key]}, and {value} in every export; {AGAIN}"


def own_config_problems(directory: Path, config: Json) -> Problems:
    """What the modelling file of an export would pass over in its configuration, or not take."""
    path = directory / CONFIG_FILE
    code = directory / MODELING_FILE.name
    if code.is_file():
        version = version_of(code)
        told = config.get(VERSION_KEY, FIRST_VERSION)
        # A newer modelling file reads the configurations of older ones.
        is_newer_code = isinstance(told, int) and told < version
        if told != version and not is_newer_code:
            yield (
                f"{code}: version {version}, older than {CONFIG_FILE}, which is of version "
                f"{told}; {AGAIN}"
            )
            return
        read = names_in(code)
        if version > FIRST_VERSION:
            read.add(VERSION_KEY)
        known = {*TableFreeConfig().to_dict(), VERSION_KEY}
        yield from unknown_keys(path, config, read, known)
    try:
        TableFreeConfig(**config)  # this version's, which is no code of the export
    except Exception as error:  # transformers checks no types, and raises what comes of them
        yield f"{path}: {one_line(error).removeprefix(f'{CONFIG_FILE}: ')}; {AGAIN}"


def version_of(code: Path) -> int:
    """The version that a modelling file says it has; the first ones said none."""
    for statement in parsed(code).body:
        if not isinstance(statement, ast.Assign):
            continue
        target = statement.targets[0]
        if isinstance(target, ast.Name) and target.id == VERSION_KEY.upper():
            return int(ast.literal_eval(statement.value))
    return FIRST_VERSION


def parsed(code: Path) -> ast.Module:
    """A program, not run. Raises UserError if it is none."""
    unreadable = (SyntaxError, ValueError, RecursionError)
    with explained(unreadable, f"{code}: no readable program", AGAIN):
        return ast.parse(code.read_bytes())


def names_in(code: Path) -> set[str]:
    """Every name and every string of a program.

    What it doesn't name it can't read from a configuration.
    """
    names: set[str] = set()
    for node in ast.walk(parsed(code)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            names.add(node.arg)
    return names


def weight_problems(path: Path, model: ExportedModel) -> Problems:
    """Weights of another shape or number than the configuration tells.

    Only the header of their file is read.
    """
    if not path.is_file():
        return  # The marker has told of it, or somebody saved the weights anew in several files.
    try:
        shapes = shapes_in(path)
    except (SafetensorError, OSError) as error:
        yield f"{path}: not readable as safetensors ({error}); {AGAIN}"
        return
    width_key = "hidden_size" if model.is_stock else "d_model"
    layers_key = "num_hidden_layers" if model.is_stock else "num_layers"
    expected = (model.config.get("vocab_size"), model.config.get(width_key))
    for head in HEADS & shapes.keys():
        if shapes[head] != expected:
            yield (
                f"{path}: {head} has shape {shapes[head]}, {CONFIG_FILE} tells {expected}; {AGAIN}"
            )
    # By the numbers in names: what a file lacks in the middle is a layer less.
    matches = filter(None, map(LAYER.search, shapes))
    layers = len({match[1] for match in matches})
    layers_told = model.config.get(layers_key)
    if layers != layers_told:
        yield f"{path}: {layers} layers, {CONFIG_FILE} tells {layers_told}; {AGAIN}"


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a safetensors file, none of which is read."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()  # it is no mapping, and can't be iterated over
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}

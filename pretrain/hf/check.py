"""Whether an export is whole and right, told without the run that it was made from: `export_hf
--check DIR`.

Compared are its files with the digests in its marker, its modelling file with the versions known to
give wrong text under newer transformers, its configuration with what that file reads and with the
weights, and its tokenizer with what an export is made to hold today. Nothing of the export is
executed.
"""

import ast
import json
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
from data_prep.shards import read_tokenizer
from pretrain import modeling_tablefree
from pretrain.hf.ids import check_ids, hard_texts
from pretrain.hf.marker import MARKER_NAME, Marker, read_marker
from pretrain.hf.tokenizer import (
    CONFIG_NAME,
    DEFINITION_NAME,
    PLAIN_CLASS,
    as_exported,
    merged_config,
)
from pretrain.modeling_tablefree import TableFreeConfig

MODELING_FILE = Path(modeling_tablefree.__file__)
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_NAME = "README.md"
AGAIN = "export the run again"
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
# What a config.json of any class may hold, beside what the installed transformers has itself
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
# The words of transformers 4 and 5 for the angles of GPT-NeoX's positions
OF_ROTARY = {
    "rotary_pct",
    "rotary_emb_base",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "partial_rotary_factor",
}
# What the configuration of every stock export tells, where it tells it: another value is another
# model
OF_EVERY_STOCK_EXPORT = {
    "use_parallel_residual": False,
    "hidden_act": "gelu",
    "attention_bias": True,
    "tie_word_embeddings": False,
    "rotary_pct": 1.0,
    "partial_rotary_factor": 1.0,
}
# as transformers 5 calls the plain one when it saves
SAME_CLASS = (PLAIN_CLASS, "TokenizersBackend")
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"  # of weights in several files
# of the forms and their versions
HEADS = {"embed_out.weight", "lm_head.weight", "output_projection.weight"}
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
FIRST_VERSION = 1  # of modelling files, which did not say it

Json = dict[str, Any]
Problems = Iterator[str]  # each a line: where, what, and what to do


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found of an export; without problems it is whole and right."""

    about: str
    notes: tuple[str, ...]
    problems: tuple[str, ...]


def check_export(directory: Path) -> Verdict:
    """Look at an export. Raises UserError where there is none."""
    marker = read_marker(directory)
    if not (directory / CONFIG_FILE).is_file() and marker is None:
        raise UserError(
            f"{directory}: no export: neither {CONFIG_FILE} nor a good {MARKER_NAME} is there"
        )
    problems = [*file_problems(directory, marker)]
    if marker is None and (directory / MARKER_NAME).exists():
        problems.append(
            f"{directory / MARKER_NAME}: damaged, so that nothing here is known to be whole; "
            f"{AGAIN}"
        )
    if (directory / CONFIG_FILE).is_file():
        try:
            problems.extend(model_problems(directory, marker))  # those before an error too
        except UserError as error:  # a file that can't be read
            problems.append(str(error))
    return Verdict(
        about=describe(directory, marker),
        notes=tuple(notes(directory, marker)),
        problems=tuple(problems),
    )


def describe(directory: Path, marker: Marker | None) -> str:
    """What an export says of itself."""
    if marker is None:
        return f"{directory}: an export without a good {MARKER_NAME}"
    return f"{directory}: {marker.architecture} in {marker.dtype}, after step {marker.step:,}"


def notes(directory: Path, marker: Marker | None) -> Iterator[str]:
    """What is worth knowing and does no harm."""
    if marker is None:
        yield (
            f"there is no good {MARKER_NAME} (exports made by early versions have none): edits "
            "can't be told"
        )
        return
    for name in marker.files:
        if not differs(directory, name, marker):
            continue
        if name == CARD_NAME:
            yield f"{name} was edited; nothing loads it"
        elif is_mended(directory, name, marker):
            yield f"{name} was exchanged, and is as exports are made today"
    if more := sorted(
        path.name for path in directory.iterdir() if path.name not in (*marker.files, MARKER_NAME)
    ):
        yield f"not of the export, and not looked at: {', '.join(more)}"


def differs(directory: Path, name: str, marker: Marker) -> bool:
    """Whether a file is there and not as it was exported."""
    path = directory / name
    return path.is_file() and digest_file(path) != marker.files[name]


def is_mended(directory: Path, name: str, marker: Marker) -> bool:
    """Whether a file that differs from the exported one is what an export made today would hold,
    as is advised here.
    """
    if name == MODELING_FILE.name:
        return digest_file(directory / name) == digest_file(MODELING_FILE)
    if name != CONFIG_NAME:
        return False
    try:
        told = read_object(directory / CONFIG_NAME)
        today = as_exported(
            read_tokenizer(directory), directory, told.get("model_max_length", 0),
            names_unknown=marker.architecture == "gpt_neox",
        )  # fmt: skip
    except UserError:
        return False  # which is said with the tokenizer
    return bool(json.loads(today.files[CONFIG_NAME]) == told)


def file_problems(directory: Path, marker: Marker | None) -> Problems:
    """Files that are not as they were exported. A modelling file of an early version is told of
    with the model.
    """
    for name in marker.files if marker else ():
        path = directory / name
        if not path.is_file():
            yield f"{path}: missing; {AGAIN}"
        elif (
            marker
            and differs(directory, name, marker)
            and not is_said_elsewhere(directory, name, marker)
        ):
            yield f"{path}: differs from its digest, so it is damaged or was edited; {AGAIN}"


def is_said_elsewhere(directory: Path, name: str, marker: Marker) -> bool:
    """Whether a file that differs is told of in other words."""
    if name == MODELING_FILE.name and digest_file(directory / name) in WRONG_WITH_A_CACHE:
        return True
    return name == CARD_NAME or is_mended(directory, name, marker)


def model_problems(directory: Path, marker: Marker | None) -> Problems:
    """What is wrong with an export in Hugging Face format, whatever its digests say."""
    path = directory / CONFIG_FILE
    config = read_object(path)
    kind = config.get("model_type")
    if kind not in (TableFreeConfig.model_type, GPTNeoXConfig.model_type):
        yield f"{path}: model_type {kind!r} is of no export; {AGAIN}"
        return
    is_stock = kind == GPTNeoXConfig.model_type
    if is_stock:
        of_stock = GPTNeoXConfig().to_dict().keys() | OF_ROTARY
        yield from unknown_keys(path, config, of_stock, of_stock)
        for key, value in OF_EVERY_STOCK_EXPORT.items():
            if config.get(key, value) != value:
                yield f"{path}: {key} is {config[key]}, and {value} in every export; {AGAIN}"
    else:
        yield from modelling_file_problems(directory, marker)
        yield from config_problems(directory, config)
    if marker is None and not any(
        (directory / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)
    ):
        yield f"{directory / WEIGHTS_FILE}: missing; {AGAIN}"
    yield from weight_problems(directory, config, is_stock=is_stock)
    yield from tokenizer_problems(directory, config, is_stock=is_stock)


def read_object(path: Path) -> Json:
    """A JSON object of an export."""
    content = parse_json(path.read_bytes(), str(path), AGAIN)
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON {type(content).__name__}, expected an object; {AGAIN}")
    return content


def modelling_file_problems(directory: Path, marker: Marker | None) -> Problems:
    """Versions of the modelling file that give wrong text, and files that are none of ours."""
    path = directory / MODELING_FILE.name
    mend = f"cp {shlex.quote(str(MODELING_FILE))} {shlex.quote(str(directory))} mends it"
    if not path.is_file():
        if marker is None:
            yield f"{path}: missing; {mend}"
        return
    digest = digest_file(path)
    if digest in WRONG_WITH_A_CACHE:
        wrong = (
            "of a version that generates wrong text with a KV cache under transformers 5.24 and "
            "newer"
        )
        yield f"{path}: {wrong}, and with a static one below 5.5; {mend}"
    elif marker is None and digest != digest_file(
        MODELING_FILE
    ):  # markers are older than versions not listed above
        yield f"{path}: of no version of ours, so it was edited; {mend}"


def unknown_keys(path: Path, config: Json, read: set[str], known: set[str]) -> Problems:
    """Keys of a config.json that the class which reads it passes over in silence; `known` are
    those of ours.
    """
    for key in sorted(config.keys() - read - OF_ANY_MODEL - PretrainedConfig().to_dict().keys()):
        what = "a key of later versions" if key in known else f"unknown key; {nearest(key, known)}"
        yield f"{path}: {key}: nothing reads it: {what}; remove it, or {AGAIN}"


def config_problems(directory: Path, config: Json) -> Problems:
    """What in the configuration of a table-free export its modelling file would pass over, or
    not take.
    """
    path, code = directory / CONFIG_FILE, directory / MODELING_FILE.name
    own = set(TableFreeConfig().to_dict()) | {"modeling_version"}
    if code.is_file():
        names, version = names_in(code), version_of(code)
        told = config.get("modeling_version", FIRST_VERSION)
        if told != version and not (isinstance(told, int) and told < version):
            yield (
                f"{code}: version {version}, older than {CONFIG_FILE}, which is of version "
                f"{told}; {AGAIN}"
            )
            return
        yield from unknown_keys(
            path, config, names | ({"modeling_version"} if version > FIRST_VERSION else set()), own
        )
    try:
        TableFreeConfig(**config)  # this version's, which is no code of the export
    except Exception as error:  # transformers checks no types, and raises what comes of them
        yield f"{path}: {one_line(error).removeprefix(f'{CONFIG_FILE}: ')}; {AGAIN}"


def version_of(code: Path) -> int:
    """The version that a modelling file says it has; the first ones said none."""
    for node in parsed(code).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if (
            isinstance(target, ast.Name)
            and target.id == "MODELING_VERSION"
            and isinstance(node, ast.Assign)
        ):
            return int(ast.literal_eval(node.value))
    return FIRST_VERSION


def parsed(code: Path) -> ast.Module:
    """A program, not run."""
    with explained(
        (SyntaxError, ValueError, RecursionError), f"{code}: no readable program", AGAIN
    ):
        return ast.parse(code.read_bytes())


def names_in(code: Path) -> set[str]:
    """Every name and every string of a program: what it doesn't name it can't read from a
    configuration.
    """
    nodes = list(ast.walk(parsed(code)))
    names = {
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    names |= {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return names | {
        node.arg for node in nodes if isinstance(node, ast.arg | ast.keyword) and node.arg
    }


def weight_problems(directory: Path, config: Json, *, is_stock: bool) -> Problems:
    """Weights of another shape or number than the configuration tells, by the header of their
    file.
    """
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        return  # said by the marker, or sharded and saved anew by somebody
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        yield f"{path}: not readable as safetensors ({error}); {AGAIN}"
        return
    width, layers = ("hidden_size", "num_hidden_layers") if is_stock else ("d_model", "num_layers")
    expected = (config.get("vocab_size"), config.get(width))
    for head in HEADS & shapes.keys():
        if shapes[head] != expected:
            yield (
                f"{path}: {head} has shape {shapes[head]}, {CONFIG_FILE} tells {expected}; {AGAIN}"
            )
    numbers = {found[1] for name in shapes if (found := LAYER.search(name))}
    if len(numbers) != config.get(layers):
        yield f"{path}: {len(numbers)} layers, {CONFIG_FILE} tells {config.get(layers)}; {AGAIN}"


def in_effect(definition: bytes) -> Json:
    """A tokenizer.json without a template that adds nothing, such as transformers 5 writes when
    it saves one.
    """
    content: Json = json.loads(definition)
    template = content.get("post_processor")
    if isinstance(template, dict) and template.get("single") == [
        {"Sequence": {"id": "A", "type_id": 0}}
    ]:
        content["post_processor"] = None
    return content


def tokenizer_problems(directory: Path, config: Json, *, is_stock: bool) -> Problems:
    """Where the tokenizer would give other ids than the data, or never the special ones."""
    files, path = read_tokenizer(directory), directory / CONFIG_NAME
    try:
        made_today = as_exported(files, directory, seq_len=0, names_unknown=is_stock)
    except UserError as error:
        yield str(error)
        return
    if in_effect(made_today.files[DEFINITION_NAME]) != in_effect(files[DEFINITION_NAME]):
        does = (
            "adds tokens to texts, cuts or pads them, or merges at random, which the data did not"
        )
        yield f"{directory / DEFINITION_NAME}: {does}; {AGAIN}"
    told = merged_config(files, directory)
    if (class_name := told.get("tokenizer_class")) not in SAME_CLASS:
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
    for left_out in made_today.left_out:
        yield f"{path}: {left_out}; {AGAIN}"
    eos_id, eos_told = made_today.roles.get("eos_token"), config.get("eos_token_id")
    if eos_id is not None and eos_told not in (eos_id, [eos_id]):
        yield (
            f"{directory / CONFIG_FILE}: eos_token_id {eos_told}, the tokenizer's is {eos_id}; "
            f"{AGAIN}"
        )
    pad_id, pad_told = made_today.roles.get("pad_token"), config.get("pad_token_id")
    if pad_id is not None and pad_told != pad_id:
        yield (
            f"{directory / CONFIG_FILE}: pad_token_id {pad_told}, the tokenizer's is {pad_id}; "
            f"{AGAIN}"
        )
    new = json.loads(made_today.files[CONFIG_NAME])
    if told.get("model_input_names") != new["model_input_names"]:
        refused = "so transformers 4 refuses model.generate(**tokenizer(text))"
        yield (
            f"{path}: no model_input_names, {refused}; write "
            f"{json.dumps(new['model_input_names'])} there"
        )
    try:
        check_ids(directory, made_today.reference, hard_texts(made_today.reference), directory)
    except UserError as error:
        yield str(error)

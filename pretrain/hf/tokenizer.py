"""The tokenizer of an export: it gives a text the ids of the data set, and nothing more.

A published tokenizer may add tokens around each text (a template `<s> $A </s>`, or flags that make
its class add them), cut texts short, pad them, drop merges at random, or ask for a class that
builds another tokenizer than its file says: from transformers 5.0 on, classes with a name of their
own make normaliser and pre-tokenizer anew. The shards have none of that, so the model has never
seen it; after `</s>` it would take a prompt for finished. So an export's `tokenizer_config.json`
holds what is listed here and leaves everything else to `tokenizer.json`.

One thing differs from the data, on purpose: there, text that spells a special token is text; in an
export special tokens are special, as whoever fine-tunes or chats writes them into texts (`text +
tokenizer.eos_token`).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data_prep.errors import UserError, parse_json
from data_prep.shards import CHAT_TEMPLATE_NAME
from pretrain.data.tokenizer import CONFIG_NAME, COPY_IT, DEFINITION_NAME, as_in_the_data

# Post-processors that add tokens.
ADDING = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
PLAIN_CLASS = "PreTrainedTokenizerFast"  # takes tokenizer.json as it is, in transformers 4 and 5
# A file of transformers 4; its content moves into tokenizer_config.json.
ROLES_NAME = "special_tokens_map.json"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Special tokens beside these, as transformers 4 and 5 call them.
MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")
# No id hangs on these.
OF_DECODING = ("chat_template", "clean_up_tokenization_spaces", "padding_side", "truncation_side")
# What no reader of tokenizer.json needs: who saved it and where, what it says itself, and what is
# written anew here.
SAID_ELSEWHERE = {
    "tokenizer_class",
    "model_max_length",
    "split_special_tokens",
    "model_input_names",
    "added_tokens_decoder",
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "auto_map",
    "backend",
    "is_local",
    "local_files_only",
    "add_prefix_space",
    "add_bos_token",
    "add_eos_token",
    "errors",
    "use_fast",
    "legacy",
    "from_slow",
    "max_length",
}
# A decoder has no token types: transformers 4's `model.generate(**tokenizer(text))` refuses them.
MODEL_INPUTS = ["input_ids", "attention_mask"]

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ExportedTokenizer:
    """A tokenizer's files as an export holds them."""

    files: dict[str, bytes]
    reference: Tokenizer  # as data preparation uses it
    roles: dict[str, int]  # the id of each role that a token has, such as eos_token
    left_out: tuple[str, ...]  # what of the source's files is not in these, a line each

    @property
    def chat_template(self) -> str | None:
        """The template of chats, in a file of its own or in the configuration.

        Of several the one called default.
        """
        if CHAT_TEMPLATE_NAME in self.files:
            return self.files[CHAT_TEMPLATE_NAME].decode()
        told = json.loads(self.files[CONFIG_NAME]).get("chat_template")
        if isinstance(told, list):
            defaults = [each.get("template") for each in told if each.get("name") == "default"]
            told = defaults[0] if defaults else None
        return told if isinstance(told, str) else None

    def write_to(self, directory: Path) -> None:
        """Put the files into an export."""
        for name, held in self.files.items():
            (directory / name).write_bytes(held)


def as_exported(
    files: dict[str, bytes], source: Path, seq_len: int, *, names_unknown: bool = False
) -> ExportedTokenizer:
    """A tokenizer's files, by name, as an export holds them, told how long a text the model takes.

    `source` is where they were read. With `names_unknown` the token that ends documents is named as
    the one of unknown text too, where there is none: CTranslate2 loads no vocabulary without. No
    text gives it all the same, if the tokenizer knows every byte. Raises UserError if files are
    missing or damaged.
    """
    for name in (DEFINITION_NAME, CONFIG_NAME):
        if name not in files:
            raise UserError(
                f"{source / name}: missing; copy the tokenizer of the run's data set to {source}"
            )
    exported = dict(files)
    definition = read_object(files, DEFINITION_NAME, source)
    reference = as_in_the_data(files[DEFINITION_NAME], source / DEFINITION_NAME)
    adding_nothing = without_additions(definition)
    if adding_nothing != definition:
        text = json.dumps(adding_nothing, ensure_ascii=False)
        exported[DEFINITION_NAME] = text.encode()
        reference = as_in_the_data(exported[DEFINITION_NAME], source / DEFINITION_NAME)
    config, left_out = plain_config(merged_config(files, source), reference)
    if names_unknown and "eos_token" in config:
        config.setdefault("unk_token", config["eos_token"])
    config["model_max_length"] = seq_len
    exported[CONFIG_NAME] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    exported.pop(ROLES_NAME, None)
    return ExportedTokenizer(
        files=exported,
        reference=reference,
        roles=ids_of_roles(config, reference),
        left_out=tuple(left_out),
    )


def ids_of_roles(config: Json, reference: Tokenizer) -> dict[str, int]:
    """The id of each role that a token has."""
    found = {}
    for role in ROLES:
        id_ = reference.token_to_id(config.get(role) or "")
        if id_ is not None:
            found[role] = id_
    return found


def read_object(files: dict[str, bytes], name: str, source: Path) -> Json:
    """The JSON object in one of a tokenizer's files; an empty one if there is no such file."""
    value = parse_json(files.get(name, b"{}"), str(source / name), COPY_IT)
    if not isinstance(value, dict):
        raise UserError(
            f"{source / name}: a JSON {type(value).__name__}, expected an object; {COPY_IT}"
        )
    return value


def merged_config(files: dict[str, bytes], source: Path) -> Json:
    """`tokenizer_config.json`, and what only `special_tokens_map.json` says.

    As data preparation reads the two.
    """
    config = read_object(files, CONFIG_NAME, source)
    told = {key: value for key, value in config.items() if value is not None}
    return read_object(files, ROLES_NAME, source) | told


def without_additions(definition: Json) -> Json:
    """A `tokenizer.json` without what adds to a text, cuts it, pads it, or merges at random."""
    model = definition.get("model") or {}
    changed = definition | {
        "truncation": None,
        "padding": None,
        "post_processor": _kept(definition.get("post_processor")),
    }
    if model.get("dropout") is not None:
        changed["model"] = model | {"dropout": None}
    # A key that it lacks is as null: then it stays as it is, byte for byte.
    is_same = all(value == definition.get(key) for key, value in changed.items())
    return definition if is_same else changed


def _kept(processor: Json | None) -> Json | None:
    """A post-processor, or what is left of it without parts that add tokens."""
    if processor is None or processor["type"] in ADDING:
        return None
    if processor["type"] != "Sequence":
        return processor
    parts = list(filter(None, map(_kept, processor["processors"])))
    return processor | {"processors": parts} if parts else None


def plain_config(told: Json, reference: Tokenizer) -> tuple[Json, list[str]]:
    """A `tokenizer_config.json` that leaves everything to tokenizer.json.

    Returned with what was left out of it and is to be said, a line each.

    A role whose token is none of tokenizer.json is left out: transformers would add the token, with
    an id that the model has no output for. So is a further special token that is no added token
    there: it would be cut out of texts in which the data has it as text.
    """
    plain: Json = {"tokenizer_class": PLAIN_CLASS, "model_input_names": MODEL_INPUTS}
    for key in OF_DECODING:
        if key in told:
            plain[key] = told[key]
    if getattr(reference.pre_tokenizer, "add_prefix_space", False):
        # transformers 4 takes it from here, whatever tokenizer.json says
        plain["add_prefix_space"] = True
    left_out = []
    for role in ROLES:
        token = content_of(told.get(role))
        if token is None:
            continue
        if reference.token_to_id(token) is not None:
            plain[role] = token
        else:
            left_out.append(f"{role} {token!r} is no token of {DEFINITION_NAME}")
    added = {token.content for token in reference.get_added_tokens_decoder().values()}
    own = []
    for token in dict.fromkeys(more_tokens(told)):
        if token in added:
            own.append(token)
        else:
            left_out.append(f"special token {token!r} is no added token of {DEFINITION_NAME}")
    if own:
        plain[MORE_TOKENS[0]] = own
    known = {*plain, *ROLES, *MORE_TOKENS, *SAID_ELSEWHERE}
    for key in sorted(told.keys() - known):
        if told[key] not in (None, False):
            left_out.append(f"{key} is not carried over")
    return plain, left_out


def content_of(token: Any) -> str | None:
    """The text of a token as configurations write one: a string, or an object with its flags."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def more_tokens(told: Json) -> Iterable[str]:
    """The special tokens without one of the ROLES.

    Newer files give some of them names of their own.
    """
    for key in MORE_TOKENS:
        value = told.get(key)
        tokens = value.values() if isinstance(value, dict) else value
        if not isinstance(tokens, Iterable):
            continue
        for token in tokens:
            content = content_of(token)
            if content is not None:
                yield content

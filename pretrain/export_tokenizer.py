"""The tokenizer of an export: to a text it gives the ids that the data set holds for that text, and nothing more.

A published tokenizer may add tokens around each text (a template `<s> $A </s>`, or flags that make its class add them),
cut texts short, pad them, drop merges at random, or ask for a class that builds another tokenizer than its file says.
The shards have none of that, so the model has never seen it; after `</s>` it would take a prompt for finished.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_prep.errors import UserError, parse_json
from data_prep.shards import CHAT_TEMPLATE_NAME, read_tokenizer, sha256_of_files

ADDING = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")  # post-processors that add tokens
OF_A_CLASS = ("auto_map", "add_bos_token", "add_eos_token", "tokenizer_file", "vocab_file", "merges_file")
PLAIN_CLASS = "PreTrainedTokenizerFast"  # takes tokenizer.json as it is, in transformers 4 and 5
LONG = 1 << 30
PROBE_TOKENS = 2_000  # of the vocabulary, evenly spread

Json = dict[str, Any]


def copy_tokenizer(source: Path, destination: Path, seq_len: int) -> None:
    """Write a run's tokenizer into an export, told how long a text the model takes.

    Raises UserError if files are missing or damaged, or if the copy gives other ids than the data set's tokenizer.
    """
    files = read_tokenizer(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if name not in files:
            raise UserError(f"{source / name}: missing; copy the tokenizer of the run's data set to {source}")
    advice = "copy the tokenizer of the run's data set there"
    content = {
        name: parse_json(held, str(source / name), advice) for name, held in files.items() if "json" in name[-4:]
    }
    for name, value in content.items():
        if not isinstance(value, dict):
            raise UserError(f"{source / name}: a JSON {type(value).__name__}, expected an object; {advice}")
    definition = adding_nothing(content["tokenizer.json"])
    if definition != content["tokenizer.json"]:
        files["tokenizer.json"] = json.dumps(definition, ensure_ascii=False).encode()
    has_template = CHAT_TEMPLATE_NAME in files or "chat_template" in content["tokenizer_config.json"]
    config = plain_config(content["tokenizer_config.json"], has_template) | {"model_max_length": seq_len}
    files["tokenizer_config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    if "special_tokens_map.json" in files and content["special_tokens_map.json"].pop("auto_map", None):
        files["special_tokens_map.json"] = json.dumps(content["special_tokens_map.json"], indent=2).encode()
    for name, held in files.items():
        (destination / name).write_bytes(held)
    check_ids(as_in_the_data(read_tokenizer(source)["tokenizer.json"]), destination)


def refuse_another_tokenizer(source: Path, expected: str | None) -> None:
    """Raise UserError where a run's tokenizer is not the one whose identity its checkpoint tells, if it tells one.

    What is missing is left to `copy_tokenizer`, which names it.
    """
    files = read_tokenizer(source)
    if not expected or not {"tokenizer.json", "tokenizer_config.json"} <= files.keys():
        return
    found = sha256_of_files(files)
    if found != expected:
        problem = f"is not the tokenizer of the checkpoint (sha256 {found[:12]}, not {expected[:12]})"
        raise UserError(f"{source}: {problem}: its files were changed; copy the tokenizer of the run's data set there")


def adding_nothing(definition: Json) -> Json:
    """A `tokenizer.json` without what adds to a text, cuts it, pads it, or merges at random."""
    model = definition.get("model") or {}
    changed = definition | {
        "truncation": None,
        "padding": None,
        "post_processor": _kept(definition.get("post_processor")),
    }
    if model.get("dropout") is not None:
        changed["model"] = model | {"dropout": None}
    return changed if {key: value for key, value in changed.items() if value != definition.get(key)} else definition


def _kept(processor: Json | None) -> Json | None:
    """A post-processor, or what is left of it without parts that add tokens."""
    if processor is None or processor["type"] in ADDING:
        return None
    if processor["type"] != "Sequence":
        return processor
    parts = [kept for part in processor["processors"] if (kept := _kept(part))]
    return processor | {"processors": parts} if parts else None


def plain_config(config: Json, has_chat_template: bool) -> Json:
    """A `tokenizer_config.json` that leaves everything to tokenizer.json, and asks for no code of its own.

    In the data, text that spells a special token is text. So it is here, unless the configuration says otherwise, or a
    chat template needs such tokens.
    """
    plain = {key: value for key, value in config.items() if key not in OF_A_CLASS} | {"tokenizer_class": PLAIN_CLASS}
    if not has_chat_template:
        plain.setdefault("split_special_tokens", True)
    return plain


def as_in_the_data(definition: bytes) -> Tokenizer:
    """The tokenizer as data preparation uses it."""
    tokenizer = Tokenizer.from_buffer(definition)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer


def check_ids(expected: Tokenizer, export: Path) -> None:
    """AutoTokenizer, without code from elsewhere, must give the data's ids, over much of the vocabulary."""
    exported = AutoTokenizer.from_pretrained(export, local_files_only=True, trust_remote_code=False)
    exported.model_max_length = LONG  # of no concern here, but transformers would warn of long texts
    size = expected.get_vocab_size()
    some = range(0, size, max(1, size // PROBE_TOKENS))
    words = expected.decode(list(some), skip_special_tokens=True)
    for text in ("Fellow citizens", words, "  two  spaces\n\nand a line, e\u0301 \u65e5\u672c \U0001f642"):
        ids = expected.encode(text, add_special_tokens=False).ids
        if exported.encode(text, split_special_tokens=True) != ids:
            problem = "transformers would give other ids with the exported tokenizer than the data set holds"
            raise UserError(
                f"{export.name}: {problem}, as for {text[:40]!r}; use transformers 4.57 or newer, or report it"
            )

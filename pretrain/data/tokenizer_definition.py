"""What in a tokenizer's files decides the ids of a text, and whether two tokenizers give the same.

A published `tokenizer.json` may add tokens around a text, cut or pad it, or drop merges at random;
data preparation and exports do without. No torch here.
"""

from typing import Any

from data_prep.errors import parse_json

# Post-processors that add tokens.
ADDING = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
DEFINITION_NAME = "tokenizer.json"

Json = dict[str, Any]


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


def give_the_same_ids(one: bytes, other: bytes) -> bool:
    """Whether two `tokenizer.json` are one tokenizer, but for what adds to a text.

    Raises UserError for what is no JSON.
    """
    if one == other:
        return True
    definitions = []
    for content in (one, other):
        told = parse_json(content, DEFINITION_NAME, "copy the data set's tokenizer there")
        definitions.append(without_additions(told) if isinstance(told, dict) else told)
    return bool(definitions[0] == definitions[1])

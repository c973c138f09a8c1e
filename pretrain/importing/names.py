"""Which tensor of a directory is which parameter of ours: an explicit table for each form."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic

from data_prep.errors import UserError, first_problem, nearest, parse_yaml
from pretrain.hf.names import GPT_NEOX, TABLEFREE, TO_GPT_NEOX, renamed
from pretrain.modeling_tablefree import name_in_model

PUBLISHED_NAMES = Path(__file__).with_name("published_names.yaml")
LAYER = "{layer}"
TABLE = "input_embedding.weight"
OUTPUT_BIAS = "output_projection.bias"  # a parameter that this decoder does not have
# Causal masks and rotary frequencies that older transformers wrote beside the weights.
STOCK_BUFFERS = (".attention.bias", ".attention.masked_bias", ".inv_freq")
STRICT = pydantic.ConfigDict(extra="forbid", strict=True)

Parts = tuple[str, ...]  # names of tensors, one after the other


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Layout:
    """How tensors are laid out; see published_names.yaml."""

    lift: Literal["repeat", "repeat_interleave"] = "repeat"
    query_key_value: Literal["one_after_another", "by_head"] = "one_after_another"
    rotary: Literal["halves", "pairs"] = "halves"


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class NamesFile:
    """What a file of names holds."""

    names: dict[str, str | list[str]]
    layout: Layout = field(default_factory=Layout)
    ignored: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Names:
    """A table of names, and how the tensors under them are laid out."""

    origin: str  # where the table is from, for what is said of it
    # Our names, {layer} in place of a number -> those that theirs may have.
    names: dict[str, list[Parts]]
    layout: Layout
    ignored: tuple[str, ...]  # ends of the names of what is no parameter

    def candidates(self, ours: str) -> list[Parts]:
        """The names that a parameter of ours may have there."""
        pattern, layer = pattern_of(ours)
        found = []
        for parts in self.names.get(pattern, []):
            numbered = [part.replace(LAYER, layer) for part in parts]
            found.append(tuple(numbered))
        return found


def pattern_of(name: str) -> tuple[str, str]:
    """A parameter's name with {layer} in place of the number of its layer; and that number."""
    words = name.split(".")
    if words[0] != "layers":
        return name, ""
    layer = words[1]
    words[1] = LAYER
    return ".".join(words), layer


def names_of(form: str, parameters: list[str], file: Path | None) -> Names:
    """The table of a form, for parameters of ours; that of a file where one is given.

    Raises UserError for a file that is none, or where the form has a table of its own.
    """
    patterns = {pattern_of(name)[0] for name in parameters}
    if form in (TABLEFREE, GPT_NEOX):
        if file is not None:
            raise UserError(f"--names {file}: the names of {form} are known; leave the flag out")
        return own_names(form, patterns)
    path = file or PUBLISHED_NAMES
    if not path.is_file():
        raise UserError(f"--names {path}: no such file; {PUBLISHED_NAMES} is an example")
    content = parse_yaml(path.read_bytes(), str(path))
    return read_names(content, str(path), patterns)


def own_names(form: str, patterns: set[str]) -> Names:
    """Names that follow from ours, as exports and transformers write them."""
    found: dict[str, list[Parts]] = {}
    for pattern in patterns:
        if form == TABLEFREE:
            # Exports of before name them as checkpoints do.
            theirs = [name_in_model(pattern), pattern]
        else:
            stock = renamed(pattern, TO_GPT_NEOX)
            newer = stock.replace("embed_out.", "lm_head.")
            theirs = [stock, newer]
        found[pattern] = [(name,) for name in dict.fromkeys(theirs)]
    return Names(
        origin=form,
        names=found,
        layout=Layout(query_key_value="by_head"),
        ignored=STOCK_BUFFERS,
    )


def read_names(content: Any, origin: str, patterns: set[str]) -> Names:
    """A table of names from YAML. Raises UserError for what is none."""
    if not isinstance(content, dict):
        raise UserError(f"{origin}: no table of names; {PUBLISHED_NAMES} is an example")
    try:
        # What only YAML knows, such as dates, becomes text.
        text = json.dumps(content, default=str)
        told = pydantic.TypeAdapter(NamesFile).validate_json(text)
    except pydantic.ValidationError as error:
        problem = first_problem(error, suggest_key)
        raise UserError(f"{origin}: {problem}; {PUBLISHED_NAMES} is an example") from None
    names: dict[str, list[Parts]] = {}
    for ours, theirs in told.names.items():
        if ours not in patterns:
            raise UserError(f"{origin}: names.{ours}: no parameter; {nearest(ours, patterns)}")
        alternatives = [theirs] if isinstance(theirs, str) else theirs
        names[ours] = [tuple(each.split(" + ")) for each in alternatives]
    return Names(
        origin=origin,
        names=names,
        layout=told.layout,
        ignored=tuple(told.ignored),
    )


def suggest_key(place: str) -> str:
    """A suggestion for an unknown key of a file of names."""
    known = ("layout", "names", "ignored", "layout.lift", "layout.query_key_value", "layout.rotary")
    return nearest(place, known)

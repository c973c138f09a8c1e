"""The mixture file: which sources, which weights, which tokenizer. Read by `build_shards`.

Relative paths are relative to the mixture file. Unknown keys are errors that name the nearest right one.
"""

import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.corpus import FORMATS
from data_prep.errors import UserError
from data_prep.shards import integer_shares

MIXTURE_KEYS = ("tokenizer", "validation_fraction", "sources")
SOURCE_KEYS = ("name", "path", "format", "text_field", "weight", "license")


@dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """One named part of the corpus."""

    name: str
    path: str  # file or glob, as written
    format: str
    text_field: str | None  # None for txt
    weight: float
    license: str | None  # of the texts, handed on to the model card


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A checked mixture file."""

    base: Path  # directory of the mixture file
    tokenizer: str  # directory, as written
    validation_fraction: float
    sources: tuple[MixtureSource, ...]


def load_mixture(path: Path) -> Mixture:
    """Read and check a mixture file. Raises UserError naming the file and key."""
    content = _parse(path)
    _check_keys(content, MIXTURE_KEYS, MIXTURE_KEYS, str(path))
    fraction = _number(content["validation_fraction"], f"{path}: validation_fraction")
    if not 0 < fraction < 1:
        raise UserError(f"{path}: validation_fraction is {fraction}, expected above 0 and below 1, such as 0.005")
    if not isinstance(content["sources"], list) or not content["sources"]:
        raise UserError(f"{path}: sources: expected a list of at least one source")
    sources = tuple(_source(item, f"{path}: sources[{i}]") for i, item in enumerate(content["sources"]))
    names = [source.name for source in sources]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: two sources are named {repeated[0]!r}; give each its own name")
    integer_shares([source.weight for source in sources])
    tokenizer = _text(content["tokenizer"], f"{path}: tokenizer")
    return Mixture(base=path.parent, tokenizer=tokenizer, validation_fraction=fraction, sources=sources)


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; see data_prep/mixtures/example.yaml") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML ({error}); see data_prep/mixtures/example.yaml") from None
    return content


def _check_keys(content: object, known: tuple[str, ...], required: tuple[str, ...], where: str) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected the keys {', '.join(known)}; see data_prep/mixtures/example.yaml")
    for key in content:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0)
            raise UserError(f"{where}: unknown key {key!r}; did you mean {nearest[0]!r}?")
    if missing := [key for key in required if key not in content]:
        raise UserError(f"{where}: {missing[0]!r} is missing; see data_prep/mixtures/example.yaml")


def _source(item: object, where: str) -> MixtureSource:
    _check_keys(item, SOURCE_KEYS, ("name", "path", "format", "weight"), where)
    assert isinstance(item, dict)
    name = _text(item["name"], f"{where}: name")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"{where}: name {name!r}: expected letters, digits, '.', '_' and '-' (it names a directory)")
    format_ = _text(item["format"], f"{where}: format")
    if format_ not in FORMATS:
        raise UserError(f"{where}: format {format_!r}, expected one of {', '.join(FORMATS)}")
    if format_ == "txt" and "text_field" in item:
        raise UserError(f"{where}: text_field has no meaning for txt (a file is a document); remove it")
    text_field = None if format_ == "txt" else _text(item.get("text_field", "text"), f"{where}: text_field")
    weight = _number(item["weight"], f"{where}: weight")
    if weight <= 0:
        raise UserError(f"{where}: weight is {weight}, expected a positive number")
    path = _text(item["path"], f"{where}: path")
    license_ = _text(item["license"], f"{where}: license") if "license" in item else None
    return MixtureSource(name=name, path=path, format=format_, text_field=text_field, weight=weight, license=license_)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} is {value!r}, expected text")
    return value


def _number(value: object, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan  # YAML leaves 2e-1 as text, which float reads
    if not math.isfinite(number):
        raise UserError(f"{where} is {value!r}, expected a number")
    return number

"""From a file and overrides to a checked recipe, and back to YAML."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pydantic
import yaml

from data_prep.errors import UserError, first_problem, nearest, parse_yaml
from data_prep.shards import ShardReader
from pretrain.config.recipe import Recipe
from pretrain.config.recipe_names import OURS, suggest_key
from pretrain.config.rules import check_recipe

RECIPES_DIR = Path(__file__).parent.parent / "recipes"
NEAR = 0.6  # difflib's ratio from which two names of files are alike
AUTO = "auto"  # in the place of model.vocab_size: that of the data set


def dotted_keys(section: Any, prefix: str = "") -> list[str]:
    """Every key of a recipe, sections and what is in them."""
    keys = []
    for key in fields(section):
        dotted = prefix + key.name
        keys.append(dotted)
        if is_dataclass(key.type):
            keys += dotted_keys(key.type, f"{dotted}.")
    return keys


def shipped_file(name: str, directory: Path, suffix: str, key: str) -> Path:
    """A file that the project ships, by its name, or the path itself."""
    path = Path(name)
    if not path.suffix:
        path = directory / f"{name}{suffix}"
    if not path.is_file():
        raise UserError(f"{key} {name}: no such file; {nearest_file(name, directory, suffix)}")
    return path


def nearest_file(name: str, directory: Path, suffix: str) -> str:
    """A suggestion for the name of a file that is not there: a file beside it, or a shipped one."""
    shipped = [known.stem for known in directory.glob(f"*{suffix}")]
    path = Path(name)
    if not path.suffix:
        return f"{nearest(name, shipped)} (or give a {suffix} file)"
    beside = [known.name for known in path.parent.glob(f"*{suffix}")]
    close = difflib.get_close_matches(path.name, beside, n=1, cutoff=NEAR)
    if close:
        return f"did you mean {path.with_name(close[0])}?"
    if path.stem in shipped:
        return f"did you mean the shipped {path.stem}, without {suffix}?"
    return f"{nearest(path.stem, shipped)} (shipped), or give the path of a {suffix} file"


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set `--dotted.key=value` arguments in a recipe's nested dictionary, in place.

    Values are read as YAML. Raises UserError for what is no such argument.
    """
    for argument in overrides:
        dotted, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise UserError(
                f"{argument}: not a known flag; a recipe key is set as {form_of(dotted)}, with the "
                "sign ="
            )
        if not text:
            raise UserError(
                f"{argument}: has no value behind the sign =; give one, as null for none or [] for "
                "an empty list"
            )
        *sections, key = dotted.split(".")
        target = content
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise UserError(f"{argument}: {section} is a value, not a section of the recipe")
        target[key] = parse_yaml(text, argument)


def form_of(flag: str) -> str:
    """How a recipe key is set, for somebody who wrote it otherwise."""
    last = flag.rpartition(".")[2]
    key = OURS.get(last.replace("-", "_"))
    return f"--{key}=value" if key else "--dotted.key=value"


def as_numbers(value: Any) -> Any:
    """Read the numbers that YAML takes for text, `6e-4` and `17e9`; whole ones become integers."""
    if isinstance(value, dict):
        return {key: as_numbers(inner) for key, inner in value.items()}
    if not isinstance(value, str | float):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() else number


def nearest_key(dotted: str) -> str:
    """A suggestion for an unknown recipe key."""
    return suggest_key(dotted, dotted_keys(Recipe))


def build_recipe(content: Any, origin: str) -> Recipe:
    """Check a nested dictionary and make it a Recipe.

    Raises UserError for the first thing that is wrong.
    """
    if not isinstance(content, dict):
        raise UserError(f"{origin}: not a recipe: expected keys and values in YAML")
    try:
        # What only YAML knows, such as dates, becomes text.
        text = json.dumps(as_numbers(content), default=str)
        recipe = pydantic.TypeAdapter(Recipe).validate_json(text)
        check_recipe(recipe, origin)
    except pydantic.ValidationError as error:
        raise UserError(f"{origin}: {first_problem(error, nearest_key)}") from None
    # Of keys that are lists, and of endless numbers.
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{origin}: {error}") from None
    return recipe


def load_recipe(name: str, overrides: Sequence[str] = (), data_dir: Path | None = None) -> Recipe:
    """Read a shipped recipe by name or a file by path, with `--dotted.key=value` overrides.

    `model.vocab_size: auto` becomes the number of ids of the data set. Raises UserError.
    """
    path = shipped_file(name, RECIPES_DIR, ".yaml", "--recipe")
    content = parse_yaml(path.read_bytes(), str(path))
    if isinstance(content, dict):
        apply_overrides(content, overrides)
        resolve_vocab_size(content, data_dir, str(path))
    origin = " ".join([str(path), *overrides])
    return build_recipe(content, origin)


def resolve_vocab_size(content: dict[str, Any], data_dir: Path | None, origin: str) -> None:
    """Put the number of the data set's ids in the place of `model.vocab_size: auto`.

    Raises UserError without a data set.
    """
    model = content.get("model")
    if not isinstance(model, dict) or model.get("vocab_size") != AUTO:
        return
    if data_dir is None:
        raise UserError(
            f"{origin}: model.vocab_size is {AUTO}, the number of the data set's ids; give "
            "--data-dir, or a number as --model.vocab_size=N"
        )
    model["vocab_size"] = ShardReader(data_dir).manifest.vocab_size


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as nested dictionaries."""
    return asdict(recipe)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as a file that reads back equal."""
    return yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False)

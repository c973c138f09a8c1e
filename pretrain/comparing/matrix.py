"""The matrix of a comparison: which recipe keys vary over which values, and the cells that follow.

Of the varied keys `seed` makes pairs, that of `--baseline` treatments, and every other one groups,
within each of which treatments are compared. No torch: all this is refused before anything starts.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError, one_line, parse_yaml
from pretrain.config.changes import MAY_CHANGE_ON_RESUME, flatten
from pretrain.config.load import as_numbers, dotted_keys, load_recipe, nearest_key, recipe_to_dict
from pretrain.config.recipe import Recipe

SEED = "seed"
# The ids that a model knows are those of the data set, which all cells have in common; kernels that
# give the same bits each time are no other model.
NEVER_VARIES = MAY_CHANGE_ON_RESUME | {"model.vocab_size", "deterministic"}
MOST_CELLS = 1_000

Value = str | int | float | bool | None  # of a recipe's key
Settings = dict[str, Value]  # by dotted key


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a command line asks of a comparison, as texts."""

    recipe: str
    data_dir: Path
    vary: tuple[str, ...]  # KEY=V1,V2
    baseline: str | None  # KEY=VALUE
    overrides: tuple[str, ...]  # --dotted.key=value, of all cells


@dataclass(frozen=True, kw_only=True)
class Varied:
    """A key and the texts of its values."""

    key: str
    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A run of the matrix."""

    name: str  # of its directory: what it has of each varied key
    settings: Settings  # the varied keys alone
    overrides: tuple[str, ...]  # with which the recipe becomes the cell's
    recipe: Recipe

    @property
    def seed(self) -> int:
        """By which cells are paired."""
        return self.recipe.seed


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """All cells, those of the first seed first."""

    recipe_name: str
    cells: tuple[Cell, ...]
    keys: tuple[str, ...]  # that vary, in the order given
    treatment: str | None  # the key that is compared; None: nothing is
    baseline: Value  # its value that others are held against

    @property
    def group_keys(self) -> tuple[str, ...]:
        """The keys that tell groups apart."""
        return tuple(key for key in self.keys if key not in (SEED, self.treatment))

    def group_of(self, cell: Cell) -> Settings:
        """What a cell has in common with those that it is compared with."""
        return {key: cell.settings[key] for key in self.group_keys}

    def groups(self) -> list[tuple[Cell, ...]]:
        """Cells that are compared within themselves, in the order of the values given."""
        found: list[tuple[Cell, ...]] = []
        for cell in self.cells:
            for index, members in enumerate(found):
                if self.group_of(members[0]) == self.group_of(cell):
                    found[index] = (*members, cell)
                    break
            else:
                found.append((cell,))
        return found


def build_matrix(asked: Asked) -> Matrix:
    """The cells that a command line asks for. Raises UserError for what can't be compared."""
    varied = [parse_vary(text) for text in asked.vary]
    check_keys(varied, asked.overrides)
    size = 1
    for one in varied:
        size *= len(one.texts)
    if size > MOST_CELLS:
        raise UserError(f"--vary: {size:,} cells, expected {MOST_CELLS:,} at most; vary less")
    # Seeds go round slowest, so that all treatments of one seed are there early.
    slowest_first = sorted(varied, key=lambda one: one.key != SEED)
    cells = []
    for texts in itertools.product(*(one.texts for one in slowest_first)):
        chosen = dict(zip((one.key for one in slowest_first), texts, strict=True))
        given_order = {one.key: chosen[one.key] for one in varied}
        cells.append(build_cell(asked, given_order))
    check_values(varied, cells)
    treatment, baseline = parse_baseline(asked.baseline, cells)
    return Matrix(
        recipe_name=asked.recipe,
        cells=tuple(cells),
        keys=tuple(one.key for one in varied),
        treatment=treatment,
        baseline=baseline,
    )


def parse_vary(argument: str) -> Varied:
    """A `--vary` as its key and values. Raises UserError for what is none."""
    key, equals, values = argument.partition("=")
    texts = tuple(text.strip() for text in values.split(","))
    if not equals or not all(texts):
        raise UserError(f"--vary {argument}: expected KEY=V1,V2, such as seed=1,2,3")
    if key not in dotted_keys(Recipe):
        raise UserError(f"--vary {key}: unknown key; {nearest_key(key)}")
    return Varied(key=key, texts=texts)


def check_keys(varied: Sequence[Varied], overrides: Sequence[str]) -> None:
    """Raise UserError for keys over which runs can't be compared, and those given twice."""
    if not varied:
        raise UserError("nothing varies; give --vary KEY=V1,V2, such as --vary seed=1,2,3")
    overridden = {text.removeprefix("--").partition("=")[0] for text in overrides}
    sections = {key.rpartition(".")[0] for key in dotted_keys(Recipe)}
    seen: set[str] = set()
    for one in varied:
        key = one.key
        if key in NEVER_VARIES or key.partition(".")[0] in NEVER_VARIES:
            raise UserError(
                f"--vary {key}: runs can't be compared over it, it must be the same in all cells; "
                f"set it for all of them with --{key}=VALUE"
            )
        if key in sections:
            raise UserError(f"--vary {key}: a section of the recipe; vary one of its keys")
        if key in seen:
            raise UserError(f"--vary {key}: given twice; give all its values in one --vary")
        if key in overridden:
            raise UserError(f"--vary {key}: also set with --{key}=; leave one of the two out")
        seen.add(key)


def build_cell(asked: Asked, texts: dict[str, str]) -> Cell:
    """The cell of some values. Raises UserError where no run can be of them."""
    flags = [f"--{key}={text}" for key, text in texts.items()]
    try:
        recipe = load_recipe(asked.recipe, [*asked.overrides, *flags], asked.data_dir)
    except UserError as error:
        raise UserError(f"the cell {' '.join(flags)}: {one_line(error)}") from None
    of_recipe = flatten(recipe_to_dict(recipe))
    settings: Settings = {key: of_recipe[key] for key in texts}
    return Cell(
        name=name_of(settings),
        settings=settings,
        overrides=(*asked.overrides, *flags),
        recipe=recipe,
    )


def short_key(key: str) -> str:
    """The last name of a key, where no other key of a recipe has it."""
    last = key.rpartition(".")[2]
    alike = [known for known in dotted_keys(Recipe) if known.rpartition(".")[2] == last]
    return last if len(alike) == 1 else key


def name_of(settings: Settings) -> str:
    """What a cell is called, in words that a file system takes."""
    parts = [f"{short_key(key)}={show_value(value)}" for key, value in settings.items()]
    name = ",".join(parts)
    if "/" in name or not name.isprintable():
        raise UserError(f"--vary: {name!r} can't be the name of a directory; vary another key")
    return name


def show_value(value: Value) -> str:
    """A value as recipes have it."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    return str(value)


def check_values(varied: Sequence[Varied], cells: Sequence[Cell]) -> None:
    """Raise UserError where two texts are one value: 1e3 and 1000."""
    for one in varied:
        found: dict[str, str] = {}
        for text in one.texts:
            flag = f"--{one.key}={text}"
            value = next(cell.settings[one.key] for cell in cells if flag in cell.overrides)
            shown = show_value(value)
            if shown in found:
                raise UserError(
                    f"--vary {one.key}: {found[shown]} and {text} are the same value; give it once"
                )
            found[shown] = text


def parse_baseline(argument: str | None, cells: Sequence[Cell]) -> tuple[str | None, Value]:
    """The key that is compared, and the value that others are held against.

    Raises UserError where that is none of the values of a varied key.
    """
    if argument is None:
        return None, None
    key, equals, text = argument.partition("=")
    keys = list(cells[0].settings)
    if not equals or not text:
        raise UserError(f"--baseline {argument}: expected KEY=VALUE, one of the values of a --vary")
    if key not in keys:
        raise UserError(f"--baseline {key}: does not vary; expected one of {', '.join(keys)}")
    if key == SEED:
        raise UserError("--baseline seed: seeds make pairs; name a key that makes treatments")
    asked = as_numbers(parse_yaml(text, f"--baseline {argument}"))
    values = list(dict.fromkeys(cell.settings[key] for cell in cells))
    for value in values:
        if value == asked:
            return key, value
    there = ", ".join(show_value(value) for value in values)
    raise UserError(f"--baseline {argument}: is not among its values; expected one of {there}")

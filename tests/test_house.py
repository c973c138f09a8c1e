"""The walls of the house: who may import whom, and how its lines read.

python tests/test_house.py        prints the figures of each wing; what they are says house_figures
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from support.house_figures import Function, Module, figures_of, house_modules, table, wings_of
from support.runs import REPOSITORY

from data_prep.commands import IS_A_COMMAND

PACKAGES = ("data_prep", "pretrain", "launch")

SOURCES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
DATA_PREP = [path for path in SOURCES if path.is_relative_to(REPOSITORY / "data_prep")]
PRETRAIN = [path for path in SOURCES if path.is_relative_to(REPOSITORY / "pretrain")]
# The wings of pretrain/ from the ground up: a module imports from its own floor and from those
# below it.
FLOORS = (
    {"config", "distributed"},
    {"data", "checkpoint", "costs"},
    {"model", "metrics"},
    {"engine", "view", "evaluation", "generation", "watch"},
    {"hf", "run", "reporting", "comparing", "importing"},
)
# What pretrain takes of data_prep: the data set, durable files, locks, errors, what commands share;
# URLs that are safe to print; and other texts as ids, to measure a model on.
TAKEN_FROM_DATA_PREP = {
    "data_prep.manifest", "data_prep.shards", "data_prep.layout", "data_prep.files",
    "data_prep.locks", "data_prep.errors", "data_prep.commands", "data_prep.inputs.urls",
    "data_prep.tokenizer.text_files", "data_prep.slurm.step",
}  # fmt: skip
TOP_LEVEL = {
    "pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", ".gitignore",
    ".pre-commit-config.yaml", ".ci",
    "pretrain", "data_prep", "ds_configs", "launch", "tests", "findings",
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(path: Path) -> set[str]:
    """Top-level packages that a file imports."""
    return {name.partition(".")[0] for name in imports(path)}


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def is_part_of(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def test_imports_sees_through_every_way_of_importing(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import os.path as p\nfrom a.b import c\ndef f():\n    import torch.nn\n    from d import "
        "e\n"
    )
    assert imports(path) == {"os.path", "a.b", "a.b.c", "torch.nn", "d", "d.e"}


def test_there_is_something_to_look_at() -> None:
    assert REPOSITORY / "data_prep" / "shards.py" in DATA_PREP
    assert REPOSITORY / "pretrain" / "engine" / "engine.py" in PRETRAIN
    wings = {path.parent.name for path in (REPOSITORY / "pretrain").glob("*/__init__.py")}
    assert wings == set().union(*FLOORS)


@pytest.mark.parametrize("path", DATA_PREP, ids=relative)
def test_data_prep_never_sees_pretrain_or_torch(path: Path) -> None:
    assert not packages(path) & {"pretrain", "torch", "deepspeed", "accelerate"}


def test_nothing_imports_a_command_of_data_prep() -> None:
    commands = {
        f"data_prep.{path.stem}"
        for path in DATA_PREP
        if path.parent.name == "data_prep" and IS_A_COMMAND in path.read_text(encoding="utf-8")
    }
    assert "data_prep.build_shards" in commands
    assert not {relative(path): found for path in SOURCES if (found := imports(path) & commands)}


def test_data_prep_imports_what_takes_seconds_only_where_it_is_needed() -> None:
    program = (
        "import sys, data_prep.build_shards, data_prep.verify, data_prep.train_tokenizer; "
        "print(*sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert not {"transformers", "datasets", "pandas", "mpi4py"} & set(result.stdout.split())


@pytest.mark.parametrize("path", PRETRAIN, ids=relative)
def test_pretrain_takes_only_the_contract_and_what_commands_share_from_data_prep(
    path: Path,
) -> None:
    taken = {name for name in imports(path) if name.startswith("data_prep")} - {"data_prep"}
    assert not {name for name in taken if not is_part_of(name, TAKEN_FROM_DATA_PREP)}
    assert "launch" not in packages(path)


def test_only_one_module_imports_deepspeed() -> None:
    assert [relative(path) for path in SOURCES if "deepspeed" in packages(path)] == [
        "pretrain/engine/deepspeed_library.py"
    ]


def test_imports_of_wings_go_down() -> None:
    """Commands, on the roof, import wings and the modelling file; nothing imports a command."""
    module_of = {relative(path).removesuffix(".py").replace("/", "."): path for path in PRETRAIN}
    floor_of = {wing: floor for floor, wings in enumerate(FLOORS) for wing in wings}
    roof = len(FLOORS)

    def floor(module: str) -> int:
        first = module.split(".")[1]
        return -1 if first == "modeling_tablefree" else floor_of.get(first, roof)

    upwards = set()
    for module, path in module_of.items():
        for used in imports(path) & (module_of.keys() - {"pretrain.__init__"}):
            if floor(used) == roof or floor(used) > floor(module):
                upwards.add((module.removeprefix("pretrain."), used.removeprefix("pretrain.")))
    assert not upwards


def test_the_modelling_file_is_self_contained() -> None:
    others = packages(REPOSITORY / "pretrain" / "modeling_tablefree.py") - set(
        sys.stdlib_module_names
    )
    assert others == {"torch", "transformers"}


def test_no_module_hides_one_of_python_s() -> None:
    rarely_imported = {"trace"}  # a tool of Python's for its own programs
    assert not [
        relative(path) for path in SOURCES if path.stem in sys.stdlib_module_names - rarely_imported
    ]


def test_imports_of_our_own_modules_run_in_no_circle() -> None:
    module_of = {relative(path).removesuffix(".py").replace("/", "."): path for path in SOURCES}
    uses = {module: imports(path) & module_of.keys() for module, path in module_of.items()}
    while leaves := [module for module, used in uses.items() if not used]:
        uses = {module: used - set(leaves) for module, used in uses.items() if module not in leaves}
    assert not uses, f"these import each other: {sorted(uses)}"


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.name == "__init__.py"], ids=relative
)
def test_an_init_file_holds_a_docstring_and_nothing_else(path: Path) -> None:
    statements = ast.parse(path.read_text(encoding="utf-8")).body
    assert len(statements) == 1
    assert isinstance(statements[0], ast.Expr)
    assert isinstance(statements[0].value, ast.Constant)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def count_lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_files_of_tests_have_names_of_their_own() -> None:
    """Folders of tests are no packages, so pytest knows a file by its name alone."""
    names = Counter(path.name for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_the_readme_stays_below_150_lines() -> None:
    assert count_lines([REPOSITORY / "README.md"]) < 150


def test_the_top_level_holds_what_it_is_to_hold_and_nothing_else() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    assert {name.partition("/")[0] for name in listing.stdout.splitlines()} == TOP_LEVEL


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_that_comments_and_docstrings_name_are_there(path: Path) -> None:
    """Paths below the folders of the project, as in pretrain/run/state.py."""
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.])((?:pretrain|data_prep|launch|tests)/[\w/-]+\.\w+)", text)
    assert not [name for name in named if not (REPOSITORY / name).exists()]


def test_links_and_files_that_texts_name_are_there() -> None:
    """Relative links of every page, and every path in backquotes below the folders of the
    project.
    """
    pages = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    pages += sorted(REPOSITORY.glob("[a-z]*/README.md"))
    assert len(pages) > 5
    missing = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+)[^)\s]*\)", text):
            missing += [f"{relative(page)}: {link}"] if not (page.parent / link).exists() else []
        for name in re.findall(
            r"`(?:python )?((?:pretrain|data_prep|launch|tests|ds_configs)/[\w./-]+)", text
        ):
            missing += [f"{relative(page)}: {name}"] if not (REPOSITORY / name).exists() else []
    assert not missing


FIGURED = '''"""A docstring
of two lines.
"""

import os  # not counted as a line of its own

# a reason
LIMIT = 3


class Reader:
    """Of nothing."""

    def read(self, start, /, stop, *more, step=1, **options):
        """None."""
        first, second = start, stop
        first, second = second, first
        first, rest = os.path.split(stop)

        return first[
            LIMIT
        ]
'''


def test_figures_count_code_comments_expressions_functions_and_unrelated_values() -> None:
    figures = figures_of(FIGURED, "wing/module.py")
    assert (figures.lines, figures.code_lines, figures.comment_lines) == (22, 10, 2)
    # `LIMIT = 3`, three docstrings, a default, two pairs, a call of a method, a subscript
    assert figures.expressions == 2 + 3 + 1 + 2 * 6 + 8 + 3
    assert figures.functions == (Function(name="read", line=14, lines=9, parameters=3),)
    assert figures.unrelated == (16,)
    (wing,) = wings_of([figures, figures_of('"""Empty."""', "wing/__init__.py")])
    assert (wing.name, wing.files, wing.code_lines) == ("wing", 1, 10)
    assert wing.density == (figures.expressions + 1) / 10
    assert wing.comment_share == 2 / 23


# What a reader of a module, a function or a folder can still hold in mind.
MOST_LINES_OF_A_MODULE = 400
MOST_LINES_OF_A_FUNCTION = 50
MOST_PARAMETERS = 5
MOST_FILES_OF_A_WING = 12
MOST_EXPRESSIONS_A_LINE = 4.6  # over a wing; nanochat, a project that reads well, has as many
# One file, since an export ships it; transformers calls its functions, with its own arguments.
MODELLING_FILE = "pretrain/modeling_tablefree.py"


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    """The figures of every module."""
    found = house_modules(REPOSITORY, PACKAGES)
    assert sorted(REPOSITORY / module.path for module in found) == SOURCES
    return found


@pytest.fixture(scope="module")
def bounded(modules: list[Module]) -> list[Module]:
    """Those whose lengths and parameters are bounded: all but one."""
    found = [module for module in modules if module.path != MODELLING_FILE]
    assert len(found) == len(modules) - 1
    return found


def expect_none(found: Iterable[str]) -> None:
    """Fail with a line for each that is beyond a bound."""
    beyond = [*found]
    assert not beyond, "\n".join(beyond)


def test_modules_have_at_most_400_lines(bounded: list[Module]) -> None:
    expect_none(
        f"{module.path}: {module.lines} lines"
        for module in bounded
        if module.lines > MOST_LINES_OF_A_MODULE
    )


def test_functions_have_at_most_50_lines(bounded: list[Module]) -> None:
    expect_none(
        f"{module.path}:{function.line}: {function.name}, {function.lines} lines"
        for module in bounded
        for function in module.functions
        if function.lines > MOST_LINES_OF_A_FUNCTION
    )


def test_functions_have_at_most_5_parameters(bounded: list[Module]) -> None:
    expect_none(
        f"{module.path}:{function.line}: {function.name}, {function.parameters} parameters"
        for module in bounded
        for function in module.functions
        if function.parameters > MOST_PARAMETERS
    )


def test_a_statement_gives_no_unrelated_values_to_several_names(modules: list[Module]) -> None:
    expect_none(f"{module.path}:{line}" for module in modules for line in module.unrelated)


def test_wings_have_at_most_12_files(modules: list[Module]) -> None:
    expect_none(
        f"{wing.name}: {wing.files} files"
        for wing in wings_of(modules)
        if wing.files > MOST_FILES_OF_A_WING
    )


def test_wings_have_at_most_4_6_expressions_a_code_line(modules: list[Module]) -> None:
    expect_none(
        f"{wing.name}: {wing.density:.2f} expressions a code line"
        for wing in wings_of(modules)
        if wing.density > MOST_EXPRESSIONS_A_LINE
    )


def test_lines_of_more_than_100_columns_are_refused_by_ruff() -> None:
    ruff = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "ruff"
    ]
    assert ruff["line-length"] == 100
    assert "E" in ruff["lint"]["select"]
    assert "E501" not in ruff["lint"]["ignore"]


if __name__ == "__main__":
    print(table(wings_of(house_modules(REPOSITORY, PACKAGES))))

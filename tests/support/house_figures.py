"""How the lines of this project read, in figures: of each module, and of each wing (a folder).

- A code line holds a token that is no comment and is not inside a docstring.
- Expressions are the nodes of a module's syntax tree that are `ast.expr`; a wing's density is all
  its expressions divided by all its code lines.
- The comment share is the lines that hold a comment, divided by all lines.
- A function's length goes from its `def` to its last line; `self` and `cls`, `*args` and `**kwargs`
  are none of its parameters.
- Unrelated values are those that a tuple literal gives to several names at once. A swap, whose two
  sides hold the same things in another order, is no such statement.
"""

import ast
import io
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)
HEADER = ("wing", "files", "code", "expr/line", "comments", "longest file", "longest function")


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function or method of a module."""

    name: str
    line: int
    lines: int
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Module:
    """The figures of one file."""

    path: str  # below the project's root
    lines: int
    code_lines: int
    comment_lines: int
    expressions: int
    functions: tuple[Function, ...]
    # lines of statements that give unrelated values to several names
    unrelated: tuple[int, ...]

    @property
    def wing(self) -> str:
        """The folder that it lies in."""
        return self.path.rpartition("/")[0]

    @property
    def is_init(self) -> bool:
        """Whether it only says what its folder is for."""
        return self.path.endswith("__init__.py")


@dataclass(frozen=True, kw_only=True)
class Wing:
    """The figures of the modules in one folder, those in folders below it not included."""

    name: str
    modules: tuple[Module, ...]

    @property
    def files(self) -> int:
        """How many modules it holds besides `__init__.py`."""
        return sum(not module.is_init for module in self.modules)

    @property
    def code_lines(self) -> int:
        """Of all its modules."""
        return sum(module.code_lines for module in self.modules)

    @property
    def density(self) -> float:
        """Expressions a code line."""
        return sum(module.expressions for module in self.modules) / max(1, self.code_lines)

    @property
    def comment_share(self) -> float:
        """Of all its lines, between 0 and 1."""
        lines = sum(module.lines for module in self.modules)
        return sum(module.comment_lines for module in self.modules) / max(1, lines)


def figures_of(source: str, path: str) -> Module:
    """Count in one file's text."""
    tree = ast.parse(source)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    code_lines = set[int]()
    for token in tokens:
        if token.type not in NO_CODE:
            code_lines.update(range(token.start[0], token.end[0] + 1))
    comment_lines = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    nodes = list(ast.walk(tree))
    return Module(
        path=path,
        lines=len(source.splitlines()),
        code_lines=len(code_lines - docstring_lines(nodes)),
        comment_lines=len(comment_lines),
        expressions=sum(isinstance(node, ast.expr) for node in nodes),
        functions=tuple(functions_among(nodes)),
        unrelated=tuple(unrelated_among(nodes)),
    )


def docstring_lines(nodes: Iterable[ast.AST]) -> set[int]:
    """The lines of the docstrings of a module, its classes and its functions."""
    lines = set[int]()
    for node in nodes:
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            lines.update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return lines


def functions_among(nodes: Iterable[ast.AST]) -> Iterator[Function]:
    """The functions and methods, nested ones too."""
    for node in nodes:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        names = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
        own = names[1:] if names[:1] in (["self"], ["cls"]) else names
        yield Function(
            name=node.name,
            line=node.lineno,
            lines=(node.end_lineno or 0) - node.lineno + 1,
            parameters=len(own) + len(node.args.kwonlyargs),
        )


def unrelated_among(nodes: Iterable[ast.AST]) -> Iterator[int]:
    """The lines of statements like `a, b = 1, 2`, swaps left out."""
    for node in nodes:
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)):
            continue
        values = sorted(ast.unparse(value) for value in node.value.elts)
        for target in node.targets:
            if not isinstance(target, ast.Tuple):
                continue
            if sorted(ast.unparse(name) for name in target.elts) != values:
                yield node.lineno


def house_modules(root: Path, packages: Sequence[str]) -> list[Module]:
    """The figures of every module of the packages below a project's root."""
    return [
        figures_of(path.read_text(encoding="utf-8"), path.relative_to(root).as_posix())
        for package in packages
        for path in sorted((root / package).rglob("*.py"))
    ]


def wings_of(modules: Iterable[Module]) -> list[Wing]:
    """Modules by the folder that they lie in."""
    by_folder = defaultdict[str, list[Module]](list)
    for module in modules:
        by_folder[module.wing].append(module)
    return [Wing(name=name, modules=tuple(found)) for name, found in sorted(by_folder.items())]


def table(wings: Iterable[Wing]) -> str:
    """A row a wing, in columns."""
    rows = [HEADER]
    for wing in wings:
        longest = max(wing.modules, key=lambda module: module.lines)
        functions = [each for module in wing.modules for each in module.functions]
        function = max(functions, key=lambda each: each.lines, default=None)
        rows.append(
            (
                wing.name,
                str(wing.files),
                str(wing.code_lines),
                f"{wing.density:.2f}",
                f"{wing.comment_share:.1%}",
                f"{longest.lines} {Path(longest.path).name}",
                "" if function is None else f"{function.lines} {function.name}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )

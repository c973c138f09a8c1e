"""Text in columns: facts with their names in front, and tables."""

from collections.abc import Iterable, Iterator, Sequence

NAME_CHARACTERS = 13  # in front of a fact; with the two spaces that follow the longest name
LINE_CHARACTERS = 86  # of a fact behind its name: lines fit 100 columns
TEXT_COLUMNS = 2  # of a table; those behind them hold numbers

Fact = tuple[str, str]  # its name, and what it says, in one line or several


def facts(named: Iterable[Fact], indent: str = "") -> Iterator[str]:
    """The lines of some facts, aligned behind their names."""
    for name, value in named:
        label = indent + name
        for line in value.split("\n"):
            yield label.ljust(NAME_CHARACTERS) + line
            label = ""


def cut(text: str, length: int) -> str:
    """At most so many characters of a text, and a sign if there are more."""
    if len(text) <= length:
        return text
    return text[:length] + "…"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first two to the left, numbers to the right, a rule below the header."""
    widths = []
    for column in zip(*rows, strict=True):
        longest = max(column, key=len)
        widths.append(len(longest))
    header, *others = rows
    rule = ["-" * width for width in widths]
    lines = [table_line(row, widths) for row in (header, rule, *others)]
    return "\n".join(lines)


def table_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The cells of a row, each as wide as its column."""
    aligned: list[str] = []
    for cell, width in zip(cells, widths, strict=True):
        if len(aligned) < TEXT_COLUMNS:
            aligned.append(cell.ljust(width))
        else:
            aligned.append(cell.rjust(width))
    return "  ".join(aligned).rstrip()

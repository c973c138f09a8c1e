"""Text in columns."""

from collections.abc import Iterable, Iterator, Sequence

NAME_CHARACTERS = 13  # of a fact
LINE_CHARACTERS = 86


def facts(named: Iterable[tuple[str, str]], indent: str = "") -> Iterator[str]:
    """Names and what they stand for, aligned."""
    for name, value in named:
        yield f"{indent}{name:<{NAME_CHARACTERS - len(indent)}}" + value.replace(
            "\n", "\n" + " " * NAME_CHARACTERS
        )


def cut(text: str, length: int) -> str:
    """At most so many characters of a text, and a sign if there are more."""
    return text[:length] + "…" * (len(text) > length)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first two to the left, numbers to the right, a rule below the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{'<' if i < 2 else '>'}{width}}}" for i, width in enumerate(widths))
    rule = ["-" * width for width in widths]
    return "\n".join(form.format(*row).rstrip() for row in (rows[0], rule, *rows[1:]))

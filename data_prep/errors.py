"""Bad input: the one exception users meet, and how every command reports it.

A command's `main` raises `UserError`; `exit_code` turns it into one line on stderr and exit code 2.
Anything else that escapes is a defect of ours and keeps its traceback.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import yaml

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells have it


class UserError(Exception):
    """Input that can't be used. The message says what, where, got, expected, and what to do."""


@contextlib.contextmanager
def explained(kinds: type[Exception] | tuple[type[Exception], ...], problem: str, advice: str) -> Iterator[None]:
    """Exceptions of these kinds become a UserError: the problem, (what the exception says), and what to do."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{problem} ({what_it_says(error)}); {advice}") from None


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s: one line, like all others."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise UserError(f"{message}; --help lists the flags")


def large_number(text: str) -> int:
    """A number of 1 or more on a command line; 17e9 is one too."""
    with contextlib.suppress(ValueError):
        if 1 <= float(text) < 1e18:
            return int(float(text))
    raise argparse.ArgumentTypeError(f"{text}: expected a number, such as 17e9")


class _UniqueKeysLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML's own loader takes the last in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        firsts: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if firsts.setdefault((key.tag, str(key.value)), key) is not key:
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value!r} is there already; keep one of the two")
        return node


def parse_yaml(content: str | bytes, where: str) -> Any:
    """The content of a YAML file. Raises UserError naming `where`, and line and key if one is repeated."""
    with explained((yaml.YAMLError, ValueError, RecursionError), f"{where}: not valid YAML", "mend it"):
        return yaml.load(content, _UniqueKeysLoader)


def os_error_line(error: UserError | OSError) -> str:
    """The line of a UserError, or what the operating system refused, and where."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; check the path"
    return one_line(error)


def what_it_says(error: Exception) -> str:
    """The error's text as one line, of an OSError without the path; its name, if it says nothing."""
    return getattr(error, "strerror", None) or one_line(error) or type(error).__name__


def one_line(error: Exception) -> str:
    """The error's text without line breaks, so that it stays one line of a log."""
    return " ".join(str(error).split())


def exit_code(main: Callable[[], None]) -> int:
    """Run a command; 0 when it is done, 2 after printing the one line of a `UserError` or of a refused file."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    except BrokenPipeError:  # whoever read our output has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        print(f"error: {os_error_line(error)}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    return 0

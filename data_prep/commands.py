"""What every command shares: its flags, its list, and how it ends.

A command's `main` raises `UserError`; `exit_code` turns it into one line on stderr and exit code 2.
Anything else that escapes is a defect of ours and keeps its traceback.
"""

import argparse
import ast
import contextlib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from data_prep.errors import UserError, exit_code_of, nearest, os_error_line, printable

INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells have it
IS_A_COMMAND = '\nif __name__ == "__main__":\n    sys.exit('  # at the end of a module that is one


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """What is printed inside may go unheard: a closed pipe, or a full disk below a log, ends
    nothing.
    """
    try:
        yield
    except OSError:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError as error:
                if error.errno != errno.ENOSPC:  # room may come back, a reader does not
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s: one line, like all others."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise UserError(f"{message}; --help lists the flags")


def list_commands(folder: Path, arguments: Sequence[str]) -> None:
    """Print a line for each module of a folder that is a command: how it is called, and what it
    says it does.

    Nothing is imported, so that it takes no time. Raises UserError for arguments, which belong to a
    command.
    """
    texts = {
        path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("[!_]*.py"))
    }
    commands = {name: text for name, text in texts.items() if IS_A_COMMAND in text}
    if arguments and arguments[0] not in ("-h", "--help"):
        name = arguments[0] if arguments[0] in commands else None
        advice = (
            f"write python -m {folder.name}.{name}" if name else nearest(arguments[0], commands)
        )
        raise UserError(
            f"python -m {folder.name} {arguments[0]}: it only lists the commands; {advice}"
        )
    calls = {f"python -m {folder.name}.{name}": text for name, text in commands.items()}
    width = max(map(len, calls))
    for call, text in calls.items():
        print(f"{call:<{width}}  {first_sentence(text)}")
    print("--help after any of them lists its flags")


def first_sentence(module_text: str) -> str:
    """What a module's docstring begins with."""
    docstring = ast.get_docstring(ast.parse(module_text)) or ""
    return re.split(r"[.:](?=\s)", docstring.partition("\n\n")[0].replace("\n", " "))[0].rstrip(
        ".:"
    )


def large_number(text: str) -> int:
    """A number of 1 or more on a command line; 17e9 is one too."""
    with contextlib.suppress(ValueError):
        if 1 <= float(text) < 1e18:
            return int(float(text))
    raise argparse.ArgumentTypeError(f"{text}: expected a number of 1 or more, such as 8 or 17e9")


def signal_name(number: int) -> str:
    """A signal as whoever sent it knows it."""
    name = signal.Signals(number).name
    return f"Ctrl-C ({name})" if number == signal.SIGINT else name


def exit_code(main: Callable[[], None]) -> int:
    """Run a command; 0 when it is done, else what it printed the one line of.

    2 for a `UserError` or a refused file, 1 for a `RetryableError` or a disk that failed.
    """
    for stream in (sys.stdout, sys.stderr):
        # names are bytes, and a terminal may have another alphabet
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    except (UserError, OSError) as error:
        # who read our output has seen enough (`| head`)
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"error: {printable(os_error_line(error))}", file=sys.stderr)
        return exit_code_of(error)
    return 0

"""What every command shares: its flags, its list, and how it ends.

A command's `main` raises `UserError`; `exit_code` turns it into one line on stderr and exit code 2.
Anything else that escapes is a defect of ours and keeps its traceback.
"""

import argparse
import ast
import contextlib
import difflib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from data_prep.errors import (
    UserError,
    exit_code_of,
    explained,
    nearest,
    os_error_line,
    printable,
)

INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells have it
SAME_SIGNAL_S = 2.0  # within so long a signal is the same one: launchers send it more than once
MISTYPED = 0.7  # difflib's ratio from which one flag is taken for another
LARGEST_NUMBER = 1e18  # on a command line; counts stay below what 64 bits hold
INSTALL_MPI = "pip install mpi4py mpich brings an MPI that works, to be started by its own mpiexec"
# Of the launchers' MPIs: what their mpiexec alone sets, and what the version of their libraries
# says. MPICH's launcher, Hydra, and its variables are those of Intel's MPI and MVAPICH as well.
MPI_LAUNCHERS = {"Open MPI": "OMPI_COMM_WORLD_RANK", "MPICH": "MPI_LOCALNRANKS"}
MPI_LIBRARIES = {"Open MPI": r"Open MPI", "MPICH": r"MPICH|MVAPICH|Intel\(R\) MPI"}
IS_A_COMMAND = '\nif __name__ == "__main__":\n    sys.exit('  # at the end of a module that is one


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """What is printed inside may go unheard.

    A closed pipe, or a full disk below a log, ends nothing.
    """
    try:
        yield
    except OSError:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError as error:
                if error.errno != errno.ENOSPC:  # room may come back, a reader does not
                    _silence(stream)


def _silence(stream: TextIO) -> None:
    """Lead a stream nowhere, for good: what it still holds would fail again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s: one line, like all others."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._given: Sequence[str] = ()

    def flags(self) -> list[str]:
        """All flags in their long form, but those that are for launchers alone."""
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        names = [name for action in shown for name in action.option_strings]
        return [name for name in names if name.startswith("--")]

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse has it; keeps what was given, for what is said of it."""
        self._given = sys.argv[1:] if args is None else args
        flags, others = super().parse_known_args(self._given, namespace)
        return flags, others

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving.

        Where a flag is missing, or there is one too many, one that was mistyped may be why.
        """
        wanted = self.flags()
        if "required" in message:
            wanted = re.findall(r"--[\w-]+", message)
        for argument in self._given:
            name = argument.partition("=")[0]
            # One with a dot is a key of a recipe.
            if not name.startswith("--") or "." in name or name in self.flags():
                continue
            meant = difflib.get_close_matches(name, wanted, n=1, cutoff=MISTYPED)
            if meant:
                raise UserError(f"{name}: unknown; did you mean {meant[0]}?")
        raise UserError(f"{message}; --help lists the flags")


def list_commands(folder: Path, arguments: Sequence[str]) -> None:
    """Print a line for each module of a folder that is a command: its call, and what it does.

    Nothing is imported, so that it takes no time. Raises UserError for arguments, which belong to a
    command.
    """
    commands = {}
    for path in sorted(folder.glob("[!_]*.py")):
        text = path.read_text(encoding="utf-8")
        if IS_A_COMMAND in text:
            commands[path.stem] = text
    if arguments and arguments[0] not in ("-h", "--help"):
        raise _only_lists(folder, commands, arguments[0])
    calls = {f"python -m {folder.name}.{name}": text for name, text in commands.items()}
    width = max(len(call) for call in calls)
    for call, text in calls.items():
        print(f"{call.ljust(width)}  {first_sentence(text)}")
    print("--help after any of them lists its flags")


def _only_lists(folder: Path, commands: Collection[str], argument: str) -> UserError:
    advice = nearest(argument, commands)
    if argument in commands:
        advice = f"write python -m {folder.name}.{argument}"
    return UserError(f"python -m {folder.name} {argument}: it only lists the commands; {advice}")


def first_sentence(module_text: str) -> str:
    """What a module's docstring begins with, up to a full stop or a colon."""
    docstring = ast.get_docstring(ast.parse(module_text)) or ""
    paragraph, _, _ = docstring.partition("\n\n")
    sentences = re.split(r"[.:](?=\s)", paragraph.replace("\n", " "))
    return sentences[0].rstrip(".:")


def large_number(text: str) -> int:
    """A whole number of 1 or more on a command line; 17e9 is one too."""
    with contextlib.suppress(ValueError):
        number = float(text)
        if 1 <= number < LARGEST_NUMBER and number.is_integer():
            return int(number)
    raise argparse.ArgumentTypeError(
        f"{text}: expected a whole number of 1 or more, such as 8 or 17e9"
    )


def signal_name(number: int) -> str:
    """A signal as whoever sent it knows it."""
    name = signal.Signals(number).name
    if number == signal.SIGINT:
        return f"Ctrl-C ({name})"
    return name


def exit_code(main: Callable[[], None]) -> int:
    """Run a command; 0 when it is done, else what it printed the one line of.

    2 for a `UserError` or a refused file, 1 for a `RetryableError` or a disk that failed.
    """
    for stream in (sys.stdout, sys.stderr):
        # Names are bytes, and a terminal may have another alphabet.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            # Whoever reads our output has seen enough (`| head`).
            _silence(sys.stdout)
            return 0
        print(f"error: {printable(os_error_line(error))}", file=sys.stderr)
        return exit_code_of(error)
    return 0


def load_mpi() -> Any:
    """mpi4py's MPI, begun, in a process that an MPI launcher started.

    Raises UserError where mpi4py can't be used, or its library is of another MPI than the launcher:
    begun all the same, MPICH under Open MPI's mpiexec aborts in C, and Open MPI under MPICH's
    makes each rank a world of its own.
    """
    unusable = "started by an MPI launcher, but mpi4py can't be used"
    with explained((ImportError, RuntimeError), unusable, INSTALL_MPI):
        import mpi4py

        # Its import alone would begin MPI; the library says its version before that.
        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = True
        from mpi4py import MPI
    if not MPI.Is_initialized():
        refuse_other_mpi(MPI.Get_library_version())
        MPI.Init_thread()
    return MPI


def refuse_other_mpi(version: str) -> None:
    """Raise UserError where the library of this version is of another MPI than the launcher.

    An MPI that is in neither table is left to show whether it works.
    """
    launchers = [mpi for mpi, variable in MPI_LAUNCHERS.items() if variable in os.environ]
    libraries = [mpi for mpi, words in MPI_LIBRARIES.items() if re.search(words, version)]
    if not launchers or not libraries or libraries[0] in launchers:
        return
    launcher = launchers[0]
    library = libraries[0]
    raise UserError(
        f"started by {launcher}'s mpiexec, but mpi4py loads the library of another MPI, {library}; "
        f"start with {library}'s mpiexec, or set MPI4PY_LIBMPI to the path of {launcher}'s libmpi"
    )

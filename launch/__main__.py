"""Lists the scripts of this folder with their paths, a line each: `python -m launch`."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.commands import exit_code
from data_prep.errors import UserError, nearest


def what_it_does(script: Path) -> str:
    """What the comment on top of a script begins with."""
    lines = script.read_text(encoding="utf-8").splitlines()[1:4]  # the first says what runs it
    comment = " ".join(line.removeprefix("#").strip() for line in lines)
    return re.split(r"[.:](?=\s)", comment)[0]


def what_is_typed(script: Path) -> str:
    """How a script is called."""
    return f"sbatch {script}" if script.suffix == ".slurm" else str(script)


def list_scripts(folder: Path, arguments: Sequence[str]) -> None:
    """Print a line for each script of a folder: what is typed, and what it does.

    Raises UserError for arguments other than --help, which belong to a script.
    """
    scripts = sorted([*folder.glob("*.sh"), *folder.glob("*.slurm")])
    if arguments and arguments[0] not in ("-h", "--help"):
        advice = nearest(arguments[0], [script.name for script in scripts])
        raise UserError(f"python -m launch {arguments[0]}: it only lists the scripts; {advice}")
    width = max(len(what_is_typed(script)) for script in scripts)
    for script in scripts:
        print(f"{what_is_typed(script):<{width}}  {what_it_does(script)}")
    print("--help after a .sh says more, as does the comment at the top of each")


def main() -> None:
    """The command."""
    list_scripts(Path(__file__).resolve().parent, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(exit_code(main))

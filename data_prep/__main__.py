"""Lists the commands of this folder, a line each: `python -m data_prep`."""

import sys
from pathlib import Path

from data_prep.commands import exit_code, list_commands


def main() -> None:
    """The command."""
    list_commands(Path(__file__).parent, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(exit_code(main))

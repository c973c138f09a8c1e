"""`--help` and a mistyped flag are answered at once: no command imports for them what takes
seconds.
"""

import subprocess
import sys

import pytest
from conftest import REPOSITORY

from data_prep.commands import IS_A_COMMAND

COMMANDS = sorted(
    f"{folder}.{path.stem}"
    for folder in ("data_prep", "pretrain", "launch")
    for path in (REPOSITORY / folder).glob("*.py")
    if IS_A_COMMAND in path.read_text(encoding="utf-8")
)
TAKES_SECONDS = {"torch", "transformers", "deepspeed", "datasets", "pandas"}
PROGRAM = """
import runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    print("IMPORTED", *sys.modules, file=sys.stderr)
"""


def run(module: str, flag: str) -> tuple[int, set[str]]:
    """The exit code of a command, and the names of what it imported."""
    command = [sys.executable, "-c", PROGRAM, module, flag]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return result.returncode, set(result.stderr.rpartition("IMPORTED ")[2].split())


def test_the_commands_are_found() -> None:
    assert {"pretrain.train", "pretrain.evaluate", "data_prep.build_shards"} <= set(COMMANDS)


@pytest.mark.parametrize("module", COMMANDS)
def test_help_and_a_mistyped_flag_wait_for_nothing(module: str) -> None:
    for flag, expected in (("--help", 0), ("--hepl", 2)):
        code, imported = run(module, flag)
        assert code == expected
        assert "data_prep.errors" in imported
        assert not TAKES_SECONDS & imported

"""A process that exports a checkpoint, beside a training that must not notice it."""

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

from data_prep.commands import signal_name
from data_prep.errors import printable
from pretrain.config.recipe import CheckpointsRecipe

PROJECT_DIR = Path(__file__).resolve().parents[3]
# Ends a command, and all that it started, with the process that started it.
GUARDED = PROJECT_DIR / "launch" / "shell" / "guarded.sh"
LOWEST_PRIORITY = "19"  # of nice: it gets the time that no rank wants
OOM_FIRST = "1000"  # where memory runs out, the system ends this process and no rank
# Of a rank: by some of them its ranks are found, and signalled.
OF_LAUNCHERS = ("MASTER_", "TORCHELASTIC_", "OMPI_", "PMI_", "MPI_", "LOCAL_")
OF_RANKS = frozenset({"RANK", "WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "CROSS_RANK", "CROSS_SIZE"})


class ExportProcess:
    """`pretrain.export_hf` of one checkpoint, started at once."""

    def __init__(self, run_dir: Path, step: int, output: Path, recipe: CheckpointsRecipe) -> None:
        """Raises OSError where no process can be started."""
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `why_it_failed`
        command = [sys.executable, "-m", "pretrain.export_hf", "--run-dir", str(run_dir.resolve())]
        command += ["--step", str(step), "--output-dir", str(output.absolute())]
        command += ["--architecture", recipe.export_architecture, "--dtype", recipe.export_dtype]
        self._process = subprocess.Popen(
            ["sh", str(GUARDED), "nice", "-n", LOWEST_PRIORITY, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            cwd=PROJECT_DIR,
            env=environment(),
            # Ctrl-C is the ranks' affair. No session of its own: priorities of Linux count within
            # one where it groups processes by sessions.
            process_group=0,
        )
        with suppress(OSError):  # it may be over, or the system may have no such file
            Path(f"/proc/{self._process.pid}/oom_score_adj").write_text(OOM_FIRST)

    def end(self) -> None:
        """End it, whatever it does."""
        assert self._process.stdin
        self._process.stdin.close()  # which has its guard kill all of it

    def why_it_failed(self) -> str | None:
        """Wait for its end; why there is no export, on one line, or None where there is one."""
        code = self._process.wait()
        self.end()
        with self._said as said:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
        if code == 0:
            return None
        if code < 0:
            return (
                f"{signal_name(-code)} ended its process, as the system does where memory runs out"
            )
        errors = [line for line in lines if line.startswith("error: ")]
        last = [*lines, f"exit code {code}"][-1] if not errors else errors[-1]
        return printable(last.removeprefix("error: "))


def environment() -> dict[str, str]:
    """This process's variables, without those that make it a rank, and without its GPU."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(OF_LAUNCHERS) and name not in OF_RANKS
    }
    return {**kept, "CUDA_VISIBLE_DEVICES": ""}

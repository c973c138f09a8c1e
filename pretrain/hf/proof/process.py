"""Starting the clean process, and asking it.

One is started when the first export of a program begins, so that its imports, which take seconds,
run beside the writing of the files; it serves all later ones, and ends with the program.
"""

import atexit
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from data_prep.errors import UserError

PROGRAM = Path(__file__).with_name("clean_process.py")
PROJECT_DIR = Path(__file__).resolve().parents[3]
# What an import in the clean process must not find, even where it lies beside other packages.
REFUSED = ("pretrain", "data_prep", "launch", "ds_configs")
# Variables that choose how many threads compute, and with what rounding.
OF_COMPUTING = ("OMP_", "MKL_", "KMP_", "ATEN_", "DNNL_", "ONEDNN_", "TORCH")
SAID_AT_MOST = 2_000  # bytes of a dead process's last words

Answer = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be measured of an export; paths are of files in a folder of the request's own."""

    export: Path
    trusts_code: bool
    prompts: list[list[int]]
    context: int  # tokens that the model takes
    sketched_ids: Path  # (windows, T), npy
    ids: Path | None = None  # (windows, T + 1), npy
    logits: Path | None = None  # (windows, T, V), npy, of the training class
    texts: Path | None = None
    threads: int = 1

    def to_line(self, answer: Path) -> bytes:
        """As the clean process reads it."""
        content = {**asdict(self), "answer": answer}
        return (json.dumps(content, default=str) + "\n").encode()


class CleanProcess:
    """A Python that can't import this project, ready to load exports."""

    def __init__(self) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        # For the copies that transformers makes of modelling files, which are no one else's.
        self._modules = tempfile.TemporaryDirectory(prefix="tablefree-modules.")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=clean_environment(),
        )
        beginning = {
            "paths": package_folders(),
            "refused": REFUSED,
            "modules": self._modules.name,
        }
        self._send((json.dumps(beginning) + "\n").encode())

    @property
    def is_running(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def ask(self, request: Request, folder: Path) -> Answer:
        """The answer, by way of a file in a folder. Raises UserError where there is none."""
        path = folder / "answer.json"
        self._send(request.to_line(path))
        assert self._process.stdout
        said = self._process.stdout.readline().decode().strip()
        if said != "0":
            self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - SAID_AT_MOST))
            last_words = self._errors.read().decode(errors="replace").strip().splitlines()
            why = last_words[-1] if last_words else "it said nothing"
            status = f"status {said}" if said else "before it answered"
            raise UserError(
                f"the process that was to load the export ended, {status} ({why}); see that there "
                "is memory for the model, and try again"
            )
        answer: Answer = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        return answer

    def _send(self, line: bytes) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # It is dead, which is told when its answer is read.

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._modules.cleanup()


def package_folders() -> list[str]:
    """The folders that packages are imported from here, but for the checkout of this project."""
    of_packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    folders = [path for path in sys.path if os.path.isdir(path)]
    # A wheel's modules lie beside those of all others: there, names are refused instead.
    return [
        path
        for path in folders
        if path in of_packages or not Path(path).resolve().is_relative_to(PROJECT_DIR)
    ]


def clean_environment() -> dict[str, str]:
    """This process's variables, without those that change what is computed, or where."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(OF_COMPUTING) and not name.startswith("PYTHON")
    }
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


@cache
def _processes() -> list[CleanProcess]:
    """The one that runs, if any."""
    running: list[CleanProcess] = []

    def close_all() -> None:
        for process in running:
            process.close()

    atexit.register(close_all)
    return running


def clean_process() -> CleanProcess:
    """The clean process of this program, started if it doesn't run."""
    running = _processes()
    if running and not running[0].is_running:
        running.pop().close()
    if not running:
        running.append(CleanProcess())
    return running[0]

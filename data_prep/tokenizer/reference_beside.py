"""The reference in a process of its own.

Loading a tokenizer of 65,536 ids takes `tokenizers` and gigatoken 0.1 to 0.2 s each, and both keep
Python's lock all the while, so that no thread hides it. Where gigatoken does the work, the
reference is loaded by a second process at the same time, which then proves documents there. What
that process can't do, this one does, and says so.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.tokenizer.reference import LocalReference, Traits

Process = subprocess.Popen[bytes]


class ReferenceBeside:
    """The reference in a process of its own, which begins to load as this object is made.

    Where that process can't be started, can't load, or is killed, what `load_here` returns takes
    its place from then on, and a line on stderr says so. An error of loading here is the caller's.
    """

    def __init__(
        self, tokenizer_json: bytes, load_here: Callable[[], LocalReference], threads: int
    ) -> None:
        self._load_here = load_here
        self._here: LocalReference | None = None
        self._asking = threading.Lock()
        self._process: Process | None = None
        # No more processes or descriptors: found out when it is asked.
        with contextlib.suppress(OSError):
            self._process = start_process(tokenizer_json, threads)
            weakref.finalize(self, end, self._process)

    def traits(self, eos_token: object) -> Traits:
        """What the definition tells."""
        answer = self._ask("traits", eos_token)
        return answer if isinstance(answer, Traits) else Traits(**answer)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without any that a template adds."""
        ids: list[list[int]] = self._ask("encode", list(texts))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out."""
        text: str = self._ask("decode", list(ids))
        return text

    def _ask(self, question: str, about: Any) -> Any:
        with self._asking:
            if self._here is None and self._process is not None:
                with contextlib.suppress(OSError, ValueError):  # ValueError: half a line, or none
                    return answer_of(self._process, question, about)
            if self._here is None:
                self._here = self._load_here()
                lost = "the process of the reference tokenizer has ended or could not be started"
                print(
                    f"note: {lost}; this one does its part from here on, same output",
                    file=sys.stderr,
                )
        return getattr(self._here, question)(about)


def start_process(tokenizer_json: bytes, threads: int) -> Process:
    """Start the process of a reference; it ends by itself once its stdin is closed."""
    paths = [str(Path(__file__).parents[2])]
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "RAYON_NUM_THREADS": str(threads),
    }
    # A pipe would have this process wait until that one reads.
    with tempfile.TemporaryFile() as definition:
        definition.write(tokenizer_json)
        definition.seek(0)
        return subprocess.Popen(
            # -P: no module of the folder where the command runs
            [sys.executable, "-P", "-m", "data_prep.tokenizer.reference", str(definition.fileno())],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what it fails at is done here, where it is said
            pass_fds=[definition.fileno()],
            start_new_session=True,  # Ctrl-C is this process's to answer
        )


def answer_of(process: Process, question: str, about: Any) -> Any:
    """Ask, and wait for the answer. Raises OSError or ValueError if the process has ended."""
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps([question, about]).encode() + b"\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def end(process: Process) -> None:
    """Have the process end, and wait until it has."""
    with contextlib.suppress(OSError):  # what could not be written to a process that is gone
        process.communicate()

"""The reference: `tokenizers`, whose ids every shard must hold; in this process, or in one of its own.

Loading a tokenizer of 65,536 ids takes `tokenizers` and gigatoken 0.17 s each, and both keep Python's lock all the
while, so that no thread hides it. Where gigatoken does the work, the reference is loaded by a second process at the
same time, which then proves documents there. What that process can't do, this one does, and says so.

Run as a module it is that process: it imports little, so that it is there soon.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from data_prep.tokenizer_traits import ids_of_no_text, keeps_all_text, unknown_id, why_not_gigatoken

RANDOM = ("dropout", "alpha", "nbest_size")  # what makes a model encode the same text otherwise each time


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a tokenizer's definition tells before any text is encoded."""

    vocab_size: int  # one more than the largest id
    eos_id: int | None  # None: the vocabulary lacks the token
    special_tokens: dict[str, int]
    ids_of_no_text: list[int]  # special ids that some text might give all the same
    unknown_id: int | None  # what stands for text that the vocabulary lacks
    random_settings: list[str]  # of RANDOM, those that its file asks for
    keeps_all_text: bool  # known to, from its form
    normalizer: str  # as in tokenizer.json; empty if there is none
    not_for_gigatoken: str | None  # why it would give other ids


class Reference(Protocol):
    """What both forms of the reference do. All of it may be called by any thread."""

    def traits(self, eos_token: object) -> Traits:
        """What the definition tells."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without any that a template adds."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out."""


class LocalReference:
    """The reference in this process. Raises whatever `tokenizers` does for a definition that it can't load."""

    def __init__(self, tokenizer_json: bytes) -> None:
        self.definition = tokenizer_json
        self.tokenizer = Tokenizer.from_buffer(tokenizer_json)
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        model = self.tokenizer.model
        self.random_settings = [name for name in RANDOM if getattr(model, name, None) is not None]
        for name in self.random_settings:
            setattr(model, name, None)

    def traits(self, eos_token: object) -> Traits:
        """What the definition tells."""
        reference = self.tokenizer
        eos_id = reference.token_to_id(eos_token) if isinstance(eos_token, str) else None
        added = reference.get_added_tokens_decoder()
        special = {token.content: id_ for id_, token in added.items() if token.special}
        in_no_text = special if eos_id is None else {**special, str(eos_token): eos_id}
        normalizer = reference.normalizer
        return Traits(
            vocab_size=size_of_vocabulary(reference),
            eos_id=eos_id,
            special_tokens=special,
            ids_of_no_text=sorted(ids_of_no_text(reference, in_no_text)),
            unknown_id=unknown_id(reference),
            random_settings=self.random_settings,
            keeps_all_text=keeps_all_text(reference),
            normalizer="" if normalizer is None else normalizer.__getstate__().decode(),
            not_for_gigatoken=why_not_gigatoken(reference, lambda: json.loads(self.definition)),
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without any that a template adds."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # lets other threads run
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def size_of_vocabulary(reference: Tokenizer) -> int:
    """One more than the largest id. Asking for ids one by one takes less than half of the time of get_vocab."""
    tokens = reference.get_vocab_size(with_added_tokens=True)
    if all(reference.id_to_token(id_) is not None for id_ in range(tokens)):
        return tokens  # each has one of these ids
    return max(reference.get_vocab(with_added_tokens=True).values(), default=-1) + 1


class ReferenceBeside:
    """The reference in a process of its own, which begins to load as this object is made.

    Where that process can't be started, can't load, or is killed, what `load_here` returns takes its place from then
    on, and a line on stderr says so. An error of loading here is the caller's.
    """

    def __init__(self, tokenizer_json: bytes, load_here: Callable[[], LocalReference], threads: int) -> None:
        self._load_here = load_here
        self._here: LocalReference | None = None
        self._asking = threading.Lock()
        self._connection: Connection | None = None
        with contextlib.suppress(OSError):  # no more processes or descriptors: found out when it is asked
            self._connection, process = start_process(tokenizer_json, threads)
            weakref.finalize(self, _end, self._connection, process)

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
            if self._here is None and self._connection is not None:
                with contextlib.suppress(OSError, EOFError):
                    self._connection.send_bytes(json.dumps([question, about]).encode())
                    return json.loads(self._connection.recv_bytes())
            if self._here is None:
                self._here = self._load_here()
                lost = "the process of the reference tokenizer has ended or could not be started"
                print(f"note: {lost}; this one does its part from here on, same output", file=sys.stderr)
        return getattr(self._here, question)(about)


def start_process(tokenizer_json: bytes, threads: int) -> tuple[Connection, subprocess.Popen[bytes]]:
    """Start the process of a reference; it ends by itself once this end of the connection is closed."""
    ours, theirs = socket.socketpair()
    paths = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "RAYON_NUM_THREADS": str(threads)}
    with theirs, tempfile.TemporaryFile() as definition:  # a pipe would make this process wait for that one
        definition.write(tokenizer_json)
        definition.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-m", "data_prep.reference", str(theirs.fileno())],
            env=environment,
            stdin=definition,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # what it fails at is done here, where it is said
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is this process's to answer
        )
    return Connection(ours.detach()), process


def _end(connection: Connection, process: subprocess.Popen[bytes]) -> None:
    connection.close()
    process.wait()


def serve(connection: Connection, tokenizer_json: bytes) -> None:
    """Answer one question after another until nobody is there to ask."""
    reference = LocalReference(tokenizer_json)
    answers: dict[str, Callable[[Any], Any]] = {
        "traits": lambda eos_token: asdict(reference.traits(eos_token)),
        "encode": reference.encode,
        "decode": reference.decode,
    }
    while True:
        question, about = json.loads(connection.recv_bytes())
        connection.send_bytes(json.dumps(answers[question](about)).encode())


if __name__ == "__main__":
    with contextlib.suppress(EOFError, OSError):
        serve(Connection(int(sys.argv[1])), sys.stdin.buffer.read())
    os._exit(0)  # taking 65,536 tokens apart would take a while

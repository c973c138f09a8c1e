"""The reference: `tokenizers`, whose ids every shard must hold.

Run as a module it is a process that answers another one's questions (see reference_beside.py): it
imports little, so that it is there soon.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from tokenizers import Tokenizer

from data_prep.tokenizer.traits import ids_of_no_text, keeps_all_text, unknown_id, why_not_gigatoken

# What makes a model encode the same text otherwise each time.
RANDOM = ("dropout", "alpha", "nbest_size")


class Traits(NamedTuple):  # a dataclass would import more than all else here
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
    """The reference in this process.

    Raises whatever `tokenizers` does for a definition that it can't load.
    """

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
        added = reference.get_added_tokens_decoder()
        special = {token.content: id_ for id_, token in added.items() if token.special}
        in_no_text = dict(special)
        eos_id = None
        if isinstance(eos_token, str):
            eos_id = reference.token_to_id(eos_token)
            if eos_id is not None:
                in_no_text[eos_token] = eos_id
        normalizer = ""
        if reference.normalizer is not None:
            normalizer = reference.normalizer.__getstate__().decode()
        return Traits(
            vocab_size=size_of_vocabulary(reference),
            eos_id=eos_id,
            special_tokens=special,
            ids_of_no_text=sorted(ids_of_no_text(reference, in_no_text)),
            unknown_id=unknown_id(reference),
            random_settings=self.random_settings,
            keeps_all_text=keeps_all_text(reference),
            normalizer=normalizer,
            not_for_gigatoken=why_not_gigatoken(reference, lambda: json.loads(self.definition)),
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without any that a template adds."""
        # This one lets other threads run meanwhile.
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def size_of_vocabulary(reference: Tokenizer) -> int:
    """One more than the largest id.

    Asking for ids one by one takes less than half of the time of get_vocab.
    """
    tokens = reference.get_vocab_size(with_added_tokens=True)
    if all(reference.id_to_token(id_) is not None for id_ in range(tokens)):
        return tokens  # each has one of these ids
    vocabulary = reference.get_vocab(with_added_tokens=True)
    return max(vocabulary.values(), default=-1) + 1


def serve(tokenizer_json: bytes) -> None:
    """Answer questions, a line of JSON each on stdin and stdout, until nobody is there to ask."""
    reference = LocalReference(tokenizer_json)
    answers: dict[str, Callable[[Any], Any]] = {
        "traits": lambda eos_token: reference.traits(eos_token)._asdict(),
        "encode": reference.encode,
        "decode": reference.decode,
    }
    for line in sys.stdin.buffer:
        question, about = json.loads(line)
        answer = answers[question](about)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    with contextlib.suppress(OSError), open(int(sys.argv[1]), "rb") as definition:
        serve(definition.read())
    os._exit(0)  # taking 65,536 tokens apart would take a while

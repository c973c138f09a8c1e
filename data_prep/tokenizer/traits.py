"""What a tokenizer's definition tells before any text is encoded.

That is where it loses text, and where encoders part ways.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models

# How a byte-fallback tokenizer names the token of a byte.
SPELLED_BYTE = re.compile("<0x[0-9A-F]{2}>")
# A token's name in texts.
AROUND = ("{}", " {}", "{} ", "a{}a", "\n{}\n")
# Flags of an added token.
FLAGS_READ_OTHERWISE = ("single_word", "lstrip", "rstrip")

Definition = dict[str, Any]  # tokenizer.json


def unknown_id(reference: Tokenizer) -> int | None:
    """The id of text that the vocabulary lacks; None if there is none."""
    model = reference.model
    if isinstance(model, models.Unigram):
        state: Definition = json.loads(model.__getstate__())
        return state.get("unk_id")
    token = getattr(model, "unk_token", None)
    return None if token is None else reference.token_to_id(token)


def keeps_all_text(reference: Tokenizer) -> bool:
    """Whether a tokenizer is of the form that loses nothing.

    That is byte-level, with nothing that changes or drops text.

    False says only that this is not known from its definition.
    """
    if reference.normalizer is not None or reference.pre_tokenizer is None:
        return False
    if not isinstance(reference.decoder, decoders.ByteLevel):
        return False
    if unknown_id(reference) is not None:
        return False
    whole: Definition = json.loads(reference.pre_tokenizer.__getstate__())
    steps = whole.get("pretokenizers", [whole])  # of a sequence, or a single one
    return all(_keeps_text(step) for step in steps)


def _keeps_text(step: Definition) -> bool:
    """Whether a pre-tokenizer neither drops nor adds a character."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return not step.get("add_prefix_space")
    if kind == "Split":
        return step.get("behavior") != "Removed"
    return kind == "Digits"


def ids_of_no_text(reference: Tokenizer, special: dict[str, int]) -> frozenset[int]:
    """Special ids that some text might give, although their names in a text are read as text.

    Added tokens are not looked for in a text; but the model may hold the same token, and build it:
    Unigram, WordLevel and WordPiece take any token of theirs that fits, BPE one that its merges
    lead to. The id of unknown text is none of them: text gives it rightly.
    """
    model = reference.model
    takes_any = True
    if isinstance(model, models.BPE):
        takes_any = getattr(model, "ignore_merges", False)
    unknown = unknown_id(reference)
    found = set()
    for token, id_ in special.items():
        is_in_model = model.token_to_id(token) == id_
        if id_ == unknown or not is_in_model:
            continue
        if takes_any or _is_built(reference, token, id_):
            found.add(id_)
    return frozenset(found)


def _is_built(reference: Tokenizer, token: str, id_: int) -> bool:
    """Whether some text with a token's name in it is encoded to its id."""
    texts = [text.replace("{}", token) for text in AROUND]
    rows = reference.encode_batch_fast(texts, add_special_tokens=False)
    return any(id_ in row.ids for row in rows)


def why_not_gigatoken(reference: Tokenizer, definition: Callable[[], Definition]) -> str | None:
    """What in a tokenizer gigatoken reads otherwise than `tokenizers`; None: nothing known.

    Of gigatoken 0.10 and tokenizers 0.23. Parsing a definition takes longer than all else here, so
    it is asked for only where merges must be looked at.
    """
    for token in reference.get_added_tokens_decoder().values():
        if token.special:
            continue  # both take its name in a text as text
        flags = [name for name in FLAGS_READ_OTHERWISE if getattr(token, name)]
        if flags:
            return f"{flags[0]} of the added token {token.content!r}"
        # A mark behind it may become one character with its end.
        if reference.normalizer and not token.content.isspace():
            return f"the added token {token.content!r} beside a normalizer"
    if getattr(reference.model, "byte_fallback", False):
        merges = definition()["model"].get("merges") or []
        if any(_spells_a_byte(merge) for merge in merges):
            return "merges that spell the token of a byte, such as <0x0A>"
    return None


def _spells_a_byte(merge: str | list[str]) -> bool:
    """Whether what a merge makes has the name of a byte's token."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return SPELLED_BYTE.fullmatch("".join(parts)) is not None

"""Ids to text while they come, whole characters at a time."""

from collections.abc import Sequence

from tokenizers import Tokenizer

# Stands where bytes make no character: so does the end of a text whose last one is not whole yet.
REPLACEMENT = "\ufffd"
# Tokens before a new one that are decoded with it. Decoders look at neighbours: some set a space
# between two words, and none before the first.
NEIGHBOURS = 8


class TextStream:
    """The text that ids add to those before: pieces whose sum is what decoding all at once gives.

    A token may be a part of a character: it is held back until the character is whole or, where it
    never becomes that, until `finish`.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        """`before` are the ids of the prompt, whose text is not given."""
        self.tokenizer = tokenizer
        self.ids = list(before[-NEIGHBOURS:])
        self.begin = 0  # of what is decoded
        self.given = len(self.ids)  # ids whose text was given

    def add(self, new_id: int) -> str:
        """The text that is whole with one more id; empty where none is."""
        self.ids.append(new_id)
        text = self._held()
        return "" if text.endswith(REPLACEMENT) else self._give(text)

    def finish(self) -> str:
        """What was held back, with U+FFFD for what is no character."""
        return self._give(self._held())

    def _held(self) -> str:
        """The text of the ids that were not given."""
        before = self._decode(self.ids[self.begin : self.given])
        return self._decode(self.ids[self.begin :])[len(before) :]

    def _give(self, text: str) -> str:
        self.begin = max(self.begin, self.given - NEIGHBOURS)
        self.given = len(self.ids)
        return text

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text

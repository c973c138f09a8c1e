"""Characters that are newer than the Unicode tables in use, of which two encoders may think
differently.

`tokenizers` 0.23 knows Unicode 16 in regular expressions (`\\p{L}`), but normalises (NFC and its
kin) by the tables of Unicode 9; gigatoken has other tables. So a text with a character that is
newer than what Python knows, or that the reference normalises otherwise than Python, is encoded by
the reference. `find` tells which texts are such.

Most text has none, so a look at its bytes must cost next to nothing: first whether any byte can
begin such a character, then whether it and the next do, and only then which character it is. Python
is asked which characters begin with two bytes when a text first holds these two: asking for all
takes 0.04 s, in which 4 MB are encoded.
"""

import unicodedata
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tokenizers import normalizers

from data_prep.formats.flat_arrays import text_bounds

CODE_POINTS = 0x110000
# from here on a character takes at least so many in UTF-8; below, nothing is new since Unicode 14
THREE_BYTES = 0x800
ASSIGNED_PLANES = 4  # of 17: all characters so far, but for tags and private use
TAGS = range(0xE0000, 0xE01F0)
PRIVATE_PLANES = 0xF0000
# Han and Hangul: full but for a few holes, kept for strokes and symbols. Texts in these scripts are
# dense with their bytes; leaving them out keeps the look cheap there. Then halves of surrogate
# pairs, in no UTF-8, and private use.
FULL_BLOCKS = (range(0x3000, 0x9FFD), range(0xAC00, 0xF900))
LEADS_IN_FULL_BLOCKS = range(0xE3, 0xE9)  # first bytes of nothing else
# above and below: beside them a mark whose class is not known stays where it is
MARKS = (0x301, 0x316)
PIECE_BYTES = 1 << 18  # stays in the cache from one pass to the next
HIGH_BITS = np.uint64(0x8080808080808080)  # none of them is set in ASCII
# of eight bytes each; with more that are not ASCII, passes over all bytes are faster
DENSE_ONE_IN = 8

FORMS = ("NFC", "NFD", "NFKC", "NFKD")

Flags = npt.NDArray[np.bool_]


# how many of the characters that begin with two bytes are in a set
NONE, SOME, NOT_ASKED = range(3)


class Doubtful:
    """Characters newer than Python's Unicode, and some others: a set, prepared for finding them in
    UTF-8.

    Threads may share it: what two of them find out at the same time is the same.
    """

    def __init__(self, others: frozenset[int]) -> None:
        # of those that were asked for, by code point
        self._characters = np.zeros(CODE_POINTS, np.bool_)
        self._characters[list(others)] = True
        self._characters[:0x80] = False
        # How many begin with two bytes, by the first and the six bits of the second; below
        # THREE_BYTES these are all.
        self._pairs = np.full((256, 64), NONE, np.uint8)
        self._pairs[0xE0:0xF5] = NOT_ASKED
        for lead in LEADS_IN_FULL_BLOCKS:
            self._pairs[lead] = NONE
        for code_point in np.flatnonzero(self._characters).tolist():
            lead, second, *_ = chr(code_point).encode()
            self._pairs[lead, second & 0x3F] = SOME if code_point < THREE_BYTES else NOT_ASKED
        self._may_begin = (self._pairs != NONE).any(axis=1)
        first = np.flatnonzero(self._may_begin)
        ends = np.flatnonzero(np.diff(first, append=-1) != 1)
        starts = np.append(0, ends[:-1] + 1)
        # ranges, from and to
        self._leads = list(zip(first[starts].tolist(), first[ends].tolist(), strict=True))

    def find(self, texts: pa.LargeStringArray) -> npt.NDArray[np.int64]:
        """Numbers of the texts that hold one of the characters, in order."""
        bounds = text_bounds(texts)
        data = texts.buffers()[2]
        held = np.frombuffer(data, np.uint8)[: bounds[-1]] if data else np.zeros(0, np.uint8)
        places = self._places(held[bounds[0] :]) + bounds[0]
        return np.unique(np.searchsorted(bounds, places, side="right") - 1)

    def _places(self, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Where in UTF-8 one of the characters begins."""
        found = [np.zeros(0, np.int64)]
        for start in range(0, len(data), PIECE_BYTES):
            places = self._beginnings(data[start : start + PIECE_BYTES]) + start
            places = places[self._may_follow(data[places], data[places + 1])]
            if len(places):
                found.append(places[self._characters[_code_points_at(data, places)]])
        return np.concatenate(found)

    def _may_follow(self, first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8]) -> Flags:
        """Whether one of the characters begins with these two bytes."""
        number = first.astype(np.int64) << 6 | (second & 0x3F)
        counts = self._pairs.reshape(-1)[number]
        if (counts == NOT_ASKED).any():
            for pair in np.unique(number[counts == NOT_ASKED]).tolist():
                self._ask(*divmod(pair, 64))
            counts = self._pairs.reshape(-1)[number]
        return counts == SOME

    def _ask(self, lead: int, second: int) -> None:
        """Find out which characters begin with a first byte and the six bits of a second."""
        if lead < 0xF0:
            block = range(
                (lead & 0x0F) << 12 | second << 6, ((lead & 0x0F) << 12 | second << 6) + (1 << 6)
            )
        else:
            block = range(
                (lead & 0x07) << 18 | second << 12, ((lead & 0x07) << 18 | second << 12) + (1 << 12)
            )
        newer = [is_newer_than_python(code_point) for code_point in block]
        self._characters[block.start : block.stop] |= newer
        is_any = self._characters[block.start : block.stop].any()
        self._pairs[lead, second] = SOME if is_any else NONE

    def _beginnings(self, piece: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Where in a piece of UTF-8 a byte stands that may begin one of the characters.

        Eight bytes at a time are seen to be ASCII, as most are: of the others alone every byte is
        looked at.
        """
        whole = len(piece) // 8 * 8
        words = piece[:whole].view(np.uint64)
        other = np.flatnonzero((words & HIGH_BITS) != 0)
        rest = whole + np.flatnonzero(self._may_begin[piece[whole:]])
        if len(other) < len(words) // DENSE_ONE_IN:
            number, byte = np.nonzero(self._may_begin[words[other].view(np.uint8).reshape(-1, 8)])
            return np.append(8 * other[number] + byte, rest)
        may_begin = np.zeros(whole, np.bool_)
        for first, last in self._leads:
            may_begin |= (piece[:whole] - np.uint8(first)) <= last - first  # wraps below the first
        return np.append(np.flatnonzero(may_begin), rest)


def _code_points_at(
    data: npt.NDArray[np.uint8], places: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The characters that begin there, none of them ASCII; valid UTF-8 has their bytes."""
    lead = data[places].astype(np.int64)
    more = [data[np.minimum(places + i, len(data) - 1)].astype(np.int64) & 0x3F for i in (1, 2, 3)]
    two = (lead & 0x1F) << 6 | more[0]
    three = (lead & 0x0F) << 12 | more[0] << 6 | more[1]
    four = (lead & 0x07) << 18 | more[0] << 12 | more[1] << 6 | more[2]
    return np.where(lead < 0xE0, two, np.where(lead < 0xF0, three, four))


def is_newer_than_python(code_point: int) -> bool:
    """Whether Python's Unicode (14 in Python 3.11) has no character there, where later versions
    may have one.
    """
    if code_point < THREE_BYTES or any(code_point in block for block in FULL_BLOCKS):
        return False
    if code_point < ASSIGNED_PLANES << 16:
        return unicodedata.category(chr(code_point)) == "Cn"
    return code_point < PRIVATE_PLANES and code_point not in TAGS


def other_normal_forms(normalizer: str) -> frozenset[int]:
    """Code points of which a tokenizer's normalizer, as tokenizer.json has it, and Python make
    different things.
    """
    return frozenset().union(
        *(normalized_otherwise(form) for form in FORMS if f'"{form}"' in normalizer)
    )


@cache
def normalized_otherwise(form: Any) -> frozenset[int]:
    """Code points of which Python and the reference make different things; with those that they
    are composed of.
    """
    theirs = getattr(normalizers, form)().normalize_str
    found: set[int] = set()
    above, below = map(chr, MARKS)
    for code_point in range(0x80, ASSIGNED_PLANES << 16):
        character = chr(code_point)
        is_mark = unicodedata.combining(character) != 0
        if not is_mark and (
            0xAC00 <= code_point < 0xD7A4 or not unicodedata.decomposition(character)
        ):
            continue
        text = "a" + above + character + below if is_mark else character
        if theirs(text) != unicodedata.normalize(form, text):
            found |= {code_point, *map(ord, unicodedata.normalize("NFD", character))}
        elif theirs(decomposed := unicodedata.normalize("NFD", character)) != unicodedata.normalize(
            form, decomposed
        ):
            found |= set(map(ord, decomposed))
    return frozenset(found)

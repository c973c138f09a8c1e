"""Characters that are newer than the Unicode tables in use, of which two encoders may think differently.

`tokenizers` 0.23 knows Unicode 16 in regular expressions (`\\p{L}`), but normalises (NFC and its kin) by the tables of
Unicode 9; gigatoken has other tables. So a text with a character that is newer than what Python knows, or that the
reference normalises otherwise than Python, is encoded by the reference. `find` tells which texts are such.

Most text has none, so a look at its bytes must cost next to nothing: first whether any byte can begin such a character,
then whether it and the next do, and only then which character it is.
"""

import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tokenizers import Tokenizer, normalizers

from data_prep.flat_arrays import text_bounds

CODE_POINTS = 0x110000
THREE_BYTES = 0x800  # from here on a character takes at least so many in UTF-8; below, nothing is new since Unicode 14
ASSIGNED_PLANES = 4  # of 17: all characters so far, but for tags and private use
TAGS = range(0xE0000, 0xE01F0)
PRIVATE_PLANES = 0xF0000
# Han and Hangul: full but for a few holes, kept for strokes and symbols. Texts in these scripts are dense with their
# bytes; leaving them out keeps the look cheap there. Then halves of surrogate pairs, in no UTF-8, and private use.
FULL_BLOCKS = (range(0x3000, 0x9FFD), range(0xAC00, 0xF900))
MARKS = (0x301, 0x316)  # above and below: beside them a mark whose class is not known stays where it is
PIECE_BYTES = 1 << 18  # stays in the cache from one pass to the next
HIGH_BITS = np.uint64(0x8080808080808080)  # none of them is set in ASCII
DENSE_ONE_IN = 8  # of eight bytes each; with more that are not ASCII, passes over all bytes are faster

FORMS = ("NFC", "NFD", "NFKC", "NFKD")

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Doubtful:
    """A set of characters, prepared for finding them in UTF-8."""

    characters: Flags  # by code point
    leads: tuple[tuple[int, int], ...]  # ranges of first bytes, from and to
    may_begin: Flags  # the same by byte, (256,)
    pairs: Flags  # by first byte and the six bits of the second, (256 * 64,)

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
            places = places[self.pairs[_pairs_at(data, places)]]
            if len(places):
                found.append(places[self.characters[_code_points_at(data, places)]])
        return np.concatenate(found)

    def _beginnings(self, piece: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Where in a piece of UTF-8 a byte stands that may begin one of the characters.

        Eight bytes at a time are seen to be ASCII, as most are: of the others alone every byte is looked at.
        """
        whole = len(piece) // 8 * 8
        words = piece[:whole].view(np.uint64)
        other = np.flatnonzero((words & HIGH_BITS) != 0)
        rest = whole + np.flatnonzero(self.may_begin[piece[whole:]])
        if len(other) < len(words) // DENSE_ONE_IN:
            number, byte = np.nonzero(self.may_begin[words[other].view(np.uint8).reshape(-1, 8)])
            return np.append(8 * other[number] + byte, rest)
        may_begin = np.zeros(whole, np.bool_)
        for first, last in self.leads:
            may_begin |= (piece[:whole] - np.uint8(first)) <= last - first  # wraps below the first
        return np.append(np.flatnonzero(may_begin), rest)


def _pairs_at(data: npt.NDArray[np.uint8], places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """First byte and the six bits of the second, of the characters that begin there."""
    return (data[places].astype(np.int64) << 6) | (data[places + 1] & 0x3F)


def _code_points_at(data: npt.NDArray[np.uint8], places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The characters that begin there, none of them ASCII; valid UTF-8 has their bytes."""
    lead = data[places].astype(np.int64)
    more = [data[np.minimum(places + i, len(data) - 1)].astype(np.int64) & 0x3F for i in (1, 2, 3)]
    two = (lead & 0x1F) << 6 | more[0]
    three = (lead & 0x0F) << 12 | more[0] << 6 | more[1]
    four = (lead & 0x07) << 18 | more[0] << 12 | more[1] << 6 | more[2]
    return np.where(lead < 0xE0, two, np.where(lead < 0xF0, three, four))


@cache
def newer_than_python() -> Flags:
    """Code points without a character in Python's Unicode (14 in Python 3.11), where later versions may have one."""
    flags = np.zeros(CODE_POINTS, np.bool_)
    start = THREE_BYTES
    for block in (*FULL_BLOCKS, range(ASSIGNED_PLANES << 16, CODE_POINTS)):
        kinds = map(unicodedata.category, map(chr, range(start, block.start)))
        flags[start : block.start] = [kind == "Cn" for kind in kinds]
        start = block.stop
    flags[ASSIGNED_PLANES << 16 : PRIVATE_PLANES] = True
    flags[TAGS.start : TAGS.stop] = False
    return flags


def other_normal_forms(tokenizer: Tokenizer) -> frozenset[int]:
    """Code points of which a tokenizer's normalizer and Python make different things."""
    normalizer = tokenizer.normalizer
    definition = "" if normalizer is None else normalizer.__getstate__().decode()  # as in tokenizer.json
    return frozenset().union(*(normalized_otherwise(form) for form in FORMS if f'"{form}"' in definition))


@cache
def normalized_otherwise(form: Any) -> frozenset[int]:
    """Code points of which Python and the reference make different things; with those that they are composed of."""
    theirs = getattr(normalizers, form)().normalize_str
    found: set[int] = set()
    above, below = map(chr, MARKS)
    for code_point in range(0x80, ASSIGNED_PLANES << 16):
        character = chr(code_point)
        is_mark = unicodedata.combining(character) != 0
        if not is_mark and (0xAC00 <= code_point < 0xD7A4 or not unicodedata.decomposition(character)):
            continue
        text = "a" + above + character + below if is_mark else character
        if theirs(text) != unicodedata.normalize(form, text):
            found |= {code_point, *map(ord, unicodedata.normalize("NFD", character))}
        elif theirs(decomposed := unicodedata.normalize("NFD", character)) != unicodedata.normalize(form, decomposed):
            found |= set(map(ord, decomposed))
    return frozenset(found)


@cache
def doubtful(normalized: frozenset[int] = frozenset()) -> Doubtful:
    """Characters newer than Python's Unicode, and these."""
    flags = newer_than_python().copy()
    flags[list(normalized)] = True
    flags[:0x80] = False
    in_runs = flags[THREE_BYTES:].reshape(-1, 64).any(axis=1)  # of 64, which have all but the last byte in common
    first, pairs = _first_bytes(
        np.append(np.flatnonzero(flags[:THREE_BYTES]), THREE_BYTES + 64 * np.flatnonzero(in_runs))
    )
    ends = np.flatnonzero(np.diff(first, append=-1) != 1)
    starts = np.append(0, ends[:-1] + 1)
    leads = tuple(zip(first[starts].tolist(), first[ends].tolist(), strict=True))
    of_pairs = np.zeros(256 * 64, np.bool_)
    of_pairs[pairs] = True
    may_begin = np.zeros(256, np.bool_)
    may_begin[first] = True
    return Doubtful(characters=flags, leads=leads, may_begin=may_begin, pairs=of_pairs)


def _first_bytes(points: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The first bytes of characters in UTF-8, and first bytes with six bits of the second; each once, in order."""
    two, three = points < THREE_BYTES, points < 0x10000
    first = np.where(two, 0xC0 | points >> 6, np.where(three, 0xE0 | points >> 12, 0xF0 | points >> 18))
    second = np.where(two, points, np.where(three, points >> 6, points >> 12)) & 0x3F
    return np.unique(first), np.unique(first << 6 | second)

"""Characters of which two encoders may think differently: newer than their Unicode tables.

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
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tokenizers import normalizers

from data_prep.formats.flat_arrays import numbers_at, text_bounds

CODE_POINTS = 0x110000
FIRST_NOT_ASCII = 0x80
# From here on a character takes at least so many in UTF-8; below, nothing is new since Unicode 14.
THREE_BYTES = 0x800
ASSIGNED_PLANES = 4  # of 17: all characters so far, but for tags and private use
TAGS = range(0xE0000, 0xE01F0)
PRIVATE_PLANES = 0xF0000
# Han and Hangul: full but for a few holes, kept for strokes and symbols. Texts in these scripts are
# dense with their bytes; leaving them out keeps the look cheap there. Then halves of surrogate
# pairs, in no UTF-8, and private use.
FULL_BLOCKS = (range(0x3000, 0x9FFD), range(0xAC00, 0xF900))
LEADS_IN_FULL_BLOCKS = range(0xE3, 0xE9)  # first bytes of nothing else
HANGUL = range(0xAC00, 0xD7A4)  # composed by arithmetic, of which there are no two opinions
# Beside a mark above and one below, a mark whose class is not known stays where it is.
MARK_ABOVE = "\u0301"
MARK_BELOW = "\u0316"
PIECE_BYTES = 1 << 18  # stays in the cache from one pass to the next
HIGH_BITS = np.uint64(0x8080808080808080)  # none of them is set in ASCII
# Of eight bytes each; with more that are not ASCII, passes over all bytes are faster.
DENSE_ONE_IN = 8

FORMS = ("NFC", "NFD", "NFKC", "NFKD")
Form = Literal["NFC", "NFD", "NFKC", "NFKD"]

Flags = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]

# UTF-8: the bits of a byte behind the first that belong to the character, and their number
MORE = 0x3F
MORE_BITS = 6
# Of a first byte, the bits that belong to the character, by the bytes that it takes.
LEAD_OF_TWO = 0x1F
LEAD_OF_THREE = 0x0F
LEAD_OF_FOUR = 0x07
# The first bytes from which on a character takes three bytes, and four.
THREE_BYTE_LEADS = 0xE0
FOUR_BYTE_LEADS = 0xF0
NO_LEADS = 0xF5  # from here on no byte is in UTF-8

# How many of the characters that begin with two bytes are in a set.
NONE = 0
SOME = 1
NOT_ASKED = 2


class Doubtful:
    """A set of characters newer than Python's Unicode, and some others, to be found in UTF-8.

    Threads may share it: what two of them find out at the same time is the same.
    """

    def __init__(self, others: frozenset[int]) -> None:
        """`others` are code points."""
        # Of those that were asked for, by code point.
        self._characters = np.zeros(CODE_POINTS, np.bool_)
        self._characters[list(others)] = True
        self._characters[:FIRST_NOT_ASCII] = False
        # How many begin with two bytes, by the first and the six bits of the second; below
        # THREE_BYTES these are all.
        self._pairs = np.full((256, 1 << MORE_BITS), NONE, np.uint8)
        self._pairs[THREE_BYTE_LEADS:NO_LEADS] = NOT_ASKED
        for lead in LEADS_IN_FULL_BLOCKS:
            self._pairs[lead] = NONE
        for code_point in np.flatnonzero(self._characters).tolist():
            lead, second, *_ = chr(code_point).encode()
            is_whole = code_point < THREE_BYTES
            self._pairs[lead, second & MORE] = SOME if is_whole else NOT_ASKED
        self._may_begin = (self._pairs != NONE).any(axis=1)
        leads = np.flatnonzero(self._may_begin)
        self._leads = neighbours(leads.tolist())

    def find(self, texts: pa.LargeStringArray) -> Places:
        """Numbers of the texts that hold one of the characters, in order."""
        bounds = text_bounds(texts)
        _, _, buffer = texts.buffers()
        if not buffer:
            return np.zeros(0, np.int64)
        first = bounds[0]
        last = bounds[-1]
        data = np.frombuffer(buffer, np.uint8)[first:last]
        places = self._places(data) + first
        return np.unique(numbers_at(bounds, places))

    def _places(self, data: Bytes) -> Places:
        """Where in UTF-8 one of the characters begins."""
        found = [np.zeros(0, np.int64)]
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            places = self._beginnings(piece) + start
            first = data[places]
            second = data[places + 1]
            places = places[self._may_follow(first, second)]
            if len(places):
                code_points = _code_points_at(data, places)
                found.append(places[self._characters[code_points]])
        return np.concatenate(found)

    def _may_follow(self, first: Bytes, second: Bytes) -> Flags:
        """Whether one of the characters begins with these two bytes."""
        of_first = first.astype(np.int64) << MORE_BITS
        pairs = of_first | (second & MORE)
        known = self._pairs.reshape(-1)
        counts = known[pairs]
        is_not_asked = counts == NOT_ASKED
        if is_not_asked.any():
            for pair in np.unique(pairs[is_not_asked]).tolist():
                self._ask(pair >> MORE_BITS, pair & MORE)
            counts = known[pairs]
        is_some: Flags = counts == SOME
        return is_some

    def _ask(self, lead: int, second: int) -> None:
        """Find out which characters begin with a first byte and the six bits of a second."""
        if lead < FOUR_BYTE_LEADS:
            bits_behind = MORE_BITS
            of_lead = lead & LEAD_OF_THREE
        else:
            bits_behind = 2 * MORE_BITS
            of_lead = lead & LEAD_OF_FOUR
        beginning = of_lead << MORE_BITS | second
        start = beginning << bits_behind
        stop = start + (1 << bits_behind)
        newer = [is_newer_than_python(code_point) for code_point in range(start, stop)]
        block = self._characters[start:stop]
        block |= newer
        self._pairs[lead, second] = SOME if block.any() else NONE

    def _beginnings(self, piece: Bytes) -> Places:
        """Where in a piece of UTF-8 a byte stands that may begin one of the characters.

        Eight bytes at a time are seen to be ASCII, as most are: of the others alone every byte is
        looked at.
        """
        whole = len(piece) // 8 * 8
        words = piece[:whole].view(np.uint64)
        other = np.flatnonzero((words & HIGH_BITS) != 0)
        rest = piece[whole:]
        in_rest = np.flatnonzero(self._may_begin[rest]) + whole
        if len(other) < len(words) // DENSE_ONE_IN:
            other_bytes = words[other].view(np.uint8).reshape(-1, 8)
            number, byte = np.nonzero(self._may_begin[other_bytes])
            in_words = 8 * other[number] + byte
        else:
            may_begin = np.zeros(whole, np.bool_)
            for leads in self._leads:
                first = np.uint8(leads.start)
                # What is below the first wraps to far above the last.
                may_begin |= piece[:whole] - first < len(leads)
            in_words = np.flatnonzero(may_begin)
        return np.append(in_words, in_rest)


def neighbours(numbers: list[int]) -> list[range]:
    """Numbers, which come in order, as ranges."""
    ranges: list[range] = []
    for number in numbers:
        start = number
        if ranges and ranges[-1].stop == number:
            start = ranges.pop().start
        ranges.append(range(start, number + 1))
    return ranges


def _code_points_at(data: Bytes, places: Places) -> Places:
    """The characters that begin there, none of them ASCII; valid UTF-8 has their bytes."""
    last = len(data) - 1

    def byte_behind(ahead: int) -> Places:
        """Of shorter characters, bytes behind them are read in vain."""
        at = np.minimum(places + ahead, last)
        return data[at].astype(np.int64)

    lead = byte_behind(0)
    second = byte_behind(1) & MORE
    third = byte_behind(2) & MORE
    fourth = byte_behind(3) & MORE
    of_two = (lead & LEAD_OF_TWO) << 6 | second
    two_behind = second << 6 | third
    of_three = (lead & LEAD_OF_THREE) << 12 | two_behind
    three_behind = two_behind << 6 | fourth
    of_four = (lead & LEAD_OF_FOUR) << 18 | three_behind
    of_more = np.where(lead < FOUR_BYTE_LEADS, of_three, of_four)
    return np.where(lead < THREE_BYTE_LEADS, of_two, of_more)


def is_newer_than_python(code_point: int) -> bool:
    """Whether Python's Unicode has no character there, where later versions may have one.

    Python 3.11 has Unicode 14.
    """
    if code_point < THREE_BYTES:
        return False
    if any(code_point in block for block in FULL_BLOCKS):
        return False
    if code_point < ASSIGNED_PLANES << 16:
        return unicodedata.category(chr(code_point)) == "Cn"
    return code_point < PRIVATE_PLANES and code_point not in TAGS


def other_normal_forms(normalizer: str) -> frozenset[int]:
    """Code points of which a tokenizer's normalizer and Python make different things.

    `normalizer` is as tokenizer.json has it.
    """
    found: frozenset[int] = frozenset()
    for form in FORMS:
        if f'"{form}"' in normalizer:
            found |= normalized_otherwise(form)
    return found


@cache
def normalized_otherwise(form: Form) -> frozenset[int]:
    """Code points of which Python and the reference make different things.

    With those that they are composed of.
    """
    of_reference = getattr(normalizers, form)().normalize_str
    found: set[int] = set()
    for code_point in range(FIRST_NOT_ASCII, ASSIGNED_PLANES << 16):
        character = chr(code_point)
        is_mark = unicodedata.combining(character) != 0
        is_composed = unicodedata.decomposition(character) and code_point not in HANGUL
        if not is_mark and not is_composed:
            continue
        decomposed = unicodedata.normalize("NFD", character)
        text = character
        if is_mark:
            text = f"a{MARK_ABOVE}{character}{MARK_BELOW}"
        if of_reference(text) != unicodedata.normalize(form, text):
            found.add(code_point)
            found.update(map(ord, decomposed))
        elif of_reference(decomposed) != unicodedata.normalize(form, decomposed):
            found.update(map(ord, decomposed))
    return frozenset(found)

"""The character n-gram tokenizer: characters are their own ids, beside useful bi- and trigrams.

It always has 65,536 ids. A character of the Basic Multilingual Plane has its UTF-16 code unit as
its id; the code units that are not characters, surrogates and private use, hold the rest:

    D800-DFFF   2,048 bigrams
    E000-E07E   <pad> <s> </s> <unk>, and 123 ids kept free
    E07F        U+FFFF, a noncharacter, whose own id no text gives: see LAST_TOKEN
    E080-E0FF   the bytes 80 to FF
    E100-E45B   the 860 pairs of bytes that three-byte characters begin with; in no text's ids
    E45C-F8FF   5,284 trigrams

Characters in private use and above U+FFFF are spelled in bytes, so any text survives. In form this
is a byte-level BPE whose first merges make characters out of UTF-8: the form that gigatoken encodes
fast.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

VOCAB_SIZE = 1 << 16
SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
BIGRAM_IDS = range(0xD800, 0xE000)
SPECIAL_IDS = range(0xE000, 0xE07F)
NONCHARACTER_ID = 0xE07F
BYTE_IDS = range(0xE080, 0xE100)
PREFIX_IDS = range(0xE100, 0xE45C)
TRIGRAM_IDS = range(0xE45C, 0xF900)
CHARACTER_IDS = (*range(0xD800), *range(0xF900, VOCAB_SIZE - 1))
BYTE = 0xFF  # the bits of a byte's id that are the byte
# Given by no text: ids 0 and V - 1 are one input to a decoder of 16 code bits.
LAST_TOKEN = "<unused_FFFF>"
WITHOUT_ID = re.compile("[\ue000-\uf8ff\U00010000-\U0010ffff]")

# As the encoder cuts text, near enough, with the standard library alone.
WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+")
PIECE_CHARACTERS = 1 << 20
PORTION_CHARACTERS = 8 << 20
MAX_GRAMS = 2_000_000  # what two counts may hold each: some 500 MB

# Byte-level vocabularies write a byte as the Latin-1 character, or as one from U+0100 on where that
# is invisible.
INVISIBLE = (*range(0x21), *range(0x7F, 0xA1), 0xAD)
SPELLING = {byte: 0x100 + place for place, byte in enumerate(INVISIBLE)}
BYTE_OF = {chr(SPELLING.get(byte, byte)): byte for byte in range(256)}

Counts = Counter[str]
Vocab = dict[str, int]
Merges = list[tuple[str, str]]


class GramCounts(NamedTuple):
    """How often up to 3 characters stand in words."""

    anywhere: Counts
    aligned: Counts  # where reading the word in threes meets them


class Grams(NamedTuple):
    """The n-grams that get an id, each in the order to merge them."""

    bigrams: list[str]
    trigrams: list[str]


def learn_vocab(texts: Iterable[str]) -> tuple[Vocab, Merges]:
    """Ids and merges, with the n-grams of these texts.

    What too small a text leaves over stays unused.
    """
    counts = count_grams(texts)
    grams = choose_grams(*counts)
    unused_bigrams = len(BIGRAM_IDS) - len(grams.bigrams)
    unused_trigrams = len(TRIGRAM_IDS) - len(grams.trigrams)
    unused = unused_bigrams + unused_trigrams
    if unused:
        print(f"note: the text has too few n-grams; {unused:,} ids stay unused", file=sys.stderr)
    return build_vocab(*grams)


def count_grams(texts: Iterable[str]) -> GramCounts:
    """How often n-grams stand in the words of the texts."""
    anywhere = Counts()
    aligned = Counts()
    for words in count_words(texts):
        for word, number in words.items():
            for start in range(len(word)):
                anywhere[word[start : start + 3]] += number
            for start in range(0, len(word), 3):
                aligned[word[start : start + 3]] += number
        if len(anywhere) > MAX_GRAMS:
            # Rare ones are forgotten: what could become a token is met again.
            most_common = anywhere.most_common(MAX_GRAMS // 2)
            anywhere = Counter(dict(most_common))
            for gram in aligned.keys() - anywhere.keys():
                del aligned[gram]
    return GramCounts(anywhere, aligned)


def count_words(texts: Iterable[str]) -> Iterator[Counts]:
    """The words of the texts, in portions of bounded size."""
    words = Counts()
    characters = 0
    for text in texts:
        for start in range(0, len(text), PIECE_CHARACTERS):
            piece = text[start : start + PIECE_CHARACTERS]
            words.update(WORD.findall(piece))
            characters += len(piece)
            if characters >= PORTION_CHARACTERS:
                yield words
                words = Counts()
                characters = 0
    yield words


def choose_grams(anywhere: Counts, aligned: Counts) -> Grams:
    """The bigrams and the trigrams met most often when words are read in threes.

    Merges come before all others where the n-gram is seldom seen out of step with that reading, so
    that a word falls apart into few tokens. Bigrams count for the trigrams that are made out of
    them, too.
    """
    pairs = Counts()
    for gram, number in aligned.items():
        for start in range(len(gram) - 1):
            pairs[gram[start : start + 2]] += number
    pairs_anywhere = Counts()
    for gram, number in anywhere.items():
        pairs_anywhere[gram[:2]] += number
    bigrams = _most_frequent(pairs, len(BIGRAM_IDS))
    known = set(bigrams)
    triples = Counts()
    for gram, number in aligned.items():
        if len(gram) != 3:
            continue
        # A merge makes a trigram out of a bigram and a character.
        first = gram[:2]
        last = gram[1:]
        if first in known or last in known:
            triples[gram] = number
    trigrams = _most_frequent(triples, len(TRIGRAM_IDS))
    return Grams(
        bigrams=_in_step_first(bigrams, pairs, pairs_anywhere),
        trigrams=_in_step_first(trigrams, aligned, anywhere),
    )


def _most_frequent(counts: Counts, places: int) -> list[str]:
    """The n-grams met most often, of those whose characters have ids."""

    def rank(gram: str) -> tuple[int, str]:
        return -counts[gram], gram

    grams = [gram for gram in counts if not WITHOUT_ID.search(gram)]
    return sorted(grams, key=rank)[:places]


def _in_step_first(grams: list[str], aligned: Counts, anywhere: Counts) -> list[str]:
    """The n-grams, first those that are seldom met but where reading in threes meets them."""

    def rank(gram: str) -> tuple[float, str]:
        share_in_step = aligned[gram] / (anywhere[gram] + 1)
        return -share_in_step, gram

    return sorted(grams, key=rank)


def build_vocab(bigrams: list[str], trigrams: list[str]) -> tuple[Vocab, Merges]:
    """The ids of the whole table above, and the merges.

    These are first of bytes to characters, then to trigrams, then to bigrams.
    """
    vocab: Vocab = {spell(chr(id_)): id_ for id_ in CHARACTER_IDS}
    vocab[spell("\uffff")] = NONCHARACTER_ID
    characters = [token for token in vocab if len(token) > 1]  # of several bytes
    of_three_bytes = [token for token in characters if len(token) == 3]
    prefixes = sorted({token[:2] for token in of_three_bytes})
    vocab |= _numbered(SPECIAL_TOKENS.values(), SPECIAL_IDS)
    for id_ in BYTE_IDS:
        byte = id_ & BYTE
        vocab[chr(SPELLING.get(byte, byte))] = id_
    vocab |= _numbered(prefixes, PREFIX_IDS)
    vocab |= _numbered(map(spell, sorted(bigrams)), BIGRAM_IDS)
    vocab |= _numbered(map(spell, sorted(trigrams)), TRIGRAM_IDS)
    used = set(vocab.values())
    for id_ in range(VOCAB_SIZE):
        if id_ not in used:
            vocab[f"<unused_{id_:04X}>"] = id_
    merges: Merges = []
    for token in (*prefixes, *characters):
        merges.append((token[:-1], token[-1]))
    for gram in (*trigrams, *bigrams):
        merges += _merges_to(gram, vocab)
    return vocab, merges


def _merges_to(gram: str, vocab: Vocab) -> Iterator[tuple[str, str]]:
    """The pairs of tokens that make an n-gram."""
    for cut in range(1, len(gram)):
        left = spell(gram[:cut])
        right = spell(gram[cut:])
        if left in vocab and right in vocab:
            yield left, right


def bytes_of(token: str) -> bytes:
    """What a token of a byte-level vocabulary stands for; one with other characters, itself."""
    try:
        return bytes([BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def _numbered(tokens: Iterable[str], ids: range) -> Vocab:
    """Tokens with ids in order; there may be fewer than ids."""
    return dict(zip(tokens, ids, strict=False))


def spell(text: str) -> str:
    """A text as byte-level vocabularies write it, one character a byte."""
    return text.encode().decode("latin-1").translate(SPELLING)

"""The character n-gram tokenizer: 65,536 ids, characters as their own ids, and the most useful bi-
and trigrams.

Used by `train_tokenizer`. A character of the Basic Multilingual Plane has its UTF-16 code unit as
its id; the code units that are not characters, surrogates and private use, hold the rest:

    D800-DFFF   2,048 bigrams
    E000-E07E   <pad> <s> </s> <unk>, and 123 ids kept free
    E07F        U+FFFF, a noncharacter, whose own id no text gives: see LAST_TOKEN
    E080-E0FF   the bytes 80 to FF
    E100-E45B   the 860 pairs of bytes that three-byte characters begin with; no text ends up with one
    E45C-F8FF   5,284 trigrams

Characters in private use and above U+FFFF are spelled in bytes, so any text survives. In form this
is a byte-level BPE whose first merges make characters out of UTF-8: the form that gigatoken encodes
fast.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator

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
# given by no text: ids 0 and V - 1 are one input to a decoder of 16 code bits
LAST_TOKEN = "<unused_FFFF>"
WITHOUT_ID = re.compile("[\ue000-\uf8ff\U00010000-\U0010ffff]")

# as the encoder cuts text, near enough, with the standard library alone
WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+")
PIECE_CHARACTERS = 1 << 20
PORTION_CHARACTERS = 8 << 20
MAX_GRAMS = 2_000_000  # what two counts may hold each: some 500 MB

# byte-level vocabularies write a byte as the Latin-1 character, or as one from U+0100 on where that
# is invisible
INVISIBLE = (*range(0x21), *range(0x7F, 0xA1), 0xAD)
SPELLING = {byte: 0x100 + place for place, byte in enumerate(INVISIBLE)}

Vocab = dict[str, int]
Merges = list[tuple[str, str]]


def learn_vocab(texts: Iterable[str]) -> tuple[Vocab, Merges]:
    """Ids and merges, with the n-grams of these texts; what too small a text leaves over stays
    unused.
    """
    bigrams, trigrams = choose_grams(*count_grams(texts))
    if unused := len(BIGRAM_IDS) + len(TRIGRAM_IDS) - len(bigrams) - len(trigrams):
        print(f"note: the text has too few n-grams; {unused:,} ids stay unused", file=sys.stderr)
    return build_vocab(bigrams, trigrams)


def count_grams(texts: Iterable[str]) -> tuple[Counter[str], Counter[str]]:
    """How often up to 3 characters stand anywhere in a word, and how often where reading it in
    threes meets them.
    """
    anywhere, aligned = Counter[str](), Counter[str]()
    for words in count_words(texts):
        for word, number in words.items():
            for start in range(len(word)):
                anywhere[word[start : start + 3]] += number
            for start in range(0, len(word), 3):
                aligned[word[start : start + 3]] += number
        if len(anywhere) > MAX_GRAMS:
            anywhere = Counter(dict(anywhere.most_common(MAX_GRAMS // 2)))
            aligned = Counter(
                {gram: number for gram, number in aligned.items() if gram in anywhere}
            )
    return anywhere, aligned


def count_words(texts: Iterable[str]) -> Iterator[Counter[str]]:
    """The words of the texts, in portions of bounded size."""
    words, characters = Counter[str](), 0
    for text in texts:
        for start in range(0, len(text), PIECE_CHARACTERS):
            piece = text[start : start + PIECE_CHARACTERS]
            words.update(WORD.findall(piece))
            characters += len(piece)
            if characters >= PORTION_CHARACTERS:
                yield words
                words, characters = Counter(), 0
    yield words


def choose_grams(anywhere: Counter[str], aligned: Counter[str]) -> tuple[list[str], list[str]]:
    """The bigrams and the trigrams met most often when words are read in threes, each in the order
    to merge them.

    Merges come before all others where the n-gram is seldom seen out of step with that reading, so
    that a word falls apart into few tokens. Bigrams count for the trigrams that are made out of
    them, too.
    """
    pairs, pairs_anywhere = Counter[str](), Counter[str]()
    for gram, number in aligned.items():
        for start in range(len(gram) - 1):
            pairs[gram[start : start + 2]] += number
    for gram, number in anywhere.items():
        pairs_anywhere[gram[:2]] += number
    bigrams = _most_frequent(pairs, len(BIGRAM_IDS))
    known = set(bigrams)
    triples = Counter(
        {gram: aligned[gram] for gram in aligned if len(gram) == 3 and {gram[:2], gram[1:]} & known}
    )
    trigrams = _most_frequent(triples, len(TRIGRAM_IDS))
    return _in_step_first(bigrams, pairs, pairs_anywhere), _in_step_first(
        trigrams, aligned, anywhere
    )


def _most_frequent(counts: Counter[str], places: int) -> list[str]:
    grams = [gram for gram in counts if not WITHOUT_ID.search(gram)]
    return sorted(grams, key=lambda gram: (-counts[gram], gram))[:places]


def _in_step_first(grams: list[str], aligned: Counter[str], anywhere: Counter[str]) -> list[str]:
    return sorted(grams, key=lambda gram: (-aligned[gram] / (anywhere[gram] + 1), gram))


def build_vocab(bigrams: list[str], trigrams: list[str]) -> tuple[Vocab, Merges]:
    """The ids of the whole table above; merges of bytes to characters, then to trigrams, then to
    bigrams.
    """
    vocab = {spell(chr(id_)): id_ for id_ in CHARACTER_IDS} | {spell("\uffff"): NONCHARACTER_ID}
    long = [token for token in vocab if len(token) > 1]
    prefixes = sorted({token[:2] for token in long if len(token) == 3})
    vocab |= zip(SPECIAL_TOKENS.values(), SPECIAL_IDS, strict=False)
    vocab |= {chr(SPELLING.get(id_ & 0xFF, id_ & 0xFF)): id_ for id_ in BYTE_IDS}
    vocab |= zip(prefixes, PREFIX_IDS, strict=True)
    vocab |= zip(map(spell, sorted(bigrams)), BIGRAM_IDS, strict=False)
    vocab |= zip(map(spell, sorted(trigrams)), TRIGRAM_IDS, strict=False)
    vocab |= {f"<unused_{id_:04X}>": id_ for id_ in set(range(VOCAB_SIZE)) - set(vocab.values())}
    merges = [(prefix[0], prefix[1]) for prefix in prefixes] + [
        (token[:-1], token[-1]) for token in long
    ]
    for gram in (*trigrams, *bigrams):
        parts = [(spell(gram[:cut]), spell(gram[cut:])) for cut in range(1, len(gram))]
        merges += [(left, right) for left, right in parts if left in vocab and right in vocab]
    return vocab, merges


def spell(text: str) -> str:
    """A text as byte-level vocabularies write it, one character a byte."""
    return text.encode().decode("latin-1").translate(SPELLING)

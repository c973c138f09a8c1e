"""Byte-level BPE of exactly the ids asked for, learned from whole documents at gigabpe's speed.

Id 0 ends documents, 256 bytes follow, then merges; the last id is
`<pad>`, which no text gives: to a decoder whose code has no bit to spare, the first and the last id
are one input.
"""

import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import gigabpe
from tokenizers import pre_tokenizers

from data_prep.errors import UserError
from data_prep.tokenizer.char_ngram import SPELLING

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<pad>"
SPECIAL_TOKENS = {"bos_token": EOS_TOKEN, "eos_token": EOS_TOKEN, "pad_token": PAD_TOKEN}
MIN_VOCAB_SIZE = 1 + 256 + 1  # end of document, bytes, padding
WORD = re.compile(r"[^\W\d_]+")  # letters

# `gigabpe` takes files, and like `tokenizers` cuts them at line ends, so that no merge holds one:
# 8 % more tokens on code. So documents are written with line feed and vertical tab in each other's
# place. To the pattern that cuts text into words both are white space. Their places in the
# byte-level alphabet are neighbours, so ties between merges fall as they would have. A real
# vertical tab cuts its document.
LINE_FEED = 0x0A
VERTICAL_TAB = 0x0B
SWAPPED_BYTES = bytes.maketrans(b"\n\v", b"\v\n")
SWAPPED_SPELLINGS = {
    SPELLING[LINE_FEED]: SPELLING[VERTICAL_TAB],
    SPELLING[VERTICAL_TAB]: SPELLING[LINE_FEED],
}

Vocab = dict[str, int]
Merges = list[tuple[str, str]]


def learn_vocab(texts: Iterable[str], vocab_size: int) -> tuple[Vocab, Merges]:
    """Exactly vocab_size ids, and their merges. Raises UserError if the texts can't fill them.

    A text has only so many merges: at some point each of its words is one token. The merges that
    are then missing are learned from the same words in other spellings (`spellings`).
    """
    with tempfile.TemporaryDirectory(prefix="train_tokenizer.") as scratch:
        documents = Path(scratch, "documents")
        write_documents(documents, texts)
        all_merges = learn_merges([documents], vocab_size)
        vocab, merges = build_vocab(all_merges, vocab_size)
        own = len(vocab)
        if own < vocab_size:
            text = documents.read_text(encoding="utf-8")
            extra = Path(scratch, "spellings")
            extra.write_text("".join(spellings(text)), encoding="utf-8")
            all_merges = learn_merges([documents, extra], vocab_size)
            vocab, merges = build_vocab(all_merges, vocab_size)
    if len(vocab) < vocab_size:
        problem = f"this text supports {len(vocab):,} ids"
        raise UserError(f"--vocab-size {vocab_size:,}: {problem}; ask for fewer, or add text")
    if own < vocab_size:
        print(
            f"note: the text's words fill {own:,} ids; other spellings of them fill the rest",
            file=sys.stderr,
        )
    return vocab, merges


def write_documents(path: Path, texts: Iterable[str]) -> None:
    """A document a line.

    The white space that ends one is left out: with the line's end it would make a word.
    """
    with path.open("wb") as file:
        for text in texts:
            document = text.rstrip().encode()
            file.write(document.translate(SWAPPED_BYTES) + b"\n")


def learn_merges(files: list[Path], vocab_size: int) -> Merges:
    """Merges in order, at least as many as needed where the text of `write_documents` has them."""
    names = [str(file) for file in files]
    _, merges = gigabpe.train_bpe(
        names, vocab_size, special_tokens=[EOS_TOKEN], pretokenizer="bytelevel"
    )
    return [(_swapped(left), _swapped(right)) for left, right in merges]


def _swapped(token: str) -> str:
    """A token with line feed and vertical tab in each other's place."""
    return token.translate(SWAPPED_SPELLINGS)


def spellings(text: str) -> Iterator[str]:
    """Every word of the text in small letters, with a capital, in capitals; also after a space."""
    words = set(WORD.findall(text))
    for word in sorted({word.lower() for word in words}):
        for spelling in (word, word.capitalize(), word.upper()):
            yield f"{spelling} {spelling}\n"


def build_vocab(merges: Merges, vocab_size: int) -> tuple[Vocab, Merges]:
    """The ids, and the merges used.

    First comes the end of a document, then the 256 bytes, what the merges make, and padding.
    """
    tokens = [EOS_TOKEN, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: id_ for id_, token in enumerate(tokens)}
    used: Merges = []
    for left, right in merges:
        if len(vocab) == vocab_size - 1:
            break
        vocab.setdefault(left + right, len(vocab))  # two merges may make the same token
        used.append((left, right))
    vocab[PAD_TOKEN] = len(vocab)
    return vocab, used

"""What `show` says of a source: its figures in words, a histogram and the commonest ids."""

import math
from collections.abc import Iterator

import numpy as np

from data_prep.inputs.urls import without_credentials
from data_prep.manifest import Manifest, Source
from data_prep.shards import ShardReader
from data_prep.tokenizer.load import LoadedTokenizer
from data_prep.view.columns import LINE_CHARACTERS, Fact, cut
from data_prep.view.source_statistics import (
    REPLACEMENT,
    Integers,
    LengthBin,
    SourceStatistics,
    length_bins,
    measure,
    raw_bytes,
)

BAR_CHARACTERS = 40
EIGHTHS = " ▏▎▍▌▋▊▉"  # of a character, from none to seven
COMMONEST = 20
COMMONEST_COLUMNS = 3
TOKEN_CHARACTERS = 14
BAD_DOCUMENTS_SHOWN = 3


def about_source(reader: ShardReader, tokenizer: LoadedTokenizer, source: Source) -> Iterator[Fact]:
    """Lengths of documents, use of the vocabulary and what was left out, in both splits."""
    measured = measure(reader, source)
    yield "lengths", about_lengths(measured.lengths)
    if measured.counted < measured.tokens:
        yield "counted", about_counted(measured)
    yield "never seen", about_unseen(measured)
    yield "raw bytes", about_raw_bytes(tokenizer, measured)
    yield "commonest", about_commonest(tokenizer, measured)
    if source.loss:
        yield "lossy", str(source.loss)
    yield "left out", about_left_out(reader.manifest, source)


def about_lengths(lengths: Integers) -> str:
    """The median and the longest document, and a histogram below."""
    median = np.median(lengths)
    longest = lengths.max()
    lines = [f"median {median:,.0f} tokens, longest {longest:,} (end-of-document ids aside)"]
    lines += histogram(lengths)
    return "\n".join(lines)


def histogram(lengths: Integers) -> Iterator[str]:
    """A line for each power of two of length: the span, documents, their share and a bar."""
    bins = length_bins(lengths)
    most = max(each.documents for each in bins)
    # The last span is the widest: two numbers of as many digits, and the sign between them.
    digits = len(f"{bins[-1].longest:,}")
    span_characters = 2 * digits + 1
    for each in bins:
        share = each.documents / len(lengths)
        columns = [
            span(each).rjust(span_characters),
            f"{each.documents:>10,}",
            f"{share:>6.1%}",
            bar(each.documents, most),
        ]
        yield "  ".join(columns).rstrip()


def span(lengths: LengthBin) -> str:
    """The lengths that a bin holds: `4-7`, or of a single one, `1`."""
    if lengths.shortest == lengths.longest:
        return f"{lengths.longest:,}"
    return f"{lengths.shortest:,}-{lengths.longest:,}"


def bar(part: int, whole: int) -> str:
    """A bar in eighths of a character, of BAR_CHARACTERS for the whole; at least an eighth."""
    eighths = math.ceil(8 * BAR_CHARACTERS * part / whole)
    full, rest = divmod(eighths, 8)
    return "█" * full + EIGHTHS[rest]


def about_counted(measured: SourceStatistics) -> str:
    """That only a part was counted."""
    counted = measured.counted
    tokens = measured.tokens
    return f"{counted:,} of {tokens:,} tokens, evenly spread; the figures below are of these"


def about_unseen(measured: SourceStatistics) -> str:
    """How many ids of the vocabulary never occur."""
    unseen = measured.unseen_ids
    ids = measured.vocab_size
    share = unseen / ids
    return f"{unseen:,} of {ids:,} ids ({share:.1%})"


def about_raw_bytes(tokenizer: LoadedTokenizer, measured: SourceStatistics) -> str:
    """How much the vocabulary lacks of what the source is written in."""
    ids = raw_bytes(tokenizer.reference)
    share = measured.share_of(ids)
    return f"{share:.3%} of tokens are one byte of a multi-byte character"


def about_commonest(tokenizer: LoadedTokenizer, measured: SourceStatistics) -> str:
    """The commonest ids, their text and their share, in columns that are read line by line."""
    lines: list[str] = []
    for place, i in enumerate(measured.commonest(COMMONEST)):
        text = token_text(tokenizer, i)
        shown = cut(text, TOKEN_CHARACTERS - 1).ljust(TOKEN_CHARACTERS)
        share = measured.share_of([i])
        cell = f"{i:>5} {shown} {share:>6.2%}"
        if place % COMMONEST_COLUMNS == 0:
            lines.append(cell)
        else:
            lines[-1] += f"  {cell}"
    return "\n".join(lines)


def token_text(tokenizer: LoadedTokenizer, i: int) -> str:
    """What an id stands for, in quotes; its bytes, `<e2 80>`, where it is part of a character."""
    text = tokenizer.reference.decode([i], skip_special_tokens=False)
    if REPLACEMENT not in text:
        return repr(text)
    if tokenizer.token_bytes:
        in_bytes: bytes = tokenizer.token_bytes[i].as_py()
        return f"<{in_bytes.hex(' ')}>"
    return tokenizer.reference.id_to_token(i) or ""


def about_left_out(manifest: Manifest, source: Source) -> str:
    """How many documents were left out, and the first bad ones of them."""
    empty = source.empty_documents
    bad = source.bad_documents
    lines = [f"{empty:,} empty documents, {bad:,} bad ones"]
    for document in manifest.bad_documents:
        if document.source != source.name:
            continue
        if len(lines) > BAD_DOCUMENTS_SHOWN:
            break
        line = f"{document.input}, row {document.row}: {document.reason}"
        safe = without_credentials(line)
        lines.append(cut(safe, LINE_CHARACTERS))
    return "\n".join(lines)

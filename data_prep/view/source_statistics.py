"""What `show` says of a source."""

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm

from data_prep.inputs.urls import without_credentials
from data_prep.layout import SPLITS
from data_prep.manifest import MAX_VOCAB_SIZE, Shard, Source
from data_prep.shards import ShardReader
from data_prep.tokenizer.encode import LoadedTokenizer
from data_prep.view.columns import LINE_CHARACTERS, cut

BAR_CHARACTERS = 40
BAR_ENDS = " ▏▎▍▌▋▊▉"
COMMONEST = 20
COMMONEST_COLUMNS = 3
TOKEN_CHARACTERS = 14
BAD_DOCUMENTS_SHOWN = 3
PIECE_TOKENS = 1 << 20  # counted at a time: bincount makes 8 bytes of each id
COUNTED_TOKENS = 500_000_000  # of a source; of a larger one, pieces evenly spread


def about_source(
    reader: ShardReader, tokenizer: LoadedTokenizer, source: Source
) -> Iterator[tuple[str, str]]:
    """Lengths of documents, use of the vocabulary and what was left out; train and validation
    shards together.
    """
    manifest = reader.manifest
    shards = [shard for split in SPLITS for shard in manifest.shards_of(split, source.name)]
    lengths, counts = count(reader, shards)
    summary = (
        f"median {np.median(lengths):,.0f} tokens, longest {lengths.max():,} (end-of-document ids "
        "aside)"
    )
    yield "lengths", "\n".join([summary, *histogram(lengths)])
    counted, tokens = int(counts.sum()), sum(shard.tokens for shard in shards)
    if counted < tokens:
        yield (
            "counted",
            f"{counted:,} of {tokens:,} tokens, evenly spread; the figures below are of these",
        )
    unseen = int((counts[: manifest.vocab_size] == 0).sum())
    yield (
        "never seen",
        f"{unseen:,} of {manifest.vocab_size:,} ids ({unseen / manifest.vocab_size:.1%})",
    )
    in_bytes = counts[raw_bytes(tokenizer.reference)].sum() / counted
    yield "raw bytes", f"{in_bytes:.3%} of tokens are one byte of a multi-byte character"
    yield "commonest", "\n".join(commonest(tokenizer, counts))
    summary = f"{source.empty_documents:,} empty documents, {source.bad_documents:,} bad ones"
    bad = [
        f"{b.input}, row {b.row}: {b.reason}"
        for b in manifest.bad_documents
        if b.source == source.name
    ]
    if source.loss:
        yield "lossy", str(source.loss)
    yield (
        "left out",
        "\n".join(
            [
                summary,
                *(
                    cut(without_credentials(line), LINE_CHARACTERS)
                    for line in bad[:BAD_DOCUMENTS_SHOWN]
                ),
            ]
        ),
    )


def count(
    reader: ShardReader, shards: Sequence[Shard]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Length of every document, and how often each id occurs in at most about COUNTED_TOKENS."""
    ends = [
        np.append(reader.documents(shard)[:, 0], shard.tokens).astype(np.int64) for shard in shards
    ]
    counts = np.zeros(MAX_VOCAB_SIZE, np.int64)
    pieces = [(shard, start) for shard in shards for start in range(0, shard.tokens, PIECE_TOKENS)]
    pieces = pieces[:: -(-sum(shard.tokens for shard in shards) // COUNTED_TOKENS)]
    for shard, start in tqdm(pieces, desc="counting", leave=False, disable=None):
        counts += np.bincount(
            reader.tokens(shard)[start : start + PIECE_TOKENS], minlength=MAX_VOCAB_SIZE
        )
    return np.concatenate([np.diff(bounds) - 1 for bounds in ends]), counts


def histogram(lengths: npt.NDArray[np.int64]) -> Iterator[str]:
    """Documents by length, in powers of two, from the shortest to the longest."""
    documents = np.bincount(np.frexp(lengths)[1])
    width = 2 * len(f"{1 << (len(documents) - 1):,}") + 1  # of the last span
    shortest = int(lengths.min()).bit_length()
    for power, number in enumerate(documents[shortest:].tolist(), shortest):
        span = f"{(1 << power) >> 1:,}-" * (power > 1) + f"{(1 << power) - 1:,}"
        whole, eighths = divmod(math.ceil(8 * BAR_CHARACTERS * number / documents.max()), 8)
        bar = "█" * whole + BAR_ENDS[eighths]
        yield f"{span:>{width}}  {number:>10,}  {number / len(lengths):>6.1%}  {bar}".rstrip()


def raw_bytes(tokenizer: Tokenizer) -> list[int]:
    """Ids of the single bytes 0x80 to 0xFF, of a byte-level or byte-fallback tokenizer: no text
    on their own.
    """
    alphabet = set(ByteLevel.alphabet())
    of_bytes = (
        i
        for t, i in tokenizer.get_vocab().items()
        if t in alphabet or re.fullmatch("<0x[89A-F][0-9A-F]>", t)
    )
    return [i for i in of_bytes if tokenizer.decode([i]) == "\ufffd"]


def commonest(tokenizer: LoadedTokenizer, counts: npt.NDArray[np.int64]) -> Iterator[str]:
    """The commonest ids, their text (or bytes, where they are a part of a character) and their
    share, in columns.
    """
    cells = []
    for i in np.argsort(-counts, kind="stable")[
        : min(COMMONEST, np.count_nonzero(counts))
    ].tolist():
        shown = repr(tokenizer.reference.decode([i], skip_special_tokens=False))
        if "\ufffd" in shown:
            in_bytes = tokenizer.token_bytes
            shown = (
                f"<{in_bytes[i].as_py().hex(' ')}>"
                if in_bytes
                else tokenizer.reference.id_to_token(i) or ""
            )
        shown = cut(shown, TOKEN_CHARACTERS - 1)
        cells.append(f"{i:>5} {shown:<{TOKEN_CHARACTERS}} {counts[i] / counts.sum():>6.2%}")
    return (
        "  ".join(cells[i : i + COMMONEST_COLUMNS]) for i in range(0, len(cells), COMMONEST_COLUMNS)
    )

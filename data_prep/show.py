"""Show what a data set holds: its sources in numbers, samples of its documents, and where a
token came from.
"""

import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm

from data_prep.building.one_input import warning_of_one_input
from data_prep.errors import CommandParser, UserError, exit_code, large_number, printable
from data_prep.inputs.urls import without_credentials
from data_prep.shards import (
    BLOCK_SAMPLES,
    MAX_VOCAB_SIZE,
    SPLITS,
    TOKENIZER_NAME,
    Manifest,
    Shard,
    ShardReader,
    Source,
)
from data_prep.tokenizer.load import LoadedTokenizer, load_tokenizer

SAMPLE_CHARACTERS = 300
TRACE_TOKENS = 40  # shown on either side
NAME_CHARACTERS, LINE_CHARACTERS = 13, 86  # of a fact
BAR_CHARACTERS = 40
BAR_ENDS = " ▏▎▍▌▋▊▉"
COMMONEST, COMMONEST_COLUMNS, TOKEN_CHARACTERS = 20, 3, 14
BAD_DOCUMENTS_SHOWN = 3
PIECE_TOKENS = 1 << 20  # counted at a time: bincount makes 8 bytes of each id
MAX_EPOCHS = 4  # Muennighoff et al. 2023, arXiv 2305.16264: repeats beyond it are worth little
COUNTED_TOKENS = 500_000_000  # of a source; of a larger one, pieces evenly spread
HEADER = ("split", "source", "documents", "tokens", "chars/token", "bytes/token", "share")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = CommandParser(prog="python -m data_prep.show", description=__doc__)
    parser.add_argument(
        "data_dir", type=Path, metavar="DATASET", help="directory with a manifest.json"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=2,
        metavar="N",
        help="documents shown per split (%(default)s)",
    )
    parser.add_argument(
        "--train-tokens",
        type=large_number,
        metavar="N",
        help="say how often a run sees each source",
    )
    parser.add_argument(
        "--trace", metavar="SHARD:OFFSET", help="name the document that a token came from"
    )
    arguments = parser.parse_args(argv)
    reader = ShardReader(arguments.data_dir)
    tokenizer = load_tokenizer(arguments.data_dir / TOKENIZER_NAME)
    if arguments.trace:
        print(printable(trace(reader, tokenizer.reference, arguments.trace)))
        return
    print(printable(describe(arguments.data_dir, reader.manifest)))
    if warning := warning_of_one_input(reader, tokenizer.by_reference):
        print(printable(f"one input    {warning}"))
    print_epochs(reader.manifest, arguments.train_tokens)
    for source in reader.manifest.sources:
        lines = facts(about_source(reader, tokenizer, source), "  ")
        print("\n" + printable("\n".join([source.name, *lines])))
    for split in SPLITS:
        for shard, document in spread(reader.manifest.shards_of(split), arguments.samples):
            print("\n" + printable(sample(reader, tokenizer.reference, shard, document)))


def facts(named: Iterable[tuple[str, str]], indent: str = "") -> Iterator[str]:
    """Names and what they stand for, aligned."""
    for name, value in named:
        yield f"{indent}{name:<{NAME_CHARACTERS - len(indent)}}" + value.replace(
            "\n", "\n" + " " * NAME_CHARACTERS
        )


def cut(text: str, length: int) -> str:
    """At most so many characters of a text, and a sign if there are more."""
    return text[:length] + "…" * (len(text) > length)


def describe(data_dir: Path, manifest: Manifest) -> str:
    """The data set in numbers."""
    rows = [HEADER]
    for split in SPLITS:
        for source in manifest.sources:
            share = f"{source.share / BLOCK_SAMPLES:.2%}" if split == "train" else ""
            rows.append(
                (split, source.name, *figures(manifest.shards_of(split, source.name)), share)
            )
    special = ", ".join(f"{token} = {i}" for token, i in manifest.special_tokens.items()) or "none"
    about = (
        ("data set", str(data_dir)),
        ("fingerprint", manifest.fingerprint),
        ("vocabulary", f"{manifest.vocab_size:,} ids"),
        ("special", cut(special, LINE_CHARACTERS)),
        ("separator", f"{manifest.document_separator}: {manifest.eos_token} = {manifest.eos_id}"),
        ("shards", f"{len(manifest.shards):,}"),
        *(("lossy", str(loss)) for loss in [manifest.loss] if loss),
    )
    return "\n".join([*facts(about), "", table(rows)])


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


def figures(shards: Sequence[Shard]) -> tuple[str, str, str, str]:
    """Documents, tokens, characters and bytes per token (end-of-document ids not counted as
    tokens in these two).
    """
    documents, tokens = (
        sum(shard.documents for shard in shards),
        sum(shard.tokens for shard in shards),
    )
    of_text = max(tokens - documents, 1)
    characters, size = (
        sum(shard.text_characters for shard in shards),
        sum(shard.text_bytes for shard in shards),
    )
    return f"{documents:,}", f"{tokens:,}", f"{characters / of_text:.2f}", f"{size / of_text:.2f}"


def print_epochs(manifest: Manifest, train_tokens: int | None) -> None:
    """How often a training run of so many tokens sees each source; a source seen too often is
    warned of.
    """
    for name, epochs in manifest.epochs(train_tokens or 0).items() if train_tokens else ():
        warning = f"; above {MAX_EPOCHS} repeats teach little: add text or lower its weight" * (
            epochs > MAX_EPOCHS
        )
        print(f"epochs       {name}: {epochs:,.2f} over {train_tokens:,} training tokens{warning}")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first two to the left, numbers to the right, a rule below the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{'<' if i < 2 else '>'}{width}}}" for i, width in enumerate(widths))
    rule = ["-" * width for width in widths]
    return "\n".join(form.format(*row).rstrip() for row in (rows[0], rule, *rows[1:]))


def spread(shards: Sequence[Shard], count: int) -> Iterable[tuple[Shard, int]]:
    """`count` documents, evenly spaced over the shards."""
    ends = np.cumsum([shard.documents for shard in shards])
    total = int(ends[-1]) if len(ends) else 0
    for position in sorted({i * total // count for i in range(count)} if total else ()):
        i = int(np.searchsorted(ends, position, side="right"))
        yield shards[i], position - int(ends[i]) + shards[i].documents


def sample(reader: ShardReader, tokenizer: Tokenizer, shard: Shard, document: int) -> str:
    """The beginning of a document, decoded, with where it comes from."""
    place, (origin, row) = reader.document(shard, document)
    ids = reader.tokens(shard)[place.start : place.stop - 1]
    text = decoded(tokenizer, ids[:SAMPLE_CHARACTERS])
    head = (
        f"{shard.split} · {shard.source} · {origin}, row {row} · {len(ids):,} tokens · "
        f"{shard.path}:{place.start}"
    )
    return f"{head}\n  {cut(text, SAMPLE_CHARACTERS)}"


def trace(reader: ShardReader, tokenizer: Tokenizer, place: str) -> str:
    """The document that holds a token, and the text around it."""
    shard, offset = find_token(reader.manifest, place)
    document = reader.document_at(shard, offset)
    whole, (origin, row) = reader.document(shard, document)
    tokens = reader.tokens(shard)
    before = decoded(tokenizer, tokens[max(whole.start, offset - TRACE_TOKENS) : offset])
    token = decoded(tokenizer, tokens[offset : offset + 1])
    after = decoded(tokenizer, tokens[offset + 1 : min(whole.stop - 1, offset + 1 + TRACE_TOKENS)])
    about = (
        ("token", f"{token!r}, id {tokens[offset]}"),
        ("place", f"{shard.path}:{offset}"),
        ("document", f"{document:,} of {shard.documents:,} in the shard (from 0); this is its token"
         f" {offset - whole.start:,} of {len(whole):,}"),
        ("input", f"{origin}, row {row}"),
        ("source", f"{shard.source} ({shard.split})"),
        ("text", f"{before}⟦{token}⟧{after}"),
    )  # fmt: skip
    return "\n".join(facts(about))


def find_token(manifest: Manifest, place: str) -> tuple[Shard, int]:
    """The shard and offset that SHARD:OFFSET names; any unambiguous end of a shard's path will
    do.
    """
    name, _, number = place.rpartition(":")
    end = name.removesuffix(".npy")
    matching = [shard for shard in manifest.shards if shard.path.removesuffix(".npy").endswith(end)]
    if not name or not matching:
        raise UserError(
            f"--trace {place}: no such shard; expected SHARD:OFFSET, such as "
            f"{manifest.shards[0].path}:0"
        )
    shard, *others = matching
    if others:
        raise UserError(
            f"--trace {place}: {len(matching)} shards end so; name one, such as "
            f"{shard.path}:{number}"
        )
    if not number.isdecimal() or int(number) >= shard.tokens:
        raise UserError(f"--trace {place}: offset {number!r}, expected 0 to {shard.tokens - 1}")
    return shard, int(number)


def decoded(tokenizer: Tokenizer, ids: npt.NDArray[np.uint16]) -> str:
    """The text of some ids, its line ends shown as a sign."""
    return (
        tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        .replace("\r", "␍")
        .replace("\n", "⏎")
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))

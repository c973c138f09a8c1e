"""Show what a data set holds: sources in numbers, samples, and where a token came from."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from data_prep.commands import CommandParser, exit_code, large_number
from data_prep.errors import UserError, printable
from data_prep.layout import SPLITS
from data_prep.manifest import Manifest, Shard
from data_prep.shards import TOKENIZER_NAME, ShardReader
from data_prep.tokenizer.load import LoadedTokenizer, load_tokenizer
from data_prep.view.columns import cut, facts
from data_prep.view.one_input import warning_of_one_input
from data_prep.view.source_text import about_source
from data_prep.view.summary import describe, print_epochs

SAMPLE_CHARACTERS = 300
TRACE_TOKENS = 40  # shown on either side


def main(argv: list[str] | None = None) -> None:
    """The command."""
    arguments = parse_arguments(argv)
    reader = ShardReader(arguments.data_dir)
    tokenizer = load_tokenizer(arguments.data_dir / TOKENIZER_NAME)
    if arguments.trace:
        print(printable(trace(reader, tokenizer.reference, arguments.trace)))
        return
    print(printable(describe(arguments.data_dir, reader.manifest)))
    if warning := warning_of_one_input(reader, tokenizer.by_reference):
        print(printable(f"one input    {warning}"))
    print_epochs(reader.manifest, arguments.train_tokens)
    print_sources(reader, tokenizer)
    print_samples(reader, tokenizer.reference, arguments.samples)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """What the command line says."""
    about = (
        "Show what a data set holds: its sources in numbers, samples of its documents, and where a "
        "token came from."
    )
    parser = CommandParser(prog="python -m data_prep.show", description=about)
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
    return parser.parse_args(argv)


def print_sources(reader: ShardReader, tokenizer: LoadedTokenizer) -> None:
    """A block of facts for each source."""
    for source in reader.manifest.sources:
        lines = facts(about_source(reader, tokenizer, source), indent="  ")
        block = "\n".join([source.name, *lines])
        print(f"\n{printable(block)}")


def print_samples(reader: ShardReader, tokenizer: Tokenizer, number: int) -> None:
    """The beginnings of so many documents of each split."""
    for split in SPLITS:
        shards = reader.manifest.shards_of(split)
        for shard, document in spread(shards, number):
            block = sample(reader, tokenizer, shard, document)
            print(f"\n{printable(block)}")


def spread(shards: Sequence[Shard], number: int) -> Iterator[tuple[Shard, int]]:
    """So many documents, evenly spaced over the shards: each by its shard and its place there."""
    ends = np.cumsum([shard.documents for shard in shards], dtype=np.int64)
    documents = sum(shard.documents for shard in shards)
    if not documents:
        return
    # Of fewer documents than are asked for, places repeat: each document is shown once.
    places = sorted({i * documents // number for i in range(number)})
    for place in places:
        i = int(np.searchsorted(ends, place, side="right"))
        before = int(ends[i]) - shards[i].documents
        yield shards[i], place - before


def sample(reader: ShardReader, tokenizer: Tokenizer, shard: Shard, document: int) -> str:
    """The beginning of a document, decoded, with where it comes from."""
    place, origin = reader.document(shard, document)
    ids = reader.tokens(shard)[place.start : place.stop - 1]
    head = (
        f"{shard.split} · {shard.source} · {origin.input}, row {origin.row} · "
        f"{len(ids):,} tokens · {shard.path}:{place.start}"
    )
    # A document may have a million tokens; so many hold about all that is shown.
    text = decoded(tokenizer, ids[:SAMPLE_CHARACTERS])
    return f"{head}\n  {cut(text, SAMPLE_CHARACTERS)}"


def trace(reader: ShardReader, tokenizer: Tokenizer, place: str) -> str:
    """The document that holds a token, and the text around it."""
    shard, offset = find_token(reader.manifest, place)
    number = reader.document_at(shard, offset)
    document, origin = reader.document(shard, number)
    tokens = reader.tokens(shard)
    first = max(document.start, offset - TRACE_TOKENS)
    # The end-of-document id is no text; it is shown where it is the token asked for.
    stop = min(document.stop - 1, offset + 1 + TRACE_TOKENS)
    before = decoded(tokenizer, tokens[first:offset])
    token = decoded(tokenizer, tokens[offset : offset + 1])
    after = decoded(tokenizer, tokens[offset + 1 : stop])
    offset_in_document = offset - document.start
    in_document = f"its token {offset_in_document:,} of {len(document):,}"
    in_shard = f"{number:,} of {shard.documents:,} in the shard (from 0)"
    about = [
        ("token", f"{token!r}, id {tokens[offset]}"),
        ("place", f"{shard.path}:{offset}"),
        ("document", f"{in_shard}; this is {in_document}"),
        ("input", f"{origin.input}, row {origin.row}"),
        ("source", f"{shard.source} ({shard.split})"),
        ("text", f"{before}⟦{token}⟧{after}"),
    ]
    return "\n".join(facts(about))


def find_token(manifest: Manifest, place: str) -> tuple[Shard, int]:
    """The shard and offset that SHARD:OFFSET names.

    Any end of a shard's path will do that no other has. Raises UserError for anything else.
    """
    name, _, number = place.rpartition(":")
    end = name.removesuffix(".npy")
    matching = [shard for shard in manifest.shards if shard.path.removesuffix(".npy").endswith(end)]
    if not name or not matching:
        example = f"{manifest.shards[0].path}:0"
        raise UserError(f"--trace {place}: no such shard; expected SHARD:OFFSET, such as {example}")
    shard, *others = matching
    if others:
        example = f"{shard.path}:{number}"
        raise UserError(
            f"--trace {place}: {len(matching)} shards end so; name one, such as {example}"
        )
    if not number.isdecimal() or int(number) >= shard.tokens:
        raise UserError(f"--trace {place}: offset {number!r}, expected 0 to {shard.tokens - 1}")
    return shard, int(number)


def decoded(tokenizer: Tokenizer, ids: npt.NDArray[np.uint16]) -> str:
    """The text of some ids, its line ends shown as a sign."""
    text: str = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    return text.replace("\r", "␍").replace("\n", "⏎")


if __name__ == "__main__":
    sys.exit(exit_code(main))

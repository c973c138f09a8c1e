"""Show what a data set holds: its sources in numbers, samples of its documents, and where a
token came from.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from data_prep.building.one_input import warning_of_one_input
from data_prep.commands import CommandParser, exit_code, large_number
from data_prep.errors import UserError, printable
from data_prep.layout import SPLITS
from data_prep.manifest import Manifest, Shard
from data_prep.shards import TOKENIZER_NAME, ShardReader
from data_prep.tokenizer.encode import load_tokenizer
from data_prep.view.columns import cut, facts
from data_prep.view.source_statistics import about_source
from data_prep.view.summary import describe, print_epochs

SAMPLE_CHARACTERS = 300
TRACE_TOKENS = 40  # shown on either side


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

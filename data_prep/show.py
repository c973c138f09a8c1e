"""Show what a data set holds: a table of its sources, samples of its documents, and where a token came from."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data_prep.encode import load_tokenizer
from data_prep.errors import CommandParser, UserError, exit_code
from data_prep.shards import BLOCK_SAMPLES, SPLITS, TOKENIZER_NAME, Manifest, Shard, ShardReader

SAMPLE_CHARACTERS = 300
TRACE_TOKENS = 40  # shown on either side
HEADER = ("split", "source", "documents", "tokens", "chars/token", "bytes/token", "share")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = CommandParser(prog="python -m data_prep.show", description=__doc__)
    parser.add_argument("data_dir", type=Path, metavar="DATASET", help="directory with a manifest.json")
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="documents shown per split (%(default)s)")
    parser.add_argument("--trace", metavar="SHARD:OFFSET", help="name the document that a token came from")
    arguments = parser.parse_args(argv)
    reader = ShardReader(arguments.data_dir)
    tokenizer = load_tokenizer(arguments.data_dir / TOKENIZER_NAME).reference
    if arguments.trace:
        print(trace(reader, tokenizer, arguments.trace))
        return
    print(describe(arguments.data_dir, reader.manifest))
    for split in SPLITS:
        for shard, document in spread(reader.manifest.shards_of(split), arguments.samples):
            print("\n" + sample(reader, tokenizer, shard, document))


def describe(data_dir: Path, manifest: Manifest) -> str:
    """The data set in numbers."""
    rows = [HEADER]
    for split in SPLITS:
        for source in manifest.sources:
            share = f"{source.share / BLOCK_SAMPLES:.2%}" if split == "train" else ""
            rows.append((split, source.name, *figures(manifest.shards_of(split, source.name)), share))
    facts = (
        ("data set", str(data_dir)),
        ("fingerprint", manifest.fingerprint),
        ("vocabulary", f"{manifest.vocab_size:,} ids, {manifest.eos_token} = {manifest.eos_id} ends each document"),
        ("shards", f"{len(manifest.shards):,}"),
    )
    return "\n".join([*(f"{name:<12} {value}" for name, value in facts), "", table(rows)])


def figures(shards: Sequence[Shard]) -> tuple[str, str, str, str]:
    """Documents, tokens, characters and bytes per token (end-of-document ids not counted as tokens in these two)."""
    documents, tokens = sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards)
    if not documents:
        return "0", "0", "-", "-"
    of_text = tokens - documents
    characters, size = sum(shard.text_characters for shard in shards), sum(shard.text_bytes for shard in shards)
    return f"{documents:,}", f"{tokens:,}", f"{characters / of_text:.2f}", f"{size / of_text:.2f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first two to the left, numbers to the right, a rule below the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def spread(shards: Sequence[Shard], count: int) -> Iterable[tuple[Shard, int]]:
    """`count` documents, evenly spaced over the shards."""
    ends = np.cumsum([shard.documents for shard in shards])
    total = int(ends[-1]) if len(ends) else 0
    for position in sorted({i * total // count for i in range(count)} if total else ()):
        i = int(np.searchsorted(ends, position, side="right"))
        yield shards[i], position - int(ends[i]) + shards[i].documents


def sample(reader: ShardReader, tokenizer: Tokenizer, shard: Shard, document: int) -> str:
    """The beginning of a document, decoded, with where it comes from."""
    start, stop, row = bounds(reader, shard, document)
    ids = reader.tokens(shard)[start : stop - 1]
    text = one_line(tokenizer.decode(ids[:SAMPLE_CHARACTERS].tolist(), skip_special_tokens=False))
    head = f"{shard.split} · {shard.source} · {shard.input}, row {row} · {len(ids):,} tokens · {shard.path}:{start}"
    return f"{head}\n  {text[:SAMPLE_CHARACTERS]}{'…' if len(text) > SAMPLE_CHARACTERS else ''}"


def trace(reader: ShardReader, tokenizer: Tokenizer, place: str) -> str:
    """The document that holds a token, and the text around it."""
    shard, offset = find_token(reader.manifest, place)
    document = int(np.searchsorted(reader.documents(shard)[:, 0], offset, side="right")) - 1
    start, stop, row = bounds(reader, shard, document)
    tokens = reader.tokens(shard)
    before, token, after = (
        one_line(tokenizer.decode(part.tolist(), skip_special_tokens=False))
        for part in (
            tokens[max(start, offset - TRACE_TOKENS) : offset],
            tokens[offset : offset + 1],
            tokens[offset + 1 : min(stop - 1, offset + 1 + TRACE_TOKENS)],
        )
    )
    facts = (
        ("token", f"{token!r}, id {tokens[offset]}"),
        ("place", f"{shard.path}:{offset}"),
        ("document", f"{document:,} of {shard.documents:,} in the shard (from 0); this is its token {offset - start:,}"
         f" of {stop - start:,}"),
        ("input", f"{shard.input}, row {row}"),
        ("source", f"{shard.source} ({shard.split})"),
        ("text", f"{before}⟦{token}⟧{after}"),
    )  # fmt: skip
    return "\n".join(f"{name:<10} {value}" for name, value in facts)


def find_token(manifest: Manifest, place: str) -> tuple[Shard, int]:
    """The shard and offset that SHARD:OFFSET names; any unambiguous end of a shard's path will do."""
    name, _, number = place.rpartition(":")
    matching = [
        s for s in manifest.shards if s.path == name or s.path.removesuffix(".npy").endswith(name.removesuffix(".npy"))
    ]
    if not name or not matching:
        raise UserError(f"--trace {place}: no such shard; expected SHARD:OFFSET, such as {manifest.shards[0].path}:0")
    if len(matching) > 1 and matching[0].path != name:
        raise UserError(
            f"--trace {place}: {len(matching)} shards end so; name one, such as {matching[0].path}:{number}"
        )
    shard = matching[0]
    if not number.isdecimal() or int(number) >= shard.tokens:
        raise UserError(f"--trace {place}: offset {number!r}, expected 0 to {shard.tokens - 1}")
    return shard, int(number)


def bounds(reader: ShardReader, shard: Shard, document: int) -> tuple[int, int, int]:
    """First token, end (end-of-document id included) and input row of a document."""
    index = reader.documents(shard)
    stop = int(index[document + 1, 0]) if document + 1 < len(index) else shard.tokens
    return int(index[document, 0]), stop, int(index[document, 1])


def one_line(text: str) -> str:
    """Line ends shown as a sign."""
    return text.replace("\r", "␍").replace("\n", "⏎")


if __name__ == "__main__":
    sys.exit(exit_code(main))

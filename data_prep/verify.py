"""Verify a data set: every digest, every id, every document boundary, on all cores.

Prints a line for each bad file and exits with 2 if there is any. With --repair, the work units of
bad files are built again from their sources, and put in place if they are what the manifest says.
"""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tqdm import tqdm

from data_prep.building.build_plan import make_plan
from data_prep.building.mixture import load_mixture, mixture_path
from data_prep.building.output_dir import BUILD_NAME, refuse_shared_folders, write_tokenizer
from data_prep.building.ranks import Communicator, Progress
from data_prep.building.unit_records import shard_path
from data_prep.building.unit_shards import UnitBuilder
from data_prep.commands import CommandParser, exit_code
from data_prep.errors import UserError, parse_json, printable
from data_prep.files import digest_file, write_durably
from data_prep.formats.flat_arrays import Offsets
from data_prep.layout import SPLITS, UNITS_NAME
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
from data_prep.tokenizer.load import load_tokenizer

PIECE_BYTES = 256 << 10  # of a shard, read at once: of 64 KiB to 4 MiB the quickest


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with a file of a data set."""

    line: str  # which file, what is wrong with it, and what to do where a repair doesn't help
    shard: Shard | None = None  # whose file it is
    is_mended_by_repair: bool = False


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = CommandParser(
        prog="python -m data_prep.verify", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "data_dir", type=Path, metavar="DATASET", help="directory with a manifest.json"
    )
    parser.add_argument(
        "--repair", action="store_true", help="build what is bad again from the sources"
    )
    parser.add_argument(
        "--mixture", metavar="NAME_OR_FILE", help="for --repair, if the mixture file was moved"
    )
    arguments = parser.parse_args(argv)
    data_dir: Path = arguments.data_dir
    started = time.perf_counter()
    manifest = load_manifest(data_dir)
    with contextlib.ExitStack() as held:
        if arguments.repair:
            held.enter_context(lock(data_dir, "building or repairing it", "DATASET"))
            held.callback((data_dir / LOCK_NAME).unlink)
        problems = list(find_problems(data_dir, manifest))
        for problem in problems:
            print(f"bad: {printable(problem.line)}")
        if arguments.repair and problems:
            repair(
                data_dir,
                manifest,
                [problem.shard for problem in problems if problem.shard],
                arguments.mixture,
            )
            problems = list(find_problems(data_dir, manifest))
    if problems:
        many = f"{len(problems)} bad file{'s' if len(problems) > 1 else ''}, the first"
        advice = (
            "; --repair builds bad files again"
            if any(p.is_mended_by_repair for p in problems)
            else ""
        )
        raise UserError(f"{data_dir}: {many}: {problems[0].line}{advice}")
    seconds = time.perf_counter() - started
    size = sum(
        (data_dir / path).stat().st_size for shard in manifest.shards for path in shard.digests
    )
    rate = f"{size / 1e6:,.1f} MB at {size / 1e9 / seconds:.2f} GB/s"
    print(
        f"OK: {data_dir}: {len(manifest.shards):,} shards, {rate}, fingerprint "
        f"{manifest.fingerprint}"
    )


def find_problems(data_dir: Path, manifest: Manifest) -> Iterator[Problem]:
    """A line for each bad file: the manifest, the tokenizer, shards in the order of the
    manifest, files unknown.
    """
    yield from (Problem(line=line) for line in find_other_build(data_dir, manifest))
    if tokenizer_sha256(data_dir / TOKENIZER_NAME) != manifest.tokenizer_sha256:
        line = f"{data_dir / TOKENIZER_NAME}: its sha256 is not the manifest's"
        yield Problem(line=line, is_mended_by_repair=True)

    def check(shard: Shard) -> Iterator[Problem]:
        starts = None
        try:
            starts = check_index(data_dir, shard)
        except UserError as error:
            yield bad_shard(shard, error)
        try:
            check_tokens(data_dir, manifest, shard, starts)
        except UserError as error:
            yield bad_shard(shard, error)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = pool.map(lambda shard: list(check(shard)), manifest.shards)
        for lines in tqdm(
            found,
            total=len(manifest.shards),
            desc="verifying",
            unit="shard",
            leave=False,
            disable=None,
        ):
            yield from lines
    yield from (Problem(line=line) for line in find_strays(data_dir, manifest))


def bad_shard(shard: Shard, error: UserError) -> Problem:
    """What is wrong with a shard's file; that a repair mends it is said once, of all of them."""
    return Problem(
        line=str(error).removesuffix(f"; {REPAIR}"), shard=shard, is_mended_by_repair=True
    )


def find_other_build(data_dir: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong with build.json, if it is there: it is damaged, or tells of another
    manifest.
    """
    built = data_dir / BUILD_NAME
    if not built.is_file():
        return
    content = built.read_bytes()
    try:
        parse_json(
            content,
            str(built),
            "remove it: it tells how the data set was made, and is no part of it",
        )
    except UserError as error:
        yield str(error)
        return
    if manifest.fingerprint.encode() not in content:
        other = f"fingerprint {manifest.fingerprint} is not the one in {BUILD_NAME}"
        yield f"{data_dir / MANIFEST_NAME}: {other}; {REBUILD}"


def repair(
    data_dir: Path, manifest: Manifest, bad: Sequence[Shard], mixture_name: str | None
) -> None:
    """Build the units of bad shards again, beside; put them in place if they are what the
    manifest says.
    """
    refuse_shared_folders(data_dir)
    built = built_from(data_dir)
    path = (
        mixture_path(mixture_name)
        if mixture_name
        else Path(built.get("mixture", "its mixture file"))
    )
    if not path.is_file():
        raise UserError(
            f"{path}: not there, and {data_dir} was built from it; say where it is with --mixture "
            "FILE"
        )
    if not mixture_name:
        print(f"repairing by {path}, as {data_dir / BUILD_NAME} says")
    tokenizer_dir = Path(built["tokenizer"]) if "tokenizer" in built else None
    is_own_good = tokenizer_sha256(data_dir / TOKENIZER_NAME) == manifest.tokenizer_sha256
    mixture = load_mixture(path, data_dir / TOKENIZER_NAME if is_own_good else tokenizer_dir)
    threads = len(os.sched_getaffinity(0))
    tokenizer = load_tokenizer(mixture.tokenizer_dir, prefer="gigatoken", threads=threads)
    # its own copy is the one even where an earlier version kept an `auto_map` in it, which loading
    # leaves out
    if not is_own_good and tokenizer.sha256 != manifest.tokenizer_sha256:
        raise UserError(
            f"{tokenizer.directory}: not the tokenizer that made {data_dir}; bring that one back"
        )
    if not is_own_good:
        write_tokenizer(data_dir, tokenizer)
    plan = make_plan(mixture, tokenizer, None, data_dir)
    names = {shard.path for shard in bad}
    units = [unit for unit in plan.units if names & {shard_path(split, unit) for split in SPLITS}]
    with tempfile.TemporaryDirectory(prefix="repair.", dir=data_dir) as scratch:
        builder = UnitBuilder(
            output_dir=Path(scratch), tokenizer=tokenizer, prefer="gigatoken", threads=threads,
            validation_fraction=manifest.validation_fraction,
        )  # fmt: skip
        builder.build(units, Progress(Communicator(), sum(unit.size_bytes for unit in units)))
        for shard in bad:
            for name, digest in shard.digests.items():
                if not Path(scratch, name).is_file() or digest_file(Path(scratch, name)) != digest:
                    where = (
                        f"{shard.inputs[0]}: rows {shard.first_row} to "
                        f"{shard.first_row + shard.rows - 1}"
                    )
                    raise UserError(
                        f"{where}: not the text any more that {shard.path} was made of; bring it "
                        "back"
                    )
        for name in sorted({name for shard in bad for name in shard.digests}):
            write_durably(data_dir / name, Path(scratch, name).read_bytes())
            print(f"repaired: {data_dir / name}")


def built_from(data_dir: Path) -> dict[str, str]:
    """The paths of mixture and tokenizer that build.json tells; only those that are such, as it
    may be damaged.
    """
    told: Any = None
    with contextlib.suppress(OSError, UserError):
        told = parse_json((data_dir / BUILD_NAME).read_bytes(), BUILD_NAME, "")
    paths = (
        {key: told.get(key) for key in ("mixture", "tokenizer")} if isinstance(told, dict) else {}
    )
    return {
        key: path
        for key, path in paths.items()
        if isinstance(path, str) and path.isprintable() and path[:1] == "/"
    }


def check_index(data_dir: Path, shard: Shard) -> Offsets:
    """The index is as the manifest says, and its rows lie in the unit, in order; returns the
    documents' starts.
    """
    path = data_dir / shard.index_path
    index = open_array(data_dir, shard.index_path, INDEX_DTYPE, (shard.documents, 2))
    if digest_file(path) != shard.index_xxh3_128:
        raise UserError(f"{path}: its xxh3-128 is not the manifest's")
    rows = index[:, 1].astype(np.int64)
    if not len(rows) or rows[0] < 0 or rows[-1] >= shard.rows or (np.diff(rows) <= 0).any():
        raise UserError(f"{path}: rows are not increasing within 0 to {shard.rows - 1}")
    return index[:, 0].astype(np.int64)


def check_tokens(data_dir: Path, manifest: Manifest, shard: Shard, starts: Offsets | None) -> None:
    """The ids are as the manifest says, below vocab_size, and documents end where a good index
    says.
    """
    path = data_dir / shard.path
    # it is of that kind and shape
    open_array(data_dir, shard.path, TOKEN_DTYPE, (shard.tokens,))
    found = scan_tokens(path, manifest.eos_id)
    if found.xxh3_128 != shard.xxh3_128:
        raise UserError(f"{path}: its xxh3-128 is not the manifest's")
    if found.largest_id >= manifest.vocab_size:
        raise UserError(
            f"{path}: holds id {found.largest_id}, the vocabulary ends at {manifest.vocab_size - 1}"
        )
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
    """Read a shard once, in pieces that stay in the core's cache while they are digested and
    looked through.
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
    known = {
        MANIFEST_NAME,
        BUILD_NAME,
        LOCK_NAME,
        HOLDER_NAME,
        f"{TOKENIZER_NAME}/{CHAT_TEMPLATE_NAME}",
    }
    known.update(f"{TOKENIZER_NAME}/{name}" for name in TOKENIZER_FILES)
    known.update(path for shard in manifest.shards for path in shard.digests)
    for path in sorted(path for path in data_dir.rglob("*") if path.is_file()):
        name = path.relative_to(data_dir).as_posix()
        if name not in known and not (name.startswith(f"{UNITS_NAME}/") and name.endswith(".json")):
            yield f"{path}: not part of the data set; remove it"


if __name__ == "__main__":
    sys.exit(exit_code(main))

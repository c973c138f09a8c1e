"""Build a data set of token shards from a mixture of sources; alone or under `mpiexec -n N`.

The inputs are cut into work units, dealt out to the ranks by size, encoded, and written; rank 0 then
writes the manifest, last. The shards depend on inputs, tokenizer and mixture alone: the same bits come
from any number of ranks and from either encoder.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.corpus import UNIT_BYTES, WorkUnit, cut_units, find_files
from data_prep.encode import LoadedTokenizer, load_tokenizer, new_encoder
from data_prep.errors import CommandParser, UserError, exit_code
from data_prep.mixture import Mixture, load_mixture
from data_prep.ranks import Communicator, Progress, abort_on_defect, connect, together
from data_prep.shards import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_FILES,
    TOKENIZER_NAME,
    Manifest,
    Shard,
    ShardReader,
    Source,
    fsync_directory,
    integer_shares,
    load_manifest,
    tokenizer_sha256,
    write_durably,
)
from data_prep.unit_shards import UnitBuilder, UnitResult, shard_path

BUILD_NAME = "build.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be built, from what."""

    mixture: Mixture
    tokenizer_dir: Path
    units: tuple[WorkUnit, ...]
    signature: str  # of inputs, tokenizer and mixture as they lie on this machine


def main(argv: list[str] | None = None) -> None:
    """The command."""
    arguments = parse_arguments(argv)
    comm, local_ranks = connect()
    threads = max(1, len(os.sched_getaffinity(0)) // local_ranks)
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    with abort_on_defect(comm):
        build(arguments, comm, threads)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(
        prog="python -m data_prep.build_shards",
        description="Encode a mixture of sources into a data set of uint16 token shards.",
        epilog="On many cores or machines: mpiexec -n N python -m data_prep.build_shards ... (same output).",
    )
    parser.add_argument("--mixture", type=Path, required=True, help="mixture file; see data_prep/mixtures/example.yaml")
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="the data set; new, or an unfinished build of it"
    )
    parser.add_argument(
        "--encoder",
        choices=("gigatoken", "tokenizers"),
        default="gigatoken",
        help="both give the same ids (%(default)s)",
    )
    return parser.parse_args(argv)


def build(arguments: argparse.Namespace, comm: Communicator, threads: int) -> None:
    """Plan, encode, finish; every rank calls this."""
    started = time.perf_counter()
    output_dir: Path = arguments.output_dir
    plan: Plan = comm.bcast(together(comm, lambda: make_plan(arguments.mixture) if comm.rank == 0 else None))
    if comm.bcast(together(comm, lambda: comm.rank == 0 and is_complete(output_dir, plan))):
        if comm.rank == 0:
            print(f"already complete: {output_dir}, fingerprint {load_manifest(output_dir).fingerprint}")
        return
    tokenizer: LoadedTokenizer = together(comm, lambda: load_tokenizer(plan.tokenizer_dir))
    encoder = new_encoder(tokenizer, prefer=arguments.encoder, parallel=threads > 1)
    together(comm, lambda: prepare_directory(output_dir, plan) if comm.rank == 0 else None)
    if encoder.fallback_reason and comm.rank == 0:
        print(f"note: {encoder.fallback_reason}; encoding with {encoder.name}, slower, same output", file=sys.stderr)
    builder = UnitBuilder(
        output_dir=output_dir, tokenizer=tokenizer, encoder=encoder,
        validation_fraction=plan.mixture.validation_fraction,
    )  # fmt: skip
    progress = Progress(comm, sum(unit.size_bytes for unit in plan.units))

    def work() -> list[UnitResult]:
        try:
            return builder.build(assign(plan.units, comm.size)[comm.rank], progress)
        finally:
            progress.finish()

    results = [result for part in comm.allgather(together(comm, work)) for result in part]
    facts = {"encoder": encoder.name, "ranks": comm.size, "threads_per_rank": threads, "started": started}
    together(comm, lambda: finish(output_dir, plan, tokenizer, results, facts) if comm.rank == 0 else None)


def make_plan(mixture_path: Path) -> Plan:
    """Read the mixture, find its files, cut them into units. Nothing is written."""
    mixture = load_mixture(mixture_path)
    tokenizer_dir = mixture.base / mixture.tokenizer
    units: list[WorkUnit] = []
    for source in mixture.sources:
        files = find_files(mixture.base, source.path, f"{mixture_path}: source {source.name!r}")
        if not any((mixture.base / name).stat().st_size for name in files):
            raise UserError(f"{mixture_path}: source {source.name!r}: {source.path} is empty; check it or leave it out")
        units += cut_units(mixture.base, files, source=source.name, format=source.format, text_field=source.text_field)
    files_seen = [(unit.input, unit.path.stat().st_size, unit.path.stat().st_mtime_ns) for unit in units]
    about = [
        FORMAT_VERSION,
        UNIT_BYTES,
        repr(mixture.sources),
        mixture.validation_fraction,
        tokenizer_sha256(tokenizer_dir),
        files_seen,
    ]
    signature = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    return Plan(mixture=mixture, tokenizer_dir=tokenizer_dir, units=tuple(units), signature=signature)


def is_complete(output_dir: Path, plan: Plan) -> bool:
    """Whether this very data set is there already. Raises UserError if something else is."""
    elsewhere = "choose another --output-dir, or remove that one"
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return False
    try:
        signature = json.loads((output_dir / BUILD_NAME).read_bytes())["signature"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{output_dir}: exists, and is not a data set of this command; {elsewhere}") from None
    if not (output_dir / MANIFEST_NAME).exists():
        return False
    if signature != plan.signature:
        raise UserError(
            f"{output_dir}: holds a data set of another mixture or tokenizer, or of inputs that were of another size "
            f"or changed at another time; {elsewhere}"
        )
    ShardReader(output_dir).check_files()
    return True


def prepare_directory(output_dir: Path, plan: Plan) -> None:
    """An output directory without shards, that says what is being built in it."""
    shutil.rmtree(output_dir / "shards", ignore_errors=True)
    try:
        write_json(output_dir / BUILD_NAME, {"state": "incomplete", "signature": plan.signature})
        for name in TOKENIZER_FILES:
            (output_dir / TOKENIZER_NAME / name).unlink(missing_ok=True)
            if (plan.tokenizer_dir / name).is_file():
                write_durably(output_dir / TOKENIZER_NAME / name, (plan.tokenizer_dir / name).read_bytes())
    except OSError as error:
        raise UserError(f"{output_dir}: can't be written ({error.strerror}); choose another --output-dir") from None


def assign(units: tuple[WorkUnit, ...], ranks: int) -> list[list[WorkUnit]]:
    """Units of each rank: largest first to the least loaded, each rank's in the order of the plan."""
    loads = [0] * ranks
    owner: dict[int, int] = {}
    for i in sorted(range(len(units)), key=lambda i: (-units[i].size_bytes, i)):
        owner[i] = loads.index(min(loads))
        loads[owner[i]] += units[i].size_bytes
    return [[unit for i, unit in enumerate(units) if owner[i] == rank] for rank in range(ranks)]


def finish(
    output_dir: Path, plan: Plan, tokenizer: LoadedTokenizer, results: list[UnitResult], facts: dict[str, Any]
) -> None:
    """Check the whole, write build.json and, last, the manifest; print the summary."""
    manifest = make_manifest(plan, tokenizer, results)
    check_documents(manifest)
    for directory in (output_dir / "shards", *(output_dir / "shards").glob("*")):
        fsync_directory(directory)
    seconds = time.perf_counter() - facts.pop("started")
    about = {
        "state": "complete",
        "signature": plan.signature,
        "fingerprint": manifest.fingerprint,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "seconds": round(seconds, 3),
        "mb_per_s": round(sum(shard.text_bytes for shard in manifest.shards) / 1e6 / seconds, 2),
        "empty_documents": sum(result.empty_documents for result in results),
        "versions": {name: version(name) for name in ("numpy", "pyarrow", "tokenizers")},
        **facts,
    }
    write_json(output_dir / BUILD_NAME, about)
    write_durably(output_dir / MANIFEST_NAME, manifest.to_bytes())
    print(summary(output_dir, manifest, about))


def make_manifest(plan: Plan, tokenizer: LoadedTokenizer, results: list[UnitResult]) -> Manifest:
    """The manifest, from the finished units in any order."""
    mixture = plan.mixture
    shares = integer_shares([source.weight for source in mixture.sources])
    sources = tuple(
        Source(
            name=source.name, share=share, weight=source.weight, origin=source.path, format=source.format,
            text_field=source.text_field, revision=None, license=source.license,
        )
        for source, share in zip(mixture.sources, shares, strict=True)
    )  # fmt: skip
    shards = shards_in_order(plan.units, results)
    return Manifest(
        vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, eos_token=tokenizer.eos_token,
        tokenizer_sha256=tokenizer.sha256, validation_fraction=mixture.validation_fraction, sources=sources,
        shards=tuple(shard for split in SPLITS for shard in shards if shard.split == split),
    )  # fmt: skip


def shards_in_order(units: tuple[WorkUnit, ...], results: list[UnitResult]) -> list[Shard]:
    """Every shard in the order of the plan; rows of a file are counted through its units."""
    by_name = {(result.unit.source, result.unit.name): result for result in results}
    rows_before: dict[tuple[str, str], int] = {}
    shards = []
    for unit in units:
        result = by_name[unit.source, unit.name]
        first_row = rows_before.get((unit.source, unit.input), 0)
        rows_before[unit.source, unit.input] = first_row + result.rows
        for shard in result.shards:
            place: dict[str, Any] = {"source": unit.source, "path": shard_path(shard.split, unit), "input": unit.input}
            shards.append(Shard(**vars(shard), **place, first_row=first_row, rows=result.rows))
    return shards


def check_documents(manifest: Manifest) -> None:
    """Every source has something to train on, and something is held out."""
    for source in manifest.sources:
        if not any(shard.source == source.name for shard in manifest.shards):
            raise UserError(f"source {source.name!r}: no documents in {source.origin}; check its files or leave it out")
        if not manifest.shards_of("train", source.name):
            raise UserError(f"source {source.name!r}: no training documents; lower validation_fraction or add text")
    if not manifest.shards_of("validation"):
        documents = sum(shard.documents for shard in manifest.shards)
        fraction = manifest.validation_fraction
        advice = f"with {documents:,} documents, try validation_fraction: {min(0.5, 5 / documents):.2g}"
        raise UserError(f"no document fell into validation at validation_fraction {fraction}; {advice}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A small JSON file, durably."""
    write_durably(path, (json.dumps(content, indent=1) + "\n").encode())


def summary(output_dir: Path, manifest: Manifest, about: dict[str, Any]) -> str:
    """What a person wants to know after a build."""
    lines = []
    for split in SPLITS:
        shards = manifest.shards_of(split)
        tokens, documents = manifest.tokens(split), sum(shard.documents for shard in shards)
        per_token = sum(shard.text_characters for shard in shards) / max(tokens - documents, 1)
        lines.append(
            f"{split:<12} {documents:>12,} documents {tokens:>16,} tokens {per_token:>6.2f} characters per token"
        )
    if about["empty_documents"]:
        lines.append(f"left out     {about['empty_documents']:>12,} empty documents")
    lines.append(f"encoded      {about['mb_per_s']:,} MB/s of text with {about['encoder']}, {about['seconds']:.1f} s")
    lines.append(f"fingerprint  {manifest.fingerprint}")
    lines.append(f"data set     {output_dir}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_code(main))

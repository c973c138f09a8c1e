"""Build a data set of token shards from a mixture of sources; alone or under `mpiexec -n N`.

The inputs are cut into work units, dealt out to the ranks by size, encoded, and written; rank 0
then writes the manifest, last. The shards depend on inputs, tokenizer and mixture alone: the same
bits come from any number of ranks and from either encoder.
"""

import argparse
import contextlib
import datetime
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.building.build_plan import Plan, assign, make_plan
from data_prep.building.left_out import check_left_out
from data_prep.building.manifest_of_build import (
    Results,
    check_documents,
    check_loss,
    finished,
    make_manifest,
)
from data_prep.building.mixture import Mixture, load_mixture, mixture_path
from data_prep.building.output_dir import (
    BUILD_NAME,
    is_complete,
    prepare_directory,
    remove_strays,
    write_json,
)
from data_prep.building.ranks import Communicator, Progress, connect, together
from data_prep.building.unit_records import writing
from data_prep.building.unit_shards import UnitBuilder
from data_prep.commands import CommandParser, exit_code, large_number
from data_prep.errors import printable
from data_prep.files import fsync_directory, write_durably
from data_prep.locks import LOCK_NAME
from data_prep.manifest import (
    MANIFEST_NAME,
    load_manifest,
)
from data_prep.shards import ShardReader
from data_prep.tokenizer.load import LoadedTokenizer, load_tokenizer
from data_prep.view.one_input import warning_of_one_input
from data_prep.view.summary import describe, print_epochs

ENCODERS = ("gigatoken", "tokenizers")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    about = "Encode a mixture of sources into a data set of uint16 token shards."
    more = (
        "On many cores or machines: mpiexec -n N python -m data_prep.build_shards ... (same "
        "output)."
    )
    parser = CommandParser(prog="python -m data_prep.build_shards", description=about, epilog=more)
    parser.add_argument(
        "--mixture",
        required=True,
        metavar="NAME_OR_FILE",
        help="one of data_prep/mixtures, or a file",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="a tokenizer in place of the mixture's"
    )
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="new, or an unfinished build of the same"
    )
    parser.add_argument(
        "--encoder",
        choices=ENCODERS,
        default=ENCODERS[0],
        help="both give the same ids (%(default)s)",
    )
    parser.add_argument(
        "--train-tokens",
        type=large_number,
        metavar="N",
        help="say how often a run sees each source",
    )
    build(parser.parse_args(argv), *connect())


def build(arguments: argparse.Namespace, comm: Communicator, threads: int) -> None:
    """Plan, encode, finish; every rank calls this."""
    began = time.perf_counter()
    output_dir: Path = arguments.output_dir
    mixture: Mixture = together(
        comm, lambda: load_mixture(mixture_path(arguments.mixture), arguments.tokenizer)
    )
    tokenizer: LoadedTokenizer = together(
        comm,
        lambda: load_tokenizer(mixture.tokenizer_dir, prefer=arguments.encoder, threads=threads),
    )
    planned = together(
        comm, lambda: make_plan(mixture, tokenizer, output_dir) if comm.rank == 0 else None
    )
    plan: Plan = comm.bcast(planned)
    if comm.bcast(together(comm, lambda: comm.rank == 0 and is_complete(output_dir, plan))):
        if comm.rank == 0:
            print(
                f"already complete: {output_dir}, fingerprint "
                f"{load_manifest(output_dir).fingerprint}"
            )
    else:
        held = together(
            comm, lambda: prepare_directory(output_dir, plan, tokenizer) if comm.rank == 0 else None
        )
        with held or contextlib.nullcontext():
            builder = UnitBuilder(
                output_dir=output_dir,
                tokenizer=tokenizer,
                prefer=arguments.encoder,
                threads=threads,
                validation_fraction=plan.mixture.validation_fraction,
            )
            results = build_units(builder, plan, comm)
            facts = {
                "encoder": builder.encoder.name,
                "ranks": comm.size,
                "threads_per_rank": threads,
                "started": began,
            }
            facts |= {
                "mixture": str(mixture.path.absolute()),
                "tokenizer": str(mixture.tokenizer_dir.absolute()),
            }
            together(
                comm,
                lambda: (
                    finish(output_dir, plan, tokenizer, results, facts) if comm.rank == 0 else None
                ),
            )
            if held:
                (output_dir / LOCK_NAME).unlink()
    if comm.rank == 0:
        print_epochs(load_manifest(output_dir), arguments.train_tokens)


def build_units(builder: UnitBuilder, plan: Plan, comm: Communicator) -> Results:
    """Build every unit that isn't there yet; results by record path. Every rank calls this."""
    encoder = builder.encoder
    notes = list(builder.tokenizer.notes)
    if encoder.fallback_reason:
        notes.append(
            f"{encoder.fallback_reason}; encoding with {encoder.name}, slower, same output"
        )
    for note in notes if comm.rank == 0 else ():
        print(f"note: {printable(note)}", file=sys.stderr)
    progress = Progress(comm, sum(unit.size_bytes for unit in plan.units))
    units = assign(plan.units, comm.size)[comm.rank]
    parts = comm.allgather(together(comm, lambda: builder.build(units, progress)))
    return {path: result for part in parts for path, result in part.items()}


def finish(
    output_dir: Path,
    plan: Plan,
    tokenizer: LoadedTokenizer,
    results: Results,
    facts: dict[str, Any],
) -> None:
    """Check the whole, write build.json and, last, the manifest; print the summary."""
    check_left_out(finished(plan, results), plan.mixture.max_bad_fraction)
    manifest = make_manifest(plan, tokenizer, results)
    check_documents(manifest)
    check_loss(manifest, plan.mixture)
    remove_strays(
        output_dir, {path for shard in manifest.shards for path in shard.digests} | results.keys()
    )
    for directory in (output_dir / "shards", *(output_dir / "shards").glob("*")):
        fsync_directory(directory)
    seconds = time.perf_counter() - facts.pop("started")
    about = {
        "state": "complete",
        **plan.identity,
        "fingerprint": manifest.fingerprint,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "seconds": round(seconds, 3),
        "mb_per_s": round(sum(shard.text_bytes for shard in manifest.shards) / 1e6 / seconds, 2),
        "versions": {name: version(name) for name in ("numpy", "pyarrow", "tokenizers")},
        **facts,
    }
    with writing(output_dir, "the manifest"):
        write_json(output_dir / BUILD_NAME, about)
        write_durably(output_dir / MANIFEST_NAME, manifest.to_bytes())
    print(printable(describe(output_dir, manifest)))
    for kind in ("empty", "bad"):
        if left_out := sum(getattr(source, f"{kind}_documents") for source in manifest.sources):
            print(f"left out     {left_out:>12,} {kind} documents")
    if warning := warning_of_one_input(ShardReader(output_dir), tokenizer.by_reference):
        print(f"warning: {warning}", file=sys.stderr)
    print(
        f"encoded      {about['mb_per_s']:,} MB/s of text with {about['encoder']}, "
        f"{about['seconds']:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))

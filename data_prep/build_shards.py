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
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

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
from data_prep.building.ranks import Communicator, Progress, connect, on_first, together
from data_prep.building.unit_records import writing
from data_prep.building.unit_shards import UnitBuilder
from data_prep.commands import CommandParser, exit_code, large_number
from data_prep.errors import printable
from data_prep.files import fsync_directory, write_durably
from data_prep.layout import SHARDS_NAME
from data_prep.locks import LOCK_NAME
from data_prep.manifest import MANIFEST_NAME, Manifest, load_manifest
from data_prep.shards import ShardReader
from data_prep.tokenizer.load import LoadedTokenizer, load_tokenizer
from data_prep.view.one_input import warning_of_one_input
from data_prep.view.summary import describe, print_epochs

ENCODERS = ("gigatoken", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A build, as each rank has it."""

    output_dir: Path
    mixture: Mixture
    tokenizer: LoadedTokenizer
    plan: Plan
    comm: Communicator
    threads: int  # of each rank
    encoder: str  # that is asked for
    began: float  # by time.perf_counter


def main(argv: list[str] | None = None) -> None:
    """The command."""
    arguments = parse_arguments(argv)
    comm, threads = connect()
    build(arguments, comm, threads)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """What the command line says."""
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
    return parser.parse_args(argv)


def build(arguments: argparse.Namespace, comm: Communicator, threads: int) -> None:
    """Plan, encode, finish; every rank calls this."""
    job = plan_job(arguments, comm, threads)
    output_dir = job.output_dir
    if comm.bcast(on_first(comm, lambda: is_complete(output_dir, job.plan))):
        if comm.rank == 0:
            fingerprint = load_manifest(output_dir).fingerprint
            print(f"already complete: {output_dir}, fingerprint {fingerprint}")
    else:
        run(job)
    if comm.rank == 0:
        print_epochs(load_manifest(output_dir), arguments.train_tokens)


def plan_job(arguments: argparse.Namespace, comm: Communicator, threads: int) -> Job:
    """Read mixture and tokenizer on every rank; the first lists the inputs, for all."""
    began = time.perf_counter()

    def load_named_mixture() -> Mixture:
        return load_mixture(mixture_path(arguments.mixture), arguments.tokenizer)

    mixture = together(comm, load_named_mixture)

    def load_its_tokenizer() -> LoadedTokenizer:
        return load_tokenizer(mixture.tokenizer_dir, prefer=arguments.encoder, threads=threads)

    tokenizer = together(comm, load_its_tokenizer)
    output_dir: Path = arguments.output_dir
    plan: Plan = comm.bcast(on_first(comm, lambda: make_plan(mixture, tokenizer, output_dir)))
    return Job(
        output_dir=output_dir,
        mixture=mixture,
        tokenizer=tokenizer,
        plan=plan,
        comm=comm,
        threads=threads,
        encoder=arguments.encoder,
        began=began,
    )


def run(job: Job) -> None:
    """Build all units and finish, while the first rank holds the directory."""
    comm = job.comm
    held = on_first(comm, lambda: prepare_directory(job.output_dir, job.plan, job.tokenizer))
    with held or contextlib.nullcontext():
        builder = UnitBuilder(
            output_dir=job.output_dir,
            tokenizer=job.tokenizer,
            prefer=job.encoder,
            threads=job.threads,
            validation_fraction=job.plan.mixture.validation_fraction,
        )
        results = build_units(builder, job)
        on_first(comm, lambda: finish(job, results, builder.encoder.name))
        if held:
            (job.output_dir / LOCK_NAME).unlink()


def build_units(builder: UnitBuilder, job: Job) -> Results:
    """Build every unit that isn't there yet; results by record path. Every rank calls this."""
    comm = job.comm
    encoder = builder.encoder
    notes = list(builder.tokenizer.notes)
    if encoder.fallback_reason:
        slower = f"encoding with {encoder.name}, slower, same output"
        notes.append(f"{encoder.fallback_reason}; {slower}")
    if comm.rank == 0:
        for note in notes:
            print(f"note: {printable(note)}", file=sys.stderr)
    progress = Progress(comm, sum(unit.size_bytes for unit in job.plan.units))
    units = assign(job.plan.units, comm.size)[comm.rank]
    own_results = together(comm, lambda: builder.build(units, progress))
    results: Results = {}
    for part in comm.allgather(own_results):
        results |= part
    return results


def finish(job: Job, results: Results, encoder_name: str) -> None:
    """Check the whole, write build.json and, last, the manifest; print the summary."""
    output_dir = job.output_dir
    units = finished(job.plan, results)
    check_left_out(units, job.plan.mixture.max_bad_fraction)
    manifest = make_manifest(job.plan, job.tokenizer, units)
    check_documents(manifest)
    check_loss(manifest, job.plan.mixture)
    remove_strays(output_dir, results.keys() | set(manifest.paths()))
    shards_dir = output_dir / SHARDS_NAME
    fsync_directory(shards_dir)
    for split_dir in shards_dir.glob("*"):
        fsync_directory(split_dir)
    seconds = time.perf_counter() - job.began
    text_bytes = sum(shard.text_bytes for shard in manifest.shards)
    mb_per_s = round(text_bytes / 1e6 / seconds, 2)
    about = {
        "state": "complete",
        **asdict(job.plan.identity),
        "fingerprint": manifest.fingerprint,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "seconds": round(seconds, 3),
        "mb_per_s": mb_per_s,
        "versions": {name: version(name) for name in ("numpy", "pyarrow", "tokenizers")},
        "encoder": encoder_name,
        "ranks": job.comm.size,
        "threads_per_rank": job.threads,
        "mixture": str(job.mixture.path.absolute()),
        "tokenizer": str(job.mixture.tokenizer_dir.absolute()),
    }
    with writing(output_dir, "the manifest"):
        write_json(output_dir / BUILD_NAME, about)
        write_durably(output_dir / MANIFEST_NAME, manifest.to_bytes())
    print_summary(output_dir, manifest, job.tokenizer)
    print(f"encoded      {mb_per_s:,} MB/s of text with {encoder_name}, {seconds:.1f} s")


def print_summary(output_dir: Path, manifest: Manifest, tokenizer: LoadedTokenizer) -> None:
    """The data set in numbers, what was left out of it, and what harms a run on it."""
    print(printable(describe(output_dir, manifest)))
    left_out = {
        "empty": sum(source.empty_documents for source in manifest.sources),
        "bad": sum(source.bad_documents for source in manifest.sources),
    }
    for kind, documents in left_out.items():
        if documents:
            print(f"left out     {documents:>12,} {kind} documents")
    if warning := warning_of_one_input(ShardReader(output_dir), tokenizer.by_reference):
        print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(exit_code(main))

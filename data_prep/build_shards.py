"""Build a data set of token shards from a mixture of sources; alone or under `mpiexec -n N`.

The inputs are cut into work units, dealt out to the ranks by size, encoded, and written; rank 0
then writes the manifest, last. The shards depend on inputs, tokenizer and mixture alone: the same
bits come from any number of ranks and from either encoder.
"""

import argparse
import contextlib
import datetime
import json
import platform
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep import layout, shards
from data_prep.building.left_out import Finished, bad_documents, check_left_out, first_rows
from data_prep.building.mixture import Mixture, Plan, assign, load_mixture, make_plan, mixture_path
from data_prep.building.one_input import warning_of_one_input
from data_prep.building.ranks import Communicator, Progress, connect, together
from data_prep.building.unit_shards import UnitBuilder, UnitResult, record_path, shard_path, writing
from data_prep.errors import (
    CommandParser,
    UserError,
    exit_code,
    explained,
    large_number,
    parse_json,
    printable,
)
from data_prep.formats.work_unit import WorkUnit
from data_prep.shards import (
    NO_LOSS,
    SPLITS,
    BadDocument,
    Manifest,
    Shard,
    ShardReader,
    Source,
    TokenizerLoss,
    load_manifest,
    write_durably,
)
from data_prep.show import describe, print_epochs
from data_prep.tokenizer.load import LoadedTokenizer, load_tokenizer

BUILD_NAME = "build.json"
ENCODERS = ("gigatoken", "tokenizers")
BAD_DOCUMENTS_LISTED = 1_000  # of each source
MAX_UNKNOWN_SHARE = 0.01  # of the sampled tokens

Results = dict[str, UnitResult]  # of the units, by record path


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
                (output_dir / shards.LOCK_NAME).unlink()
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


def is_complete(output_dir: Path, plan: Plan) -> bool:
    """Whether this very data set is there already. Raises UserError if something else is."""
    elsewhere = "choose another --output-dir, or remove that one"
    begun = {
        shards.LOCK_NAME,
        shards.HOLDER_NAME,
        f"{BUILD_NAME}.tmp",
    }  # all that a build leaves if it is killed as it begins
    if not output_dir.exists() or (
        output_dir.is_dir() and {path.name for path in output_dir.iterdir()} <= begun
    ):
        return False
    other = f"{output_dir}: exists, and is not a data set of this command"
    with explained((OSError, ValueError, KeyError, TypeError), other, elsewhere):
        built = parse_json((output_dir / BUILD_NAME).read_bytes(), other, elsewhere)
        if built["state"] not in ("incomplete", "complete"):
            raise ValueError(f"{BUILD_NAME} is of something else")
        signature, origins = built["signature"], list(built.get("origins", []))
    is_of_tokenizer = built.get("tokenizer_sha256") == plan.identity["tokenizer_sha256"]
    is_akin = is_of_tokenizer and any(origin in origins for origin in plan.identity["origins"])
    if not (output_dir / shards.MANIFEST_NAME).exists():
        if not is_akin and any((output_dir / shards.UNITS_NAME).glob("*/*.json")):
            raise UserError(
                f"{output_dir}: holds finished units of another mixture or tokenizer; {elsewhere}"
            )
        return False
    if signature != plan.identity["signature"]:
        other = (
            "holds a data set of another mixture or tokenizer, or of inputs of another size or "
            "time of change"
        )
        anew = f"; to build it anew here, in place of what is there, {shards.REBUILD}"
        fingerprint = load_manifest(output_dir).fingerprint
        anew += (
            f": where the text is another one now, that loses {fingerprint}, and runs on it can't "
            "be resumed"
        )
        raise UserError(f"{output_dir}: {other}; {elsewhere}{anew * is_akin}")
    ShardReader(output_dir).check_files()
    return True


def prepare_directory(output_dir: Path, plan: Plan, tokenizer: LoadedTokenizer) -> shards.Lock:
    """The output directory says what is being built in it, and is held. Finished units of an
    earlier build stay.
    """
    refuse_shared_folders(output_dir)
    with writing(output_dir, "the tokenizer"):
        held = shards.lock(output_dir, "building or repairing it", "--output-dir")
        write_json(output_dir / BUILD_NAME, {"state": "incomplete", **plan.identity})
        write_tokenizer(output_dir, tokenizer)
    return held


def refuse_shared_folders(data_dir: Path) -> None:
    """A folder of the data set that is a link may lead to a larger disk, but not into another data
    set: what is written or removed here would be that one's.
    """
    for name in (layout.SHARDS_NAME, shards.UNITS_NAME, shards.TOKENIZER_NAME):
        folder = data_dir / name
        home = folder.resolve().parent
        if folder.is_symlink() and home != data_dir.resolve() and (home / BUILD_NAME).exists():
            raise UserError(
                f"{folder}: is a link into another data set, {home}; remove it, or copy what it "
                "leads to"
            )


def write_tokenizer(output_dir: Path, tokenizer: LoadedTokenizer) -> None:
    """The copy of the tokenizer beside the shards. A link there goes, its target stays, and so
    do files not ours.
    """
    directory = output_dir / shards.TOKENIZER_NAME
    if directory.is_symlink():
        directory.unlink()
    for name in {*shards.TOKENIZER_FILES, shards.CHAT_TEMPLATE_NAME} - tokenizer.files.keys():
        (directory / name).unlink(missing_ok=True)
    for name, content in tokenizer.files.items():
        write_durably(directory / name, content)


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
        shards.fsync_directory(directory)
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
        write_durably(output_dir / shards.MANIFEST_NAME, manifest.to_bytes())
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


def remove_strays(output_dir: Path, known: set[str]) -> None:
    """Remove what earlier builds left of units that are no longer part of the data set.

    Nothing that builds don't write is removed, and nothing behind a link; `verify` names what else
    is there.
    """
    for name in (layout.SHARDS_NAME, shards.UNITS_NAME):
        folder = output_dir / name
        for path in [] if folder.is_symlink() else sorted(folder.rglob("*")):
            place = path.relative_to(output_dir).as_posix()
            if path.is_file() and place not in known and layout.is_written_by_builds(place):
                path.unlink()


def finished(plan: Plan, results: Results) -> list[tuple[WorkUnit, UnitResult]]:
    """The units in the order of the plan, and what they gave."""
    return [(unit, results[record_path(unit)]) for unit in plan.units]


def make_manifest(plan: Plan, tokenizer: LoadedTokenizer, results: Results) -> Manifest:
    """The manifest, from the finished units by record path."""
    shares = shards.integer_shares([source.weight for source in plan.mixture.sources])
    units = finished(plan, results)
    losses = losses_of_sources(units)
    sources = tuple(
        Source(
            **about,
            share=share,
            empty_documents=sum(
                result.empty_documents for unit, result in units if unit.source == about["name"]
            ),
            bad_documents=sum(
                len(result.bad_documents) for unit, result in units if unit.source == about["name"]
            ),
            loss=losses.get(about["name"]),
        )
        for about, share in zip(plan.sources, shares, strict=True)
    )
    ordered, bad = shards_in_order(units)
    return Manifest(
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        eos_token=tokenizer.eos_token,
        tokenizer_sha256=tokenizer.sha256,
        special_tokens=tokenizer.special_tokens,
        validation_fraction=plan.mixture.validation_fraction,
        sources=sources,
        shards=tuple(shard for split in SPLITS for shard in ordered if shard.split == split),
        bad_documents=tuple(bad),
    )


def losses_of_sources(units: list[tuple[WorkUnit, UnitResult]]) -> dict[str, TokenizerLoss]:
    """What the tokenizer lost of each source's sampled documents; nothing, if it lost none of
    any.
    """
    losses = {unit.source: NO_LOSS for unit, _ in units}
    for unit, result in units:
        losses[unit.source] += result.loss or NO_LOSS
    return losses if any(losses.values()) else {}


def shards_in_order(units: Finished) -> tuple[list[Shard], list[BadDocument]]:
    """Every shard, and the first bad documents of each source, in the order of the plan; rows of a
    file are counted through its units.
    """
    ordered = []
    for (unit, result), first_row in zip(units, first_rows(units), strict=True):
        place: dict[str, Any] = {
            "source": unit.source,
            "inputs": tuple(file.name for file in unit.files),
        }
        place |= {"first_row": first_row, "rows": result.rows, "input_rows": result.input_rows}
        ordered += [
            Shard(**vars(facts), **place, path=shard_path(facts.split, unit))
            for facts in result.shards
        ]
    listed: Counter[str] = Counter()
    bad = []
    for document in bad_documents(units):
        if listed[document.source] < BAD_DOCUMENTS_LISTED:
            bad.append(document)
            listed[document.source] += 1
    return ordered, bad


def check_documents(manifest: Manifest) -> None:
    """Every source has something to train on, and something is held out."""
    for source in manifest.sources:
        if not any(shard.source == source.name for shard in manifest.shards):
            first = next((f"; all are bad, the first: {b.input}, row {b.row}: {b.reason}" for b in
                          manifest.bad_documents if b.source == source.name), "")  # fmt: skip
            problem = f"source {source.name!r}: no documents in {source.origin}{first}"
            raise UserError(f"{problem}; check its files and format, or leave it out")
        if not manifest.shards_of("train", source.name):
            raise UserError(
                f"source {source.name!r}: no training documents; lower validation_fraction or add "
                "text"
            )
    if not manifest.shards_of("validation"):
        documents, fraction = (
            sum(shard.documents for shard in manifest.shards),
            manifest.validation_fraction,
        )
        advice = (
            f"with {documents:,} documents, try validation_fraction: {min(0.5, 5 / documents):.2g}"
        )
        raise UserError(
            f"no document fell into validation at validation_fraction {fraction}; {advice}"
        )


def check_loss(manifest: Manifest, mixture: Mixture) -> None:
    """Where too many tokens stand for text that the vocabulary lacks, the mixture must say that
    this is meant.
    """
    loss = manifest.loss
    if loss and loss.unknown_share > MAX_UNKNOWN_SHARE and not mixture.allow_lossy:
        limit = (
            f"at most {MAX_UNKNOWN_SHARE:.0%} may be, since bits per byte count none of that text"
        )
        advice = (
            "take a tokenizer that keeps all text, or set allow_lossy_tokenizer: true in "
            f"{mixture.path}"
        )
        raise UserError(
            f"{mixture.tokenizer_dir}: {loss}; {limit}; {advice}, and build again: finished units "
            "are kept"
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A small JSON file, durably."""
    write_durably(path, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(exit_code(main))

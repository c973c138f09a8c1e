"""The manifest of a finished build, from what its units gave; and whether one can train on it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from data_prep.building.build_plan import Plan
from data_prep.building.left_out import FinishedUnit, bad_documents, first_rows
from data_prep.building.mixture import Mixture
from data_prep.building.unit_records import UnitResult, record_path, shard_path
from data_prep.errors import UserError
from data_prep.layout import SPLITS
from data_prep.manifest import (
    NO_LOSS,
    BadDocument,
    Manifest,
    Shard,
    Source,
    TokenizerLoss,
    integer_shares,
)
from data_prep.tokenizer.load import LoadedTokenizer

BAD_DOCUMENTS_LISTED = 1_000  # of each source
MAX_UNKNOWN_SHARE = 0.01  # of the tokens
MAX_VALIDATION_FRACTION = 0.5  # that is advised
VALIDATION_DOCUMENTS = 5  # that are advised, at least about so many

Results = dict[str, UnitResult]  # of the units, by record path


def finished(plan: Plan, results: Results) -> list[FinishedUnit]:
    """The units in the order of the plan, and what they gave."""
    return [FinishedUnit(unit, results[record_path(unit)]) for unit in plan.units]


def make_manifest(
    plan: Plan, tokenizer: LoadedTokenizer, units: Sequence[FinishedUnit]
) -> Manifest:
    """The manifest of a build whose units are all finished; they come in the order of the plan."""
    shards = shards_in_order(units)
    return Manifest(
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        eos_token=tokenizer.eos_token,
        tokenizer_sha256=tokenizer.sha256,
        special_tokens=tokenizer.special_tokens,
        validation_fraction=plan.mixture.validation_fraction,
        sources=make_sources(plan, units),
        shards=tuple(shard for split in SPLITS for shard in shards if shard.split == split),
        bad_documents=first_bad_documents(units),
    )


def make_sources(plan: Plan, units: Sequence[FinishedUnit]) -> tuple[Source, ...]:
    """The sources with their shares, and what was left out or lost of each."""
    shares = integer_shares([source.weight for source in plan.mixture.sources])
    losses = losses_of_sources(units)
    empty: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    for unit, result in units:
        empty[unit.source] += result.empty_documents
        bad[unit.source] += len(result.bad_documents)
    sources = []
    for planned, share in zip(plan.sources, shares, strict=True):
        source = Source(
            **asdict(planned),
            share=share,
            empty_documents=empty[planned.name],
            bad_documents=bad[planned.name],
            loss=losses.get(planned.name),
        )
        sources.append(source)
    return tuple(sources)


def losses_of_sources(units: Sequence[FinishedUnit]) -> dict[str, TokenizerLoss]:
    """What the tokenizer lost of each source's documents; nothing, if it lost none of any."""
    losses = {unit.source: NO_LOSS for unit, _ in units}
    for unit, result in units:
        losses[unit.source] += result.loss or NO_LOSS
    return losses if any(losses.values()) else {}


def shards_in_order(units: Sequence[FinishedUnit]) -> list[Shard]:
    """Every shard, in the order of the plan; rows of a file are counted through its units."""
    ordered = []
    for (unit, result), first_row in zip(units, first_rows(units), strict=True):
        inputs = tuple(file.name for file in unit.files)
        for facts in result.shards:
            shard = Shard(
                **vars(facts),
                source=unit.source,
                path=shard_path(facts.split, unit),
                inputs=inputs,
                first_row=first_row,
                rows=result.rows,
                input_rows=result.input_rows,
            )
            ordered.append(shard)
    return ordered


def first_bad_documents(units: Sequence[FinishedUnit]) -> tuple[BadDocument, ...]:
    """The first bad documents of each source, in the order of the plan."""
    listed: Counter[str] = Counter()
    first = []
    for document in bad_documents(units):
        if listed[document.source] < BAD_DOCUMENTS_LISTED:
            listed[document.source] += 1
            first.append(document)
    return tuple(first)


def check_documents(manifest: Manifest) -> None:
    """Every source has something to train on, and something is held out."""
    filled = {shard.source for shard in manifest.shards}
    for source in manifest.sources:
        if source.name not in filled:
            raise _without_documents(manifest, source)
        if not manifest.shards_of("train", source.name):
            advice = "lower validation_fraction or add text"
            raise UserError(f"source {source.name!r}: no training documents; {advice}")
    if not manifest.shards_of("validation"):
        raise _without_validation(manifest)


def _without_documents(manifest: Manifest, source: Source) -> UserError:
    problem = f"source {source.name!r}: no documents in {source.origin}"
    for bad in manifest.bad_documents:
        if bad.source == source.name:
            problem += f"; all are bad, the first: {bad.input}, row {bad.row}: {bad.reason}"
            break
    return UserError(f"{problem}; check its files and format, or leave it out")


def _without_validation(manifest: Manifest) -> UserError:
    documents = sum(shard.documents for shard in manifest.shards)
    enough = min(MAX_VALIDATION_FRACTION, VALIDATION_DOCUMENTS / documents)
    fraction = manifest.validation_fraction
    problem = f"no document fell into validation at validation_fraction {fraction}"
    advice = f"with {documents:,} documents, try validation_fraction: {enough:.2g}"
    return UserError(f"{problem}; {advice}")


def check_loss(manifest: Manifest, mixture: Mixture) -> None:
    """Raise UserError where too many tokens stand for text that the vocabulary lacks.

    The mixture may say that this is meant.
    """
    loss = manifest.loss
    if mixture.allow_lossy or not loss or loss.unknown_share <= MAX_UNKNOWN_SHARE:
        return
    limit = f"at most {MAX_UNKNOWN_SHARE:.0%} may be, since bits per byte count none of that text"
    advice = (
        "take a tokenizer that keeps all text, or set allow_lossy_tokenizer: true in "
        f"{mixture.path}, and build again: finished units are kept"
    )
    raise UserError(f"{mixture.tokenizer_dir}: {loss}; {limit}; {advice}")

"""The manifest of a finished build, from the records of its units; and whether it is worth training on."""

from collections import Counter
from typing import Any

from data_prep.building.build_plan import Plan
from data_prep.building.left_out import Finished, bad_documents, first_rows
from data_prep.building.mixture import Mixture
from data_prep.building.unit_records import UnitResult, record_path, shard_path
from data_prep.errors import UserError
from data_prep.formats.work_unit import WorkUnit
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
MAX_UNKNOWN_SHARE = 0.01  # of the sampled tokens
Results = dict[str, UnitResult]  # of the units, by record path


def finished(plan: Plan, results: Results) -> list[tuple[WorkUnit, UnitResult]]:
    """The units in the order of the plan, and what they gave."""
    return [(unit, results[record_path(unit)]) for unit in plan.units]


def make_manifest(plan: Plan, tokenizer: LoadedTokenizer, results: Results) -> Manifest:
    """The manifest, from the finished units by record path."""
    shares = integer_shares([source.weight for source in plan.mixture.sources])
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

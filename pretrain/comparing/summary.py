"""From the figures of cells to what they show: means over seeds, differences, intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.errors import explained
from pretrain.comparing import significance
from pretrain.comparing.cells import Place, documents_of
from pretrain.comparing.comparison import Difference, Group, OverDocuments, OverSeeds, Treatment
from pretrain.comparing.matrix import Matrix, Settings, Value
from pretrain.comparing.measured import CellFigures
from pretrain.comparing.significance import (
    FEWEST_SEEDS,
    detectable_effect,
    figure_of,
    holm,
    paired_documents,
    paired_test,
    seeds_to_see,
    strictest_level,
)
from pretrain.evaluation.intervals import Interval

ONE_PERCENT = 0.01


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Treatment and baseline of one seed."""

    treatment: CellFigures
    baseline: CellFigures

    @property
    def difference(self) -> float:
        """Nats a target, the treatment's less the baseline's."""
        return self.treatment.loss - self.baseline.loss


def summarise(matrix: Matrix, place: Place, figures: Sequence[CellFigures]) -> list[Group]:
    """Each group whose cells have figures."""
    by_name = {cell.name: cell for cell in figures}
    groups = []
    for members in matrix.groups():
        there = [by_name[cell.name] for cell in members if cell.name in by_name]
        if there:
            groups.append(summarise_group(matrix, place, matrix.group_of(members[0]), there))
    return groups


def summarise_group(
    matrix: Matrix, place: Place, settings: Settings, figures: Sequence[CellFigures]
) -> Group:
    """One of them."""
    by_value: dict[Value, list[CellFigures]] = {}
    for cell in figures:
        value = cell.settings[matrix.treatment] if matrix.treatment else None
        by_value.setdefault(value, []).append(cell)
    treatments = [treatment_of(value, cells) for value, cells in by_value.items()]
    paired = {}
    if matrix.treatment is not None:
        paired = pairs_of(by_value, matrix.baseline)
    tests = tests_of(paired)
    differences = [
        difference_of(value, pairs, tests.get(value), place) for value, pairs in paired.items()
    ]
    return Group(
        settings=settings,
        train_tokens=figures[0].train_tokens,
        parameters=figures[0].parameters_without_table,
        treatments=tuple(treatments),
        differences=tuple(differences),
    )


def pairs_of(by_value: dict[Value, list[CellFigures]], baseline: Value) -> dict[Value, list[Pair]]:
    """Of each treatment, the cells whose seed the baseline has too; none of those without any."""
    baselines = {cell.seed: cell for cell in by_value.get(baseline, [])}
    paired = {}
    for value, cells in by_value.items():
        if value == baseline:
            continue
        pairs = [
            Pair(treatment=cell, baseline=baselines[cell.seed])
            for cell in cells
            if cell.seed in baselines
        ]
        if pairs:
            paired[value] = pairs
    return paired


def treatment_of(value: Value, cells: Sequence[CellFigures]) -> Treatment:
    """The figures of one treatment, over its seeds."""
    return Treatment(
        value=value,
        seeds=tuple(cell.seed for cell in cells),
        parameters=cells[0].parameters,
        loss=figure_of([cell.loss for cell in cells]),
        perplexity=figure_of([cell.score.perplexity for cell in cells]),
        bits_per_byte=figure_of([cell.score.bits_per_byte for cell in cells]),
        tokens_per_s=figure_of([cell.tokens_per_s for cell in cells]),
        peak_memory_bytes=figure_of([cell.peak_memory_bytes for cell in cells]),
    )


def tests_of(paired: dict[Value, list[Pair]]) -> dict[Value, OverSeeds]:
    """What seeds show of each treatment that has several, adjusted for how many these are."""
    several = {value: pairs for value, pairs in paired.items() if len(pairs) >= FEWEST_SEEDS}
    tests = [paired_test([pair.difference for pair in pairs]) for pairs in several.values()]
    adjusted = holm([test.p_value for test in tests])
    level = strictest_level(max(1, len(tests)))
    found = {}
    for value, test, p_holm in zip(several, tests, adjusted, strict=True):
        pairs = several[value]
        one_percent = ONE_PERCENT * baseline_loss(pairs)
        nats_to_bits = bits_of_nat(pairs)
        low = test.interval.low * nats_to_bits
        high = test.interval.high * nats_to_bits
        found[value] = OverSeeds(
            deviation=test.deviation,
            interval=test.interval,
            interval_bits=Interval(low=low, high=high),
            p_value=test.p_value,
            p_holm=p_holm,
            detectable=test.deviation * detectable_effect(len(pairs), level),
            seeds_for_one_percent=seeds_to_see(one_percent, test.deviation, level),
        )
    return found


def baseline_loss(pairs: Sequence[Pair]) -> float:
    """The baseline's mean loss over the seeds of some pairs."""
    return float(np.mean([pair.baseline.loss for pair in pairs]))


def bits_of_nat(pairs: Sequence[Pair]) -> float:
    """Bits per byte for each nat a target: the same of all cells, as text and tokenizer are."""
    score = pairs[0].baseline.score
    return score.targets / (math.log(2) * score.text_bytes)


def difference_of(
    value: Value, pairs: Sequence[Pair], over_seeds: OverSeeds | None, place: Place
) -> Difference:
    """A treatment against the baseline."""
    mean = float(np.mean([pair.difference for pair in pairs]))
    return Difference(
        value=value,
        seeds=tuple(pair.treatment.seed for pair in pairs),
        loss=mean,
        bits_per_byte=mean * bits_of_nat(pairs),
        baseline_loss=baseline_loss(pairs),
        over_seeds=over_seeds,
        over_documents=tuple(over_documents(pairs, place)),
    )


def over_documents(pairs: Sequence[Pair], place: Place) -> list[OverDocuments]:
    """Within each seed, over the validation documents that both models were scored on.

    Raises UserError where these are not the same ones.
    """
    found = []
    for pair in pairs:
        treatment = documents_of(place, pair.treatment.name)
        baseline = documents_of(place, pair.baseline.name)
        if treatment is None or baseline is None:
            continue
        names = f"{pair.treatment.name} and {pair.baseline.name}"
        advice = "remove their evaluation.json, and the same command scores them again"
        with explained(ValueError, names, advice):
            differences = paired_documents(treatment, baseline)
        interval = significance.over_documents(differences)
        if interval is None:
            continue
        found.append(
            OverDocuments(
                seed=pair.treatment.seed,
                documents=len(baseline),
                difference=pair.difference,
                interval=interval,
            )
        )
    return found

"""From the figures of cells to what they show: means over seeds, differences, intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    baselines = {cell.seed: cell for cell in by_value.get(matrix.baseline, [])}
    differences = []
    for value, cells in by_value.items():
        pairs = [
            Pair(treatment=cell, baseline=baselines[cell.seed])
            for cell in cells
            if cell.seed in baselines
        ]
        if pairs and matrix.treatment and value != matrix.baseline:
            differences.append(difference_of(value, pairs, place))
    tests = tested(differences)
    return Group(
        settings=settings,
        train_tokens=figures[0].train_tokens,
        parameters=figures[0].parameters_without_table,
        treatments=tuple(treatments),
        differences=tuple(tests),
    )


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


def difference_of(value: Value, pairs: Sequence[Pair], place: Place) -> Difference:
    """A treatment against the baseline; what follows from all treatments together comes later."""
    score = pairs[0].baseline.score
    bits_of_nat = score.targets / (math.log(2) * score.text_bytes)
    differences = [pair.difference for pair in pairs]
    mean = float(np.mean(differences))
    over_seeds = None
    if len(pairs) >= FEWEST_SEEDS:
        test = paired_test(differences)
        over_seeds = OverSeeds(
            deviation=test.deviation,
            interval=test.interval,
            interval_bits=Interval(
                low=test.interval.low * bits_of_nat, high=test.interval.high * bits_of_nat
            ),
            p_value=test.p_value,
            p_holm=test.p_value,
            detectable=math.nan,
            seeds_for_one_percent=None,
        )
    return Difference(
        value=value,
        seeds=tuple(pair.treatment.seed for pair in pairs),
        loss=mean,
        bits_per_byte=mean * bits_of_nat,
        baseline_loss=float(np.mean([pair.baseline.loss for pair in pairs])),
        over_seeds=over_seeds,
        over_documents=tuple(over_documents(pairs, place)),
    )


def tested(differences: Sequence[Difference]) -> list[Difference]:
    """With p values for as many treatments as there are, and what could have been seen."""
    p_values = [one.over_seeds.p_value for one in differences if one.over_seeds]
    level = strictest_level(max(1, len(p_values)))
    adjusted = iter(holm(p_values))
    found = []
    for one in differences:
        before = one.over_seeds
        if before is None:
            found.append(one)
            continue
        smallest = before.deviation * detectable_effect(len(one.seeds), level)
        one_percent = ONE_PERCENT * one.baseline_loss
        over_seeds = replace(
            before,
            p_holm=next(adjusted),
            detectable=smallest,
            seeds_for_one_percent=seeds_to_see(one_percent, before.deviation, level),
        )
        found.append(replace(one, over_seeds=over_seeds))
    return found


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

"""A comparison in words: the tables and sentences of comparison.md and of the page."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.errors import printable
from pretrain.comparing.comparison import Comparison, Difference, Group, OverSeeds
from pretrain.comparing.matching import Match
from pretrain.comparing.matrix import Settings, Value, short_key, show_value
from pretrain.comparing.measured import CellFigures
from pretrain.comparing.significance import FEWEST_SEEDS, LEVEL, MOST_SEEDS, RESAMPLES, Figure
from pretrain.evaluation.intervals import FEW_DOCUMENTS, Interval
from pretrain.reporting.words import NOT_KNOWN, Image, Section, Table, Text
from pretrain.view.templates import render

GIGA = 1e9
NOT_SEEN = (
    "A difference that was not seen may still be there, as long as it is smaller than what so many "
    "seeds can show. The spread itself is told by those seeds alone, and is as uncertain as they "
    "are few."
)
WITHIN_GROUPS = (
    "Each group is tested by itself: of 20 in which nothing differs, one shows a difference."
)
ABOUT_SEEDS = (
    "Treatment less baseline: above 0 the treatment is worse. Over seeds: losses are subtracted "
    "seed by seed; Student's t interval at 95 %, and p of no difference, also adjusted by Holm for "
    "all treatments of the table. To show: the difference that so many seeds show in 4 of 5 cases, "
    "at 5 % divided by the number of treatments, which Holm asks of the smallest p."
)
ABOUT_DOCUMENTS = (
    "Over documents: both models of a seed score the same validation documents, which are drawn "
    f"anew {RESAMPLES:,} times (bootstrap, 95 %; too narrow below {FEW_DOCUMENTS} documents). It "
    "tells of another text, not of another seed."
)
ABOUT_MATCHES = (
    "Samples: windows that each cell saw, the same ones in the same order. Weights: digest of the "
    "initial values of all parameters that the cells of the row share, equal bit for bit. Engine: "
    "the configuration that DeepSpeed got, precision and batch sizes among it."
)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a group shows, in sentences."""

    title: str
    sentences: tuple[str, ...]


def settings_words(settings: Settings) -> str:
    """What cells have in common."""
    parts = [f"{short_key(key)} {show_value(value)}" for key, value in settings.items()]
    return ", ".join(parts)


def with_deviation(figure: Figure, form: str, unit: float = 1.0) -> str:
    """A mean and, of several seeds, the standard deviation."""
    mean = format(figure.mean / unit, form)
    if figure.deviation is None:
        return mean
    return f"{mean} ± {format(figure.deviation / unit, form)}"


def interval_words(interval: Interval) -> str:
    """From where to where, in nats or bits."""
    return f"{interval.low:+.4f} to {interval.high:+.4f}"


def seeds_words(seeds: Sequence[int]) -> str:
    """How many there are."""
    return f"{len(seeds)} seed" if len(seeds) == 1 else f"{len(seeds)} seeds"


def name_of(comparison: Comparison, value: Value) -> str:
    """A treatment's name in a table."""
    return "all cells" if comparison.treatment is None else show_value(value)


# Tables


def treatments_table(comparison: Comparison, group: Group) -> Table:
    """Means and standard deviations over seeds."""
    rows = []
    for one in group.treatments:
        row = [
            name_of(comparison, one.value),
            str(len(one.seeds)),
            with_deviation(one.loss, ".4f"),
            with_deviation(one.perplexity, ".2f"),
            with_deviation(one.bits_per_byte, ".4f"),
            f"{one.parameters:,}",
            with_deviation(one.tokens_per_s, ",.0f"),
            with_deviation(one.peak_memory_bytes, ".2f", GIGA),
        ]
        rows.append(row)
    return Table(
        title=title_of("Figures", group),
        header=[
            treatment_header(comparison),
            "seeds",
            "loss (nats a token)",
            "perplexity",
            "bits per byte",
            "parameters",
            "tokens/s",
            "memory (GB)",
        ],
        rows=rows,
        note="Mean ± standard deviation over seeds, on the whole validation split.",
    )


def treatment_header(comparison: Comparison) -> str:
    """What the first column of a table is called."""
    return short_key(comparison.treatment) if comparison.treatment else "cells"


def title_of(what: str, group: Group) -> str:
    """A table's title, with what its cells have in common where there are several groups."""
    words = settings_words(group.settings)
    return f"{what}, {words}" if words else what


def differences_table(comparison: Comparison, group: Group) -> Table:
    """Each treatment against the baseline, over seeds."""
    rows = []
    for one in group.differences:
        row = [
            show_value(one.value),
            str(len(one.seeds)),
            f"{one.loss:+.4f}",
            f"{one.percent(one.loss):+.2f} %",
            f"{one.bits_per_byte:+.4f}",
        ]
        rows.append([*row, *over_seeds_cells(one)])
    baseline = show_value(comparison.baseline)
    return Table(
        title=title_of(f"Against {baseline}", group),
        header=[
            treatment_header(comparison),
            "pairs",
            "loss",
            "of the baseline's",
            "bits per byte",
            "95 % over seeds",
            "p",
            "p (Holm)",
            "to show",
            "seeds for 1 %",
        ],
        rows=rows,
        note=ABOUT_SEEDS,
    )


def over_seeds_cells(one: Difference) -> list[str]:
    """What seeds show of a difference; nothing of fewer than two."""
    test = one.over_seeds
    if test is None:
        return [NOT_KNOWN] * 5
    return [
        interval_words(test.interval),
        f"{test.p_value:.2g}",
        f"{test.p_holm:.2g}",
        f"{one.percent(test.detectable):.2g} %",
        seeds_for_one_percent(test),
    ]


def seeds_for_one_percent(test: OverSeeds) -> str:
    """How many seeds it takes to see 1 %."""
    needed = test.seeds_for_one_percent
    return f"over {MOST_SEEDS:,}" if needed is None else f"{needed:,}"


def documents_table(comparison: Comparison, group: Group) -> Table | None:
    """Each pair over validation documents; None where no evaluation kept them."""
    rows = []
    for one in group.differences:
        for found in one.over_documents:
            row = [
                show_value(one.value),
                str(found.seed),
                f"{found.difference:+.4f}",
                interval_words(found.interval),
                f"{found.documents:,}",
            ]
            rows.append(row)
    if not rows:
        return None
    header = [treatment_header(comparison), "seed", "loss", "95 % over documents", "documents"]
    baseline = show_value(comparison.baseline)
    title = title_of(f"Against {baseline}, within a seed", group)
    return Table(title=title, header=header, rows=rows, note=ABOUT_DOCUMENTS)


def gaps_table(comparison: Comparison) -> Table:
    """The gap to the baseline in every group, in order of tokens and size."""
    rows = []
    in_order = sorted(comparison.groups, key=lambda group: (group.train_tokens, group.parameters))
    for group in in_order:
        for one in group.differences:
            nats = NOT_KNOWN
            bits = NOT_KNOWN
            if one.over_seeds is not None:
                nats = interval_words(one.over_seeds.interval)
                bits = interval_words(one.over_seeds.interval_bits)
            row = [show_value(one.value), f"{group.train_tokens:,}", f"{group.parameters:,}"]
            row += [f"{one.loss:+.4f}", nats, f"{one.bits_per_byte:+.4f}", bits]
            rows.append(row)
    return Table(
        title=f"Gap to {show_value(comparison.baseline)} over tokens and size",
        header=[
            treatment_header(comparison),
            "tokens",
            "parameters",
            "loss",
            "95 % over seeds",
            "bits per byte",
            "95 % over seeds",
        ],
        rows=rows,
        note="Parameters without an input table. Above 0 the treatment is worse.",
    )


def cells_table(cells: Sequence[CellFigures]) -> Table:
    """Each cell by itself."""
    rows = []
    for cell in cells:
        row = [
            cell.name,
            f"{cell.loss:.4f}",
            f"{cell.score.perplexity:.2f}",
            f"{cell.score.bits_per_byte:.4f}",
            f"{cell.parameters:,}",
            f"{cell.train_tokens:,}",
            f"{cell.tokens_per_s:,.0f}",
            f"{cell.peak_memory_bytes / GIGA:.2f}",
            str(cell.skipped_steps),
        ]
        rows.append(row)
    return Table(
        title="Each cell",
        header=[
            "cell",
            "loss",
            "perplexity",
            "bits per byte",
            "parameters",
            "tokens",
            "tokens/s",
            "memory (GB)",
            "steps skipped",
        ],
        rows=rows,
    )


def matches_table(matches: Sequence[Match]) -> Table:
    """Whether the cells of each seed are matched."""
    rows = []
    for match in matches:
        row = [
            ", ".join(filter(None, [f"seed {match.seed}", settings_words(match.group)])),
            str(len(match.cells)),
            NOT_KNOWN if match.samples is None else f"{match.samples:,}",
            "differ" if match.global_batch_tokens is None else f"{match.global_batch_tokens:,}",
            str(match.shared_parameters),
            "differ" if match.weights is None else match.weights[:16],
            "the same" if match.is_same_engine else "differs",
            "yes" if match.is_matched else "no",
        ]
        rows.append(row)
    return Table(
        title="Matching",
        header=[
            "cells of",
            "cells",
            "samples",
            "tokens a step",
            "shared tensors",
            "weights at the start",
            "engine",
            "matched",
        ],
        rows=rows,
        note=ABOUT_MATCHES,
    )


# Sentences


def findings_of(comparison: Comparison, group: Group) -> Findings:
    """What the numbers of a group support, and what not."""
    sentences = [sentence_of(comparison, one) for one in group.differences]
    fewest = min(len(one.seeds) for one in group.treatments)
    if comparison.treatment is None:
        sentences.append("No --baseline was named, so nothing is compared: figures alone.")
    elif not group.differences:
        sentences.append("No seed has figures of baseline and treatment both: figures alone.")
    elif fewest < FEWEST_SEEDS:
        sentences.append(
            "One seed tells no spread, so there is no interval over seeds: give --vary seed=1,2,3."
        )
    title = settings_words(group.settings) or "What the numbers support"
    return Findings(title=title, sentences=tuple(sentences))


def reservations_of(comparison: Comparison) -> list[str]:
    """What holds of all groups together."""
    tested = [
        group for group in comparison.groups if any(one.over_seeds for one in group.differences)
    ]
    sentences = []
    if tested:
        sentences.append(NOT_SEEN)
    if len(tested) > 1:
        sentences.append(WITHIN_GROUPS)
    return sentences


def sentence_of(comparison: Comparison, one: Difference) -> str:
    """What was seen of one treatment, or how large it would have to be to be seen."""
    names = f"{show_value(one.value)} against {show_value(comparison.baseline)}"
    measured = f"{one.percent(one.loss):+.2f} % of the loss ({one.loss:+.4f} nats a token)"
    test = one.over_seeds
    if test is None:
        return f"{names}, {seeds_words(one.seeds)}: {measured}; what chance it owes is not known."
    smallest = f"{one.percent(test.detectable):.2g} %"
    low = one.percent(test.interval.low)
    high = one.percent(test.interval.high)
    where = f"95 % interval over seeds {low:+.2f} % to {high:+.2f} %, p {test.p_holm:.2g} by Holm"
    outcome = f"none was seen: {measured}"
    if test.is_seen:
        worse = "more" if one.loss > 0 else "less"
        outcome = f"one was seen, {worse} loss: {measured}"
    elif test.p_value < LEVEL:
        alone = f"of this treatment alone one would be, p {test.p_value:.2g}"
        outcome = f"none was seen among so many treatments ({alone}): {measured}"
    return (
        f"{names}: {seeds_words(one.seeds)} can show a difference of {smallest} or more at this "
        f"spread; {outcome}; {where}. To see 1 % would take {seeds_for_one_percent(test)} seeds."
    )


# All of it


def tables_of(comparison: Comparison) -> list[Table]:
    """Every table, in order."""
    tables = []
    if len(comparison.groups) > 1 and comparison.treatment is not None:
        tables.append(gaps_table(comparison))
    for group in comparison.groups:
        tables.append(treatments_table(comparison, group))
        if group.differences:
            tables.append(differences_table(comparison, group))
        of_documents = documents_table(comparison, group)
        if of_documents:
            tables.append(of_documents)
    tables.append(cells_table(comparison.cells))
    tables.append(matches_table(comparison.matches))
    return tables


def markdown_of(comparison: Comparison, figures: Sequence[str]) -> str:
    """comparison.md; `figures` are names of images beside it."""
    return render(
        "comparison.md.jinja",
        comparison=comparison,
        varied=", ".join(f"`{key}`" for key in comparison.keys),
        baseline=None if comparison.treatment is None else show_value(comparison.baseline),
        findings=[findings_of(comparison, group) for group in comparison.groups],
        reservations=reservations_of(comparison),
        tables=tables_of(comparison),
        missing=[(cell.name, printable(cell.why)) for cell in comparison.missing],
        figures=figures,
    )


def sections_of(comparison: Comparison, images: Sequence[Image]) -> list[Section]:
    """What a comparison adds to the report of its runs: sentences first, then figures."""
    texts = []
    for group in comparison.groups:
        found = findings_of(comparison, group)
        content = "\n".join(textwrap.fill(sentence) for sentence in found.sentences)
        texts.append(Text(title=found.title, content=content, is_open=True))
    reservations = reservations_of(comparison)
    if reservations:
        content = "\n".join(textwrap.fill(sentence) for sentence in reservations)
        texts.append(Text(title="And what not", content=content, is_open=True))
    return [
        Section(title="What the comparison shows", texts=texts),
        Section(title="Compared figures", tables=tables_of(comparison), images=images),
    ]

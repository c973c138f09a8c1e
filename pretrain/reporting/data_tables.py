"""What a report says of data sets: their sources, and how long their documents are."""

from collections.abc import Sequence

from data_prep.manifest import BLOCK_SAMPLES, Manifest
from pretrain.reporting.data_set import SourceLengths
from pretrain.reporting.reported_run import ReportedRun, ratio_of, tokens_of
from pretrain.reporting.words import (
    NOT_KNOWN,
    Bar,
    Bars,
    Section,
    Table,
    figure,
    share,
)

MOST_SOURCES = 12  # whose lengths are drawn


def data_section(runs: Sequence[ReportedRun]) -> Section:
    """The data set under each run that has one at hand; its lengths once for all its runs."""
    tables = []
    bars: list[Bars] = []
    drawn: set[str] = set()
    for run in runs:
        if run.data is None:
            continue
        table = sources_table(run, run.data)
        tables.append(table)
        if run.data.fingerprint not in drawn:
            largest = sorted(run.lengths, key=lambda own: own.documents, reverse=True)
            bars += [length_bars(own) for own in largest[:MOST_SOURCES]]
        drawn.add(run.data.fingerprint)
    return Section(title="Data", tables=tables, bars=bars)


def length_bars(lengths: SourceLengths) -> Bars:
    """Documents of a source by their length, in powers of two."""
    first = next(bits for bits, documents in enumerate(lengths.by_bits) if documents)
    most = max(lengths.by_bits)
    bars = []
    for bits in range(first, len(lengths.by_bits)):
        documents = lengths.by_bits[bits]
        longest = (1 << bits) - 1
        shortest = (longest + 1) // 2
        bar = Bar(
            name="0" if bits == 0 else f"{shortest:,} to {longest:,}",
            width=f"{documents / most:.1%}",
            words=f"{documents:,} ({share(documents, lengths.counted)})",
        )
        bars.append(bar)
    note = f"Median {lengths.median:,.0f} tokens, longest {lengths.longest:,}"
    if lengths.counted < lengths.documents:
        note += f", of {lengths.counted:,} of {lengths.documents:,} documents, evenly spread"
    return Bars(
        title=f"{lengths.name}: documents by their tokens",
        bars=bars,
        note=f"{note}. Both splits; end-of-document ids are not counted.",
    )


def sources_table(run: ReportedRun, data: Manifest) -> Table:
    """The sources of a data set, and how often a run goes through them."""
    planned_tokens = run.recipe.total_steps * run.recipe.batch.global_batch_tokens
    planned = data.epochs(planned_tokens)
    seen = data.epochs(int(tokens_of(run)))
    rows = []
    for source in data.sources:
        name = source.name
        ratio = ratio_of(data, "train", name)
        row = [
            name,
            share(source.share, BLOCK_SAMPLES),
            f"{data.tokens('train', name):,}",
            f"{data.tokens('validation', name):,}",
            f"{seen[name]:.2f}",
            f"{planned[name]:.2f}",
            figure(ratio, ".3f"),
            source.license or NOT_KNOWN,
        ]
        rows.append(row)
    header = ["source", "share", "training tokens", "validation tokens"]
    header += ["epochs seen", "epochs planned", "bytes a token", "license"]
    note = f"Fingerprint {data.fingerprint}, {data.vocab_size:,} ids."
    return Table(title=run.name, header=header, rows=rows, note=note)

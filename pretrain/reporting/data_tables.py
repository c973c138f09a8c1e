"""What a report says of data sets, and of what was measured on them: sources, lengths of documents,
scores.
"""

from collections.abc import Sequence

from data_prep.inputs.urls import without_credentials
from data_prep.manifest import BLOCK_SAMPLES, Manifest
from pretrain.evaluation.result import EvaluationResult, Score
from pretrain.evaluation.task_results import TaskMetric, TaskResult
from pretrain.reporting.data_set import SourceLengths
from pretrain.reporting.reported_run import ReportedRun, StageData, ratio_of, tokens_on
from pretrain.reporting.words import (
    NOT_KNOWN,
    Bar,
    Bars,
    Cells,
    Section,
    Table,
    by_run,
    figure,
    share,
)

MOST_SOURCES = 12  # whose lengths are drawn
NO_FILTER = "none"  # which lm-eval names all the same


def data_section(runs: Sequence[ReportedRun]) -> Section:
    """The data sets under each run that are at hand; their lengths once for all runs."""
    tables = []
    bars: list[Bars] = []
    drawn: set[str] = set()
    for run in runs:
        for stage in all_data(run):
            if stage.data is None:
                continue
            table = sources_table(run, stage.data, stage.steps)
            tables.append(table)
            if stage.fingerprint not in drawn:
                largest = sorted(stage.lengths, key=lambda own: own.documents, reverse=True)
                bars += [length_bars(own) for own in largest[:MOST_SOURCES]]
            drawn.add(stage.fingerprint)
    return Section(title="Data", tables=tables, bars=bars)


def all_data(run: ReportedRun) -> list[StageData]:
    """The data sets of a run, oldest first."""
    newest = StageData(
        fingerprint=run.fingerprint or NOT_KNOWN,
        steps=range(run.first_step, run.recipe.total_steps),
        data=run.data,
        data_dir=run.data_dir,
        lengths=run.lengths,
    )
    return [*run.earlier, newest]


def data_lines(run: ReportedRun) -> list[str]:
    """Each data set of a run, and what it was built from: the command is nowhere on record."""
    lines = []
    for stage in all_data(run):
        of_steps = f" {steps_words(stage.steps)}" if run.earlier else ""
        lines.append(f"# data set{of_steps}: fingerprint {stage.fingerprint}")
        if stage.data is None or stage.data_dir is None:
            continue
        lines.append(
            "# built by python -m data_prep.build_shards, whose command is not on record, from"
        )
        for source in stage.data.sources:
            origin = without_credentials(source.origin)
            lines.append(f"#   {source.name}: {origin}, weight {source.weight}")
        lines.append(f"# and found at {stage.data_dir}")
    return lines


def steps_words(steps: range) -> str:
    """Steps from 0 as the page counts them, from 1."""
    return f"of steps {steps.start + 1:,} to {steps.stop:,}"


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


def sources_table(run: ReportedRun, data: Manifest, steps: range) -> Table:
    """The sources of a data set, and how often a run goes through them in its steps on it."""
    planned_tokens = len(steps) * run.recipe.batch.global_batch_tokens
    planned = data.epochs(planned_tokens)
    seen = data.epochs(tokens_on(run, steps))
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
    title = f"{run.name}, {steps_words(steps)}" if run.earlier else run.name
    return Table(title=title, header=header, rows=rows, note=note)


def evaluation(runs: Sequence[ReportedRun]) -> Section:
    """What pretrain.evaluate measured."""
    tables = []
    for run in runs:
        for result in run.evaluations:
            table = scores_table(run.name, result)
            tables.append(table)
    if any(run.tasks for run in runs):
        tables.append(tasks_table(runs))
    return Section(title="Evaluation", tables=tables)


def tasks_table(runs: Sequence[ReportedRun]) -> Table:
    """What runs scored on tasks, a row for each figure of a task after a step."""
    of_runs = [task_cells(run) for run in runs]
    names = list(dict.fromkeys(name for cells in of_runs for name in cells))
    filled = [{name: cells.get(name, NOT_KNOWN) for name in names} for cells in of_runs]
    versions = {result.lm_eval for run in runs for result in run.tasks}
    note = f"By lm-eval {', '.join(sorted(versions))}; ± is its standard error."
    return by_run("Tasks", runs, filled, note)


def task_cells(run: ReportedRun) -> Cells:
    """The figures of all tasks that a run was measured on, by what they are."""
    cells: Cells = {}
    for result in sorted(run.tasks, key=lambda result: (result.task, result.step)):
        for metric in result.metrics:
            words = figure(metric.value)
            if metric.standard_error is not None:
                words += f" ± {figure(metric.standard_error)}"
            cells[metric_name(result, metric)] = words
    return cells


def metric_name(result: TaskResult, metric: TaskMetric) -> str:
    """Which figure it is, of what part of which task, after which step."""
    words = [f"{result.task}: {metric.name}"]
    if metric.filter != NO_FILTER:
        words.append(metric.filter)
    if result.limit is not None:
        words.append(f"first {result.limit:,} questions")
    elif result.samples is not None:
        words.append(f"{result.samples:,} questions")
    words.append(f"after step {result.step:,}")
    return ", ".join(words)


def scores_table(name: str, result: EvaluationResult) -> Table:
    """The figures of one checkpoint, on the whole split and on each source."""
    rows = [score_row("whole split", result.whole_split)]
    for source, score in result.sources.items():
        rows.append(score_row(source, score))
    return Table(
        title=f"{name}, after step {result.step:,}",
        header=["", "loss", "perplexity", "bits per byte", "interval", "targets", "bytes"],
        rows=rows,
        note=how_it_was_measured(result),
    )


def how_it_was_measured(result: EvaluationResult) -> str:
    """On what, in which windows, and what the intervals are; in as many sentences as it needs."""
    said = []
    if result.data_dir is not None:
        said.append(f"On other text, {result.data_dir} ({result.fingerprint}).")
    if result.stride is not None:
        said.append(f"In windows that each begin {result.stride:,} tokens behind the one before.")
    if result.bootstrap is not None:
        said.append(
            f"The interval of the bits per byte holds {result.bootstrap.level:.0%} of "
            f"{result.bootstrap.resamples:,} figures of documents drawn anew."
        )
    return " ".join(said)


def score_row(name: str, score: Score) -> list[str]:
    """The figures of a text."""
    interval = ""
    if score.bits_per_byte_interval is not None:
        low = figure(score.bits_per_byte_interval.low)
        interval = f"{low} to {figure(score.bits_per_byte_interval.high)}"
    return [
        name,
        figure(score.loss),
        figure(score.perplexity, ",.2f"),
        figure(score.bits_per_byte),
        interval,
        f"{score.targets:,}",
        f"{score.text_bytes:,}",
    ]

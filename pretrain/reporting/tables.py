"""The tables of a report, in words."""

import math
import re
import shlex
from collections.abc import Sequence

import numpy as np

from data_prep.errors import printable
from pretrain.config.load import recipe_to_dict, recipe_to_yaml
from pretrain.costs.flops import FORMULA, count_parameters, flops_per_token
from pretrain.evaluation.result import EvaluationResult, Score
from pretrain.metrics.step_columns import PHASES, StepColumns
from pretrain.reporting.charts import GIGA, SECONDS_OF_AN_HOUR, last_step
from pretrain.reporting.compared import (
    SLOW_MEDIANS,
    Slowness,
    StandsOut,
    slowness_of,
    trend_of,
    worst_steps,
)
from pretrain.reporting.data_set import StepDocuments
from pretrain.reporting.power_law import law_of
from pretrain.reporting.reported_run import (
    ReportedRun,
    StartFacts,
    best_step,
    bytes_per_token,
    known,
    marks_of,
    tokens_of,
)
from pretrain.reporting.words import (
    MOST_ROWS,
    NOT_KNOWN,
    Cells,
    Section,
    Table,
    Text,
    by_run,
    figure,
    large,
    newest_of,
    share,
)
from pretrain.run.directory import RECIPE_NAME

LOCAL_RANK = re.compile(r" --local[_-]rank(=| )\d+")  # which DeepSpeed's launcher adds
SHORT_COMMIT = 12  # characters of a commit that tell it from all others
MOST_TEXT = 400  # characters of a sample that are shown


TREND = "training loss, the last tenth of the steps against the tenth before"
LAW = "training loss of the last tenth against a power law of the tokens N"
MFU = "MFU, median"
MFU_OF_MATMUL = "use of a measured matrix product, median"  # on CPUs, whose peak is not known
LAW_NOTE = (
    "The law describes this run and foretells nothing: the schedule bends the curve, and a "
    "learning rate that falls at the end takes it below its law."
)
COST_NOTE = (
    f"FLOPs are {FORMULA} for each token. Hours are those of the steps in the record: neither "
    "validations and saves, nor work that a kill lost, are counted."
)


def overview(runs: Sequence[ReportedRun]) -> Section:
    """How the runs stand, what came out, and what it cost."""
    outcomes = [outcome(run) for run in runs]
    costs = without_unknown([cost(run) for run in runs], (MFU, MFU_OF_MATMUL))
    tables = [
        by_run("Outcome", runs, outcomes, ""),
        by_run("Cost and speed", runs, costs, COST_NOTE),
    ]
    return Section(title="Overview", tables=tables)


def without_unknown(of_runs: Sequence[Cells], names: Sequence[str]) -> list[Cells]:
    """Cells of runs without those of some names that no run knows."""
    unknown = {name for name in names if all(cells[name] == NOT_KNOWN for cells in of_runs)}
    known_of_runs = []
    for cells in of_runs:
        known_of_runs.append({name: cells[name] for name in cells if name not in unknown})
    return known_of_runs


def outcome(run: ReportedRun) -> Cells:
    """How a run stands and what came out."""
    status = run.status
    if run.reason:
        status = f"{run.status}: {run.reason}"
    best = best_step(run)
    best_loss = NOT_KNOWN
    bits_per_byte = None
    of_validation = bytes_per_token(run).validation
    if best:
        best_loss = f"{best.loss:.4f} after step {best.done:,}"
    if best and of_validation:
        bits_per_byte = best.loss / math.log(2) / of_validation
    return {
        "status": status,
        "steps": f"{last_step(run.steps):,} of {run.recipe.total_steps:,}",
        "tokens": large(tokens_of(run)),
        "loss of the last step": last_figure(run.steps, "loss"),
        "last validation loss": last_figure(run.steps, "val_loss"),
        "best validation loss": best_loss,
        "its bits per byte": figure(bits_per_byte),
        "skipped steps": f"{len(run.steps.skipped):,}",
    }


def cost(run: ReportedRun) -> Cells:
    """What a run cost so far, and how fast it was."""
    parameters = count_parameters(run.recipe.model)
    per_token = flops_per_token(run.recipe.model)
    gpu_hours = run.steps.gpu_seconds() / SECONDS_OF_AN_HOUR
    cells = {
        "parameters": large(sum(parameters.values())),
        "FLOPs a token": large(per_token),
        "FLOPs": f"{tokens_of(run) * per_token:.3g}",
        "GPU-hours (on CPUs: hours of ranks)": f"{gpu_hours:,.4g}",
        "tokens/s, median": median_of(run.steps, "tokens_per_s", ",.0f"),
        MFU: median_of(run.steps, "mfu", ".1%"),
        MFU_OF_MATMUL: median_of(run.steps, "mfu_of_matmul", ".1%"),
        "seconds a step, median": median_of(run.steps, "step_s", ".4g"),
    }
    whole = known(run.steps, "step_s").sum()
    for phase in PHASES:
        own = known(run.steps, phase).sum()
        cells[f"share of it: {phase}"] = share(own, whole)
    peaks = known(run.steps, "peak_memory_bytes")
    most = NOT_KNOWN
    if len(peaks):
        most = f"{peaks.max() / GIGA:.3g} GB"
    cells["peak memory of rank 0"] = most
    return cells


def last_figure(steps: StepColumns, name: str) -> str:
    """A figure's newest value."""
    values = known(steps, name)
    if len(values) == 0:
        return NOT_KNOWN
    return figure(values[-1])


def median_of(steps: StepColumns, name: str, form: str) -> str:
    """A figure's median."""
    values = known(steps, name)
    if len(values) == 0:
        return NOT_KNOWN
    return figure(float(np.median(values)), form)


def compared(runs: Sequence[ReportedRun]) -> Section:
    """Each run against itself: its trend, its slow steps, and the steps that stand out."""
    of_runs = [against_itself(run) for run in runs]
    tables = [by_run("Trend and slow steps", runs, of_runs, LAW_NOTE)]
    for run in runs:
        worst = worst_steps(run.steps)
        if worst:
            tables.append(worst_table(run, worst))
    return Section(title="Compared with itself", tables=tables)


def against_itself(run: ReportedRun) -> Cells:
    """Whether a run still improves, how it lies to a power law, and whether it was slow."""
    trend = trend_of(run.steps)
    warmup = run.recipe.schedule.warmup(run.recipe.total_steps)
    return {
        TREND: NOT_KNOWN if trend is None else trend.words,
        LAW: law_of(run.steps, warmup).words,
        f"steps of {SLOW_MEDIANS:g} medians or more": slow_words(slowness_of(run.steps)),
    }


def slow_words(slow: Slowness | None) -> str:
    """How often a run was slow, and what that cost."""
    if slow is None:
        return NOT_KNOWN
    return f"{slow.steps:,}, which took {slow.seconds:,.3g} s more"


def worst_table(run: ReportedRun, worst: Sequence[StandsOut]) -> Table:
    """The steps whose loss stands out, and their documents, or how to see these."""
    header = ["step", "loss", "above the mean of the 100 before"]
    if run.documents:
        header.append("documents of its batch")
    rows = []
    for step in worst:
        row = [f"{step.step:,}", f"{step.loss:.4f}", f"{step.above:.4f}"]
        if run.documents:
            row.append(documents_words(run.documents.get(step.step)))
        rows.append(row)
    place = shlex.quote(str(run.path))
    data = "DATASET"
    if run.data_dir is not None:
        data = shlex.quote(str(run.data_dir))
    trace = f"python -m pretrain.trace --run-dir {place} --data-dir {data} --step STEP --row ROW"
    return Table(
        title=f"{run.name}, steps of the highest loss",
        header=header,
        rows=rows,
        note=f"{printable(trace)} shows the documents of a row.",
    )


def documents_words(documents: StepDocuments | None) -> str:
    """The documents of a step, a line each."""
    if documents is None:
        return NOT_KNOWN
    lines = [printable(name) for name in documents.named]
    rest = []
    if documents.others:
        rest.append(f"and {documents.others:,} more")
    if documents.rows < documents.of_rows:
        rest.append(f"in the first {documents.rows} of its {documents.of_rows:,} rows")
    if rest:
        lines.append(" ".join(rest))
    return "\n".join(lines)


def happened(runs: Sequence[ReportedRun]) -> Section:
    """Checkpoints, restarts, skips and stalls, newest first."""
    tables = [marks_table(run) for run in runs]
    return Section(title="What happened", tables=[table for table in tables if table.rows])


def marks_table(run: ReportedRun) -> Table:
    """What happened to a run; beside a bad step, the text of its worst row."""
    marks = sorted(marks_of(run), key=lambda mark: mark.step, reverse=True)
    rows = []
    for mark in marks:
        row = [mark.kind, f"{mark.step:,}", mark.words]
        if run.bad_texts:
            is_skip = mark.kind == "skip"
            text = run.bad_texts.get(mark.step - 1, "")
            row.append(shortened(text) if is_skip else "")
        rows.append(row)
    header = ["what", "after steps", "which"]
    if run.bad_texts:
        header.append("text of its worst row")
    return Table(title=run.name, header=header, rows=rows[:MOST_ROWS], note=newest_of(rows))


def shortened(text: str) -> str:
    """The beginning of a sample's text."""
    shown = printable(text[:MOST_TEXT])
    if len(text) > MOST_TEXT:
        shown += "…"
    return shown


def evaluation(runs: Sequence[ReportedRun]) -> Section:
    """What pretrain.evaluate measured."""
    tables = []
    for run in runs:
        for result in run.evaluations:
            table = scores_table(run.name, result)
            tables.append(table)
    return Section(title="Evaluation", tables=tables)


def scores_table(name: str, result: EvaluationResult) -> Table:
    """The figures of one checkpoint, on the whole split and on each source."""
    rows = [score_row("whole split", result.whole_split)]
    for source, score in result.sources.items():
        rows.append(score_row(source, score))
    note = ""
    if result.data_dir is not None:
        note = f"On another data set, {result.data_dir} ({result.fingerprint})."
    return Table(
        title=f"{name}, after step {result.step:,}",
        header=["", "loss", "perplexity", "bits per byte", "targets", "bytes"],
        rows=rows,
        note=note,
    )


def score_row(name: str, score: Score) -> list[str]:
    """The figures of a text."""
    return [
        name,
        figure(score.loss),
        figure(score.perplexity, ",.2f"),
        figure(score.bits_per_byte),
        f"{score.targets:,}",
        f"{score.text_bytes:,}",
    ]


def dotted(content: dict[str, object], prefix: str = "") -> Cells:
    """A recipe's values by dotted key."""
    values: Cells = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            values |= dotted(value, f"{key}.")
        else:
            values[key] = str(value)
    return values


def recipes(runs: Sequence[ReportedRun]) -> Section:
    """The recipe; of several runs, what differs first."""
    texts = []
    for run in runs:
        content = recipe_to_yaml(run.recipe)
        texts.append(Text(title=run.name, content=content))
    tables = []
    if len(runs) > 1:
        tables.append(differences(runs))
    return Section(title="Recipe", tables=tables, texts=texts)


def differences(runs: Sequence[ReportedRun]) -> Table:
    """Keys of the recipe, and data sets, that are not the same for all runs."""
    of_runs = []
    for run in runs:
        cells = dotted(recipe_to_dict(run.recipe))
        cells["data set"] = run.fingerprint or NOT_KNOWN
        of_runs.append(cells)
    differing: list[Cells] = [{} for _ in runs]
    for key in of_runs[0]:
        values = [cells[key] for cells in of_runs]
        if len(set(values)) == 1:
            continue
        for own, value in zip(differing, values, strict=True):
            own[key] = value
    note = ""
    if not differing[0]:
        note = "Nothing: these runs have one recipe and one data set."
    return by_run("What differs", runs, differing, note)


def environment(runs: Sequence[ReportedRun]) -> Section:
    """What each start ran on."""
    tables = []
    for run in runs:
        if run.starts:
            table = starts_table(run)
            tables.append(table)
    return Section(title="Environment", tables=tables)


def starts_table(run: ReportedRun) -> Table:
    """The starts of a run."""
    rows = []
    for start in run.starts:
        row = [f"{start.step:,}", start.time, start.ranks]
        row += [start.devices, start.commit[:SHORT_COMMIT], start.versions]
        rows.append(row)
    return Table(
        title=run.name,
        header=["from step", "time", "ranks", "devices", "commit", "versions"],
        rows=rows[-MOST_ROWS:],
        note=newest_of(rows),
    )


def reproduction(runs: Sequence[ReportedRun]) -> Section:
    """The commands that each run was started by."""
    texts = []
    for run in runs:
        commands = "\n".join(command_lines(run))
        text = Text(title=run.name, content=printable(commands), is_open=True)
        texts.append(text)
    return Section(title="To do it again", texts=texts)


def launched(start: StartFacts) -> str:
    """The command that starts all ranks, where they were on one host; else that of a rank."""
    own = LOCAL_RANK.sub("", start.command)
    if start.hosts == 1 and start.ranks.isdecimal():
        return own.replace("python -m ", f"deepspeed --num_gpus {start.ranks} --module ", 1)
    return own


def command_lines(run: ReportedRun) -> list[str]:
    """What was called, in order, and on what it ran."""
    lines = [f"# data set: fingerprint {run.fingerprint or NOT_KNOWN}"]
    if run.branched_from:
        lines.append(f"# branched from {run.branched_from}")
    recipe = run.path / RECIPE_NAME
    lines.append(f"# the recipe as it was resolved, which is on this page too: {recipe}")
    for start in run.starts[:MOST_ROWS]:
        place = f"# from step {start.step}, {start.time}, commit {start.commit}"
        lines.append(f"{place}, {start.ranks} ranks")
        lines.append(launched(start))
    if run.evaluations:
        place = shlex.quote(str(run.path))
        lines.append(f"python -m pretrain.evaluate --run-dir {place}")
    return lines

"""The tables of a report, in words."""

import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.errors import printable
from pretrain.config.load import recipe_to_dict, recipe_to_yaml
from pretrain.costs.flops import FORMULA, count_parameters, flops_per_token
from pretrain.metrics.step_columns import PHASES, StepColumns
from pretrain.reporting.charts import GIGA, SECONDS_OF_AN_HOUR, last_step
from pretrain.reporting.compared import (
    SLOW,
    TREND,
    WORST,
    none_words,
    slow_words,
    slowness_of,
    trend_words,
)
from pretrain.reporting.data_set import StepDocuments
from pretrain.reporting.data_tables import all_data, data_lines
from pretrain.reporting.power_law import law_of
from pretrain.reporting.reported_run import (
    ReportedRun,
    StartFacts,
    WorstSteps,
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
    dotted,
    figure,
    large,
    newest_of,
    share,
    shortened,
)
from pretrain.run.directory import RECIPE_NAME

LOCAL_RANK = re.compile(r" --local[_-]rank(=| )\d+")  # which DeepSpeed's launcher adds
RUN_DIR = re.compile(r"--run-dir[= ]('[^']*'|\S+)")
SHORT_COMMIT = 12  # characters of a commit that tell it from all others


LAW = "training loss of the last tenth against a power law of the tokens N"
MFU = "MFU, median"
# on CPUs, whose peak is not known
MFU_OF_MATMUL = "speed against a measured matrix product, median"
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
    done = f"{run.done:,} of {run.recipe.total_steps:,}"
    of_record = last_step(run.steps)
    if of_record < run.done:
        done = f"{done}, {of_record:,} in the record"
    return {
        "status": status,
        "steps": done,
        "tokens": NOT_KNOWN if run.lacks_record else large(tokens_of(run)),
        "loss of the last step": last_figure(run.steps, "loss"),
        "last validation loss": last_figure(run.steps, "val_loss"),
        "best validation loss": best_loss,
        "its bits per byte": figure(bits_per_byte),
        "skipped steps": NOT_KNOWN if run.lacks_record else f"{len(run.steps.skipped):,}",
    }


def cost(run: ReportedRun) -> Cells:
    """What a run cost so far, and how fast it was."""
    parameters = count_parameters(run.recipe.model)
    per_token = flops_per_token(run.recipe.model)
    gpu_hours = run.steps.gpu_seconds() / SECONDS_OF_AN_HOUR
    flops = f"{tokens_of(run) * per_token:.3g}"
    hours = f"{gpu_hours:,.4g}"
    if run.lacks_record:
        flops = NOT_KNOWN
        hours = NOT_KNOWN
    cells = {
        "parameters": large(sum(parameters.values())),
        "FLOPs a token": large(per_token),
        "FLOPs": flops,
        "GPU-hours (on CPUs: hours of ranks)": hours,
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
        if run.worst is not None and run.worst.steps:
            tables.append(worst_table(run, run.worst))
    return Section(title="Compared with itself", tables=tables)


def against_itself(run: ReportedRun) -> Cells:
    """Whether a run still improves, how it lies to a power law, and whether it was slow."""
    warmup = run.recipe.schedule.warmup(run.recipe.total_steps)
    worst = none_words(run.worst)
    if run.worst is not None and run.worst.steps:
        worst = ", ".join(f"{step.done:,}" for step in run.worst.steps)
    return {
        TREND: trend_words(run.steps),
        LAW: law_of(run.steps, warmup).words,
        SLOW: slow_words(slowness_of(run.steps)),
        WORST: worst,
    }


def worst_table(run: ReportedRun, worst: WorstSteps) -> Table:
    """The steps whose loss stands out, and their documents, or how to see these."""
    header = ["step", "loss", f"above the median of the {worst.before} before"]
    if run.documents:
        header.append("documents of its batch")
    rows = []
    for step in worst.steps:
        row = [f"{step.done:,}", f"{step.loss:.4f}", f"{step.above:.4f}"]
        if run.documents:
            row.append(documents_words(run.documents.get(step.done - 1)))
        rows.append(row)
    place = shlex.quote(str(run.path))
    data = "DATASET"
    if run.data_dir is not None:
        data = shlex.quote(str(run.data_dir))
    trace = f"python -m pretrain.trace --run-dir {place} --data-dir {data} --step STEP --row ROW"
    return Table(
        title=f"{run.name}, {WORST}",
        header=header,
        rows=rows,
        note=f"{printable(trace)} shows the documents of a row; STEP and ROW count from 0, so that "
        "STEP is one less than here.",
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
    """Checkpoints, restarts, skips and stalls, in order."""
    tables = [marks_table(run) for run in runs]
    return Section(title="What happened", tables=[table for table in tables if table.rows])


def marks_table(run: ReportedRun) -> Table:
    """What happened to a run; beside a bad step, the text of its worst row."""
    marks = sorted(marks_of(run), key=lambda mark: mark.step)
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
    return Table(title=run.name, header=header, rows=rows[-MOST_ROWS:], note=newest_of(rows))


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
        cells["data set"] = ", then ".join(stage.fingerprint for stage in all_data(run))
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
    versions = {start.versions for start in run.starts}
    is_one = len(versions) == 1
    rows = []
    for start in run.starts:
        row = [f"{start.step:,}", start.time, start.ranks]
        row += [start.devices, start.threads, start.commit[:SHORT_COMMIT]]
        if not is_one:
            row.append(start.versions)
        rows.append(row)
    header = ["after step", "time", "ranks", "devices", "threads a rank", "commit"]
    notes = [newest_of(rows)]
    if is_one:
        notes.append(f"Versions: {versions.pop()}.")
    else:
        header.append("versions")
    return Table(
        title=run.name,
        header=header,
        rows=rows[-MOST_ROWS:],
        note=" ".join(notes).strip(),
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
    """The command that starts all ranks, where they were on one host; else that of a rank.

    A single rank without DeepSpeed's flag was started by itself, with no launcher.
    """
    own = LOCAL_RANK.sub("", start.command)
    if start.ranks == "1" and own == start.command:
        return own
    if start.hosts == 1 and start.ranks.isdecimal():
        return own.replace("python -m ", f"deepspeed --num_gpus {start.ranks} --module ", 1)
    return own


def command_lines(run: ReportedRun) -> list[str]:
    """What was called, in order, and on what it ran."""
    lines = data_lines(run)
    if run.branched_from:
        lines.append(f"# branched from {run.branched_from}")
    recipe = run.path / RECIPE_NAME
    lines.append(f"# the recipe as it was resolved, which is on this page too: {recipe}")
    lines.append(f"# relative paths: {called_from(run)}")
    for start in run.starts[:MOST_ROWS]:
        place = f"# after step {start.step}, {start.time}, commit {start.commit}"
        ranks = "1 rank" if start.ranks == "1" else f"{start.ranks} ranks"
        threads = f"OMP_NUM_THREADS {start.threads} a rank"
        lines.append(f"{place}, {ranks}, {threads}")
        lines.append(launched(start))
    if run.evaluations:
        place = shlex.quote(str(run.path))
        lines.append(f"python -m pretrain.evaluate --run-dir {place}")
    return lines


def called_from(run: ReportedRun) -> str:
    """Where relative paths of a run's commands lead from, as far as its own place tells."""
    place = run.path.resolve()
    for start in reversed(run.starts):
        given = RUN_DIR.search(start.command)
        if given is None:
            continue
        own = Path(given[1].strip("'\""))
        parts = own.parts
        if own.is_absolute() or ".." in parts or place.parts[-len(parts) :] != parts:
            continue
        return f"from {Path(*place.parts[: -len(parts)])}, unless the run was moved"
    return "from where the command was called, which is not on record"

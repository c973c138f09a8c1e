"""A run read back whole, through the owner of each of its files.

What is missing beside the record of its steps becomes a note, and the report says it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data_prep.errors import UserError, one_line, parse_yaml
from data_prep.manifest import Manifest, load_manifest
from pretrain.checkpoint.layout import MANIFEST_NAME, saved_steps, step_of
from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.config.load import build_recipe
from pretrain.config.recipe import Recipe
from pretrain.data.stages import DataStage
from pretrain.evaluation.result import read_results
from pretrain.evaluation.task_results import read_task_results
from pretrain.metrics.metrics_file import METRICS_NAME
from pretrain.metrics.step_columns import StepColumns, read_columns
from pretrain.reporting.charts import last_step
from pretrain.reporting.compared import worst_steps
from pretrain.reporting.data_set import (
    SourceLengths,
    StepDocuments,
    documents_of_steps,
    source_lengths,
)
from pretrain.reporting.reported_run import ReportedRun, StageData, StartFacts, WorstSteps
from pretrain.run.directory import RECIPE_NAME, SKIPS_NAME, STARTS_NAME
from pretrain.run.starts import Start, in_words, of_steps, read_starts, unread_lines
from pretrain.run.state import RunState, read_state
from pretrain.watch.stall_logs import stalls_of_run

# what reading a manifest of another form raises
NO_MANIFEST = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class DataAtHand:
    """The data set of a run, where it is there to be read."""

    data_dir: Path
    manifest: Manifest
    lengths: tuple[SourceLengths, ...] = ()
    documents: dict[int, StepDocuments] = field(default_factory=dict)


def names_of(paths: Sequence[Path]) -> list[str]:
    """What runs are called: the end of their paths that tells them apart."""
    whole = [path.resolve() for path in paths]
    for length in range(1, max(len(path.parts) for path in whole)):
        names = [str(Path(*path.parts[-length:])) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in whole]


def newest_manifest(run_dir: Path, notes: list[str]) -> CheckpointManifest | None:
    """What the newest checkpoint that says something says of itself; others become notes."""
    for path in saved_steps(run_dir):
        try:
            return CheckpointManifest.from_json((path / MANIFEST_NAME).read_bytes())
        except NO_MANIFEST as error:
            notes.append(
                f"{path}: passed over, since its manifest can't be read ({one_line(error)})"
            )
    return None


def recipe_of(run_dir: Path, manifest: CheckpointManifest | None, notes: list[str]) -> Recipe:
    """The recipe as a run resolved it, else as its newest checkpoint keeps it.

    Raises UserError where there is neither.
    """
    path = run_dir / RECIPE_NAME
    if path.is_file():
        return build_recipe(parse_yaml(path.read_bytes(), str(path)), str(path))
    if manifest is None:
        raise UserError(f"{path}: missing, and no checkpoint tells the recipe; restore it")
    notes.append(
        f"{RECIPE_NAME} is missing; the recipe is that of the checkpoint after step {manifest.step}"
    )
    return build_recipe(manifest.recipe, f"{run_dir}: step {manifest.step}")


def stages_known(state: RunState, manifest: CheckpointManifest | None) -> tuple[DataStage, ...]:
    """The data sets of a run, oldest first; none where neither state nor checkpoint tells them."""
    saved = manifest.data_stages if manifest else ()
    told = state.data_stages or saved
    if told and not told[-1].data_dir and saved:
        # of one data set, checkpoints alone tell where it lay
        return (*told[:-1], replace(told[-1], data_dir=saved[-1].data_dir))
    return told


@dataclass(frozen=True, kw_only=True)
class DataOfStages:
    """The data sets of a run, as far as they are at hand."""

    newest: DataAtHand | None
    earlier: tuple[StageData, ...]
    documents: dict[int, StepDocuments]  # of steps of any of them


def data_of_stages(
    stages: Sequence[DataStage],
    data_dirs: Sequence[Path],
    recipe: Recipe,
    worst: WorstSteps | None,
    notes: list[str],
) -> DataOfStages:
    """The data sets of a run, and the documents of its worst steps; notes say what is missing.

    Raises UserError where --data-dir names what is no data set.
    """
    if not stages:
        data_of(data_dirs, None, "its data set", notes)
        return DataOfStages(newest=None, earlier=(), documents={})
    looked_at = [found.done - 1 for found in worst.steps] if worst else []
    ends = [stage.first_step for stage in stages[1:]] + [recipe.total_steps]
    at_hand: list[DataAtHand | None] = []
    earlier = []
    documents: dict[int, StepDocuments] = {}
    for stage, end in zip(stages, ends, strict=True):
        steps = range(stage.first_step, end)
        whose = "its data set"
        if len(stages) > 1:
            whose = f"the data set {stage.fingerprint} of its steps {steps.start + 1:,} to {end:,}"
        data = data_of(data_dirs, stage, whose, notes)
        if data is not None:
            of_stage = [step for step in looked_at if step in steps]
            data = look_into(data, recipe, of_stage, stage.samples_before, notes)
            documents |= data.documents
        at_hand.append(data)
        one = StageData(
            fingerprint=stage.fingerprint,
            steps=steps,
            data=data.manifest if data else None,
            data_dir=data.data_dir if data else None,
            lengths=data.lengths if data else (),
        )
        earlier.append(one)
    return DataOfStages(newest=at_hand[-1], earlier=tuple(earlier[:-1]), documents=documents)


def data_of(
    data_dirs: Sequence[Path], stage: DataStage | None, whose: str, notes: list[str]
) -> DataAtHand | None:
    """A data set of the run, where that is at hand; else a note says what is missing.

    Raises UserError where --data-dir names what is no data set.
    """
    fingerprint = stage.fingerprint if stage else None
    lacks = "bytes a token, epochs and sources are not shown; --data-dir says where it is"
    for data_dir in data_dirs:
        given = load_manifest(data_dir)
        if given.fingerprint == fingerprint:
            return DataAtHand(data_dir=data_dir, manifest=given)
    if stage is None or not stage.data_dir:
        notes.append(f"no checkpoint tells where {whose} is: {lacks}")
        return None
    path = Path(stage.data_dir)
    if not path.is_dir():
        notes.append(f"{whose} is not at {path}: {lacks}")
        return None
    try:
        found = load_manifest(path)
    except UserError as error:
        notes.append(f"{whose} can't be read ({one_line(error)}): {lacks}")
        return None
    if found.fingerprint != fingerprint:
        of_which = "" if whose == "its data set" else f", not {whose}"
        notes.append(f"another data set is at {path} now{of_which}: {lacks}")
        return None
    return DataAtHand(data_dir=path, manifest=found)


def look_into(
    data: DataAtHand,
    recipe: Recipe,
    looked_at: Sequence[int],
    samples_before: int,
    notes: list[str],
) -> DataAtHand:
    """Also what its shards tell, of some steps too; what can't be read of them becomes a note."""
    lengths: tuple[SourceLengths, ...] = ()
    documents: dict[int, StepDocuments] = {}
    try:
        lengths = source_lengths(data.data_dir, data.manifest.fingerprint)
        documents = documents_of_steps(data.data_dir, recipe, looked_at, samples_before)
    except UserError as error:
        notes.append(f"not all that its shards tell is shown ({one_line(error)})")
    return replace(data, lengths=lengths, documents=documents)


def steps_done(
    recipe: Recipe, state: RunState, steps: StepColumns, checkpoints: Sequence[int]
) -> int:
    """How many steps a run has behind it, by the record, the checkpoints or the status: the most
    of them.
    """
    done = max([last_step(steps), state.saved_step or 0, *checkpoints])
    return recipe.total_steps if state.status == "done" else done


def notes_on_steps(steps: StepColumns, done: int) -> list[str]:
    """What is to be said of the record of a run that has so many steps behind it."""
    if done == 0:
        return ["it has not finished a step yet, so there are no curves"]
    if len(steps) == 0:
        return [
            f"its record is missing: {METRICS_NAME} has no line of the {done:,} steps it has "
            "behind it, so there are no curves; restore that file"
        ]
    notes = []
    if steps.missing:
        notes.append(f"{counted(steps.missing)} no line in {METRICS_NAME}; curves leave them out")
    at_the_end = done - last_step(steps)
    if at_the_end > 0:
        notes.append(
            f"{counted(at_the_end)} no line at the end of {METRICS_NAME}, though the run has "
            f"{done:,} steps behind it; figures are those of the step before"
        )
    strange = ~np.isfinite(steps.column("loss"))
    strange[np.isin(steps.column("step"), [step.step for step in steps.skipped])] = False
    if strange.any():
        first = int(steps.column("step")[strange][0]) + 1
        notes.append(
            f"{counted(int(strange.sum()))} a loss that is no finite number, and none was "
            f"skipped for it; the first is step {first:,}"
        )
    return notes


def counted(steps: int) -> str:
    """So many steps have."""
    return "1 step has" if steps == 1 else f"{steps:,} steps have"


def notes_on_starts(run_dir: Path) -> list[str]:
    """What of the starts can't be told."""
    unread = unread_lines(run_dir)
    if unread == 0:
        return []
    return [
        f"{unread:,} of the lines of {STARTS_NAME} can't be read; the starts that they tell of "
        "are not shown"
    ]


def start_facts(start: Start) -> StartFacts:
    """A start in words."""
    versions = start.versions or {}
    return StartFacts(
        step=start.step,
        time=start.time or "",
        command=start.command or "",
        commit=in_words(start.commit),
        ranks=in_words(start.ranks),
        hosts=len(start.hosts or ()),
        devices=in_words(start.devices),
        threads=in_words(start.threads_per_rank),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
    )


@dataclass(frozen=True, kw_only=True)
class Skips:
    """What the record of bad steps tells, which count from 0."""

    texts: dict[int, str] = field(default_factory=dict)  # of the worst row of each
    rewound: frozenset[int] = frozenset()


def read_skips(run_dir: Path) -> Skips:
    """What the record of bad steps tells, where there is one."""
    if not (run_dir / SKIPS_NAME).is_file():
        return Skips()
    # with torch, for which few runs need wait
    from pretrain.run.bad_steps import rewound_steps, worst_texts

    return Skips(texts=worst_texts(run_dir), rewound=rewound_steps(run_dir))


def read_run(run_dir: Path, name: str, data_dirs: Sequence[Path]) -> ReportedRun:
    """All that is known of a run. Raises UserError where a file of it is damaged."""
    notes: list[str] = []
    state = read_state(run_dir)
    manifest = newest_manifest(run_dir, notes)
    recipe = recipe_of(run_dir, manifest, notes)
    steps = read_columns(run_dir)
    saved = [step_of(path.name) for path in reversed(saved_steps(run_dir))]
    checkpoints = [step for step in saved if step is not None]
    done = steps_done(recipe, state, steps, checkpoints)
    notes += notes_on_steps(steps, done) + notes_on_starts(run_dir)
    worst = worst_steps(steps)
    stages = stages_known(state, manifest)
    of_stages = data_of_stages(stages, data_dirs, recipe, worst, notes)
    data = of_stages.newest
    tokenizer = data.manifest.tokenizer_sha256 if data else None
    if manifest and manifest.data.tokenizer_sha256:
        tokenizer = manifest.data.tokenizer_sha256
    end = recipe.total_steps + 1
    skips = read_skips(run_dir)
    return ReportedRun(
        name=name,
        path=run_dir,
        recipe=recipe,
        steps=steps,
        done=done,
        worst=worst,
        status=state.status or "not begun",
        reason=state.reason,
        fingerprint=stages[-1].fingerprint if stages else None,
        first_step=stages[-1].first_step if stages else 0,
        earlier=of_stages.earlier,
        branched_from=state.branched_from,
        starts=tuple(start_facts(start) for start in of_steps(read_starts(run_dir), end)),
        checkpoints=tuple(checkpoints),
        stalls=stalls_of_run(run_dir),
        bad_texts=skips.texts,
        rewound=skips.rewound,
        evaluations=tuple(read_results(run_dir)),
        tasks=tuple(read_task_results(run_dir)),
        data=data.manifest if data else None,
        data_dir=data.data_dir if data else None,
        lengths=data.lengths if data else (),
        documents=of_stages.documents,
        tokenizer=tokenizer or None,
        notes=tuple(notes),
    )


def read_runs(paths: Sequence[Path], data_dirs: Sequence[Path]) -> list[ReportedRun]:
    """All that is known of some runs. Raises UserError where a file of one is damaged."""
    names = names_of(paths)
    return [read_run(path, name, data_dirs) for path, name in zip(paths, names, strict=True)]


def strangers(runs: Sequence[ReportedRun], data_dirs: Sequence[Path]) -> list[Path]:
    """The data sets of a command line that are those of no run. Raises UserError for what is no
    data set.
    """
    of_runs = {run.fingerprint for run in runs}
    of_runs |= {stage.fingerprint for run in runs for stage in run.earlier}
    return [path for path in data_dirs if load_manifest(path).fingerprint not in of_runs]

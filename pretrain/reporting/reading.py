"""A run read back whole, through the owner of each of its files.

What is missing beside the record of its steps becomes a note, and the report says it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_prep.errors import UserError, one_line, parse_yaml
from data_prep.manifest import Manifest, load_manifest
from pretrain.checkpoint.layout import LOGS_NAME, MANIFEST_NAME, saved_steps, step_of
from pretrain.checkpoint.manifest import CheckpointManifest
from pretrain.config.load import build_recipe
from pretrain.config.recipe import Recipe
from pretrain.evaluation.result import read_results
from pretrain.metrics.step_columns import StepColumns, read_columns
from pretrain.reporting.compared import worst_steps
from pretrain.reporting.data_set import (
    SourceLengths,
    StepDocuments,
    documents_of_steps,
    source_lengths,
)
from pretrain.reporting.reported_run import ReportedRun, StartFacts
from pretrain.run.directory import RECIPE_NAME, SKIPS_NAME
from pretrain.run.starts import Start, in_words, of_steps, read_starts
from pretrain.run.state import read_state

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


def data_of(
    data_dirs: Sequence[Path],
    fingerprint: str | None,
    manifest: CheckpointManifest | None,
    notes: list[str],
) -> DataAtHand | None:
    """The run's data set, where that is at hand; else a note says what is missing.

    Raises UserError where --data-dir names what is no data set.
    """
    lacks = "bytes a token, epochs and sources are not shown; --data-dir says where it is"
    for data_dir in data_dirs:
        given = load_manifest(data_dir)
        if given.fingerprint == fingerprint:
            return DataAtHand(data_dir=data_dir, manifest=given)
    if manifest is None:
        notes.append(f"no checkpoint tells where its data set is: {lacks}")
        return None
    path = Path(manifest.data_dir)
    if not path.is_dir():
        notes.append(f"its data set is not at {path}: {lacks}")
        return None
    try:
        found = load_manifest(path)
    except UserError as error:
        notes.append(f"its data set can't be read ({one_line(error)}): {lacks}")
        return None
    if found.fingerprint != fingerprint:
        notes.append(f"another data set is at {path} now: {lacks}")
        return None
    return DataAtHand(data_dir=path, manifest=found)


def look_into(data: DataAtHand, recipe: Recipe, steps: StepColumns, notes: list[str]) -> DataAtHand:
    """Also what its shards tell; what can't be read of them becomes a note."""
    worst = [found.step for found in worst_steps(steps)]
    lengths: tuple[SourceLengths, ...] = ()
    documents: dict[int, StepDocuments] = {}
    try:
        lengths = source_lengths(data.data_dir, data.manifest.fingerprint)
        documents = documents_of_steps(data.data_dir, recipe, worst)
    except UserError as error:
        notes.append(f"not all that its shards tell is shown ({one_line(error)})")
    return replace(data, lengths=lengths, documents=documents)


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
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
    )


def bad_texts(run_dir: Path) -> dict[int, str]:
    """The text of the worst row of each bad step."""
    if not (run_dir / SKIPS_NAME).is_file():
        return {}
    from pretrain.run.bad_steps import worst_texts  # with torch, for which few runs need wait

    return worst_texts(run_dir)


def read_run(run_dir: Path, name: str, data_dirs: Sequence[Path]) -> ReportedRun:
    """All that is known of a run. Raises UserError where a file of it is damaged."""
    notes: list[str] = []
    state = read_state(run_dir)
    manifest = newest_manifest(run_dir, notes)
    recipe = recipe_of(run_dir, manifest, notes)
    steps = read_columns(run_dir)
    if len(steps) == 0:
        notes.append("it has not finished a step yet, so there are no curves")
    if steps.missing:
        notes.append(
            f"{steps.missing:,} steps have no line in metrics.jsonl; curves leave them out"
        )
    fingerprint = state.fingerprint
    if fingerprint is None and manifest is not None:
        fingerprint = manifest.fingerprint
    data = data_of(data_dirs, fingerprint, manifest, notes)
    if data is not None:
        data = look_into(data, recipe, steps, notes)
    tokenizer = data.manifest.tokenizer_sha256 if data else None
    if manifest and manifest.data.tokenizer_sha256:
        tokenizer = manifest.data.tokenizer_sha256
    end = recipe.total_steps + 1
    checkpoints = [step_of(path.name) for path in reversed(saved_steps(run_dir))]
    return ReportedRun(
        name=name,
        path=run_dir,
        recipe=recipe,
        steps=steps,
        status=state.status or "not begun",
        reason=state.reason,
        fingerprint=fingerprint,
        branched_from=state.branched_from,
        starts=tuple(start_facts(start) for start in of_steps(read_starts(run_dir), end)),
        checkpoints=tuple(step for step in checkpoints if step is not None),
        has_stalled=(run_dir / LOGS_NAME).is_dir(),
        bad_texts=bad_texts(run_dir),
        evaluations=tuple(read_results(run_dir)),
        data=data.manifest if data else None,
        data_dir=data.data_dir if data else None,
        lengths=data.lengths if data else (),
        documents=data.documents if data else {},
        tokenizer=tokenizer or None,
        notes=tuple(notes),
    )


def read_runs(paths: Sequence[Path], data_dirs: Sequence[Path]) -> list[ReportedRun]:
    """All that is known of some runs. Raises UserError where a file of one is damaged."""
    names = names_of(paths)
    return [read_run(path, name, data_dirs) for path, name in zip(paths, names, strict=True)]

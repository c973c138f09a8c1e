"""What is known of a run that is reported, and the figures that follow from it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.manifest import BLOCK_SAMPLES, Manifest
from pretrain.checkpoint.layout import step_of
from pretrain.config.recipe import Recipe
from pretrain.evaluation.result import EvaluationResult
from pretrain.evaluation.task_results import TaskResult
from pretrain.metrics.step_columns import Floats, StepColumns
from pretrain.reporting.charts import Curves, EarlierRatios, Mark, last_step
from pretrain.reporting.data_set import SourceLengths, StepDocuments


@dataclass(frozen=True, kw_only=True)
class StartFacts:
    """What a start of a run ran on, in words: a line of its starts.jsonl."""

    step: int
    time: str
    command: str
    commit: str
    ranks: str
    hosts: int
    devices: str
    threads: str  # of a rank
    versions: str


@dataclass(frozen=True, kw_only=True)
class StandsOut:
    """A step whose loss is far above that of the steps before it."""

    done: int  # steps with it, so that the first is 1
    loss: float
    above: float  # the median of the steps before


@dataclass(frozen=True, kw_only=True)
class WorstSteps:
    """The steps of a run that stand out, and how they were looked for."""

    steps: tuple[StandsOut, ...] = ()  # the farthest above first
    before: int  # steps with whose median a step is compared
    least: float  # what counts, in nats above that median


@dataclass(frozen=True, kw_only=True)
class StageData:
    """A data set of a run, and its steps on it."""

    fingerprint: str
    steps: range  # from 0
    data: Manifest | None  # None where the data set is not at hand
    data_dir: Path | None
    lengths: tuple[SourceLengths, ...]


@dataclass(frozen=True, kw_only=True)
class ReportedRun:
    """All that a report says of a run."""

    name: str
    path: Path
    recipe: Recipe
    steps: StepColumns
    done: int  # steps, by the record, the checkpoints or the status: the most of them
    worst: WorstSteps | None  # None where too few steps were trained
    status: str
    reason: str | None
    fingerprint: str | None  # of the data set; of several, of the newest
    first_step: int  # of that data set, from 0
    earlier: tuple[StageData, ...]  # data sets before it, oldest first
    branched_from: str | None
    starts: tuple[StartFacts, ...]
    checkpoints: tuple[int, ...]  # steps, in order
    stalls: tuple[str, ...]  # when ranks stalled, in order, as starts tell their times
    bad_texts: dict[int, str]  # of the worst row of bad steps, which count from 0 here
    rewound: frozenset[int]  # bad steps that the run went back before, from 0
    evaluations: tuple[EvaluationResult, ...]
    tasks: tuple[TaskResult, ...]  # of lm-eval
    data: Manifest | None  # None where the data set is not at hand
    data_dir: Path | None  # of that
    lengths: tuple[SourceLengths, ...]
    documents: dict[int, StepDocuments]  # of the steps that stand out
    tokenizer: str | None  # its identity
    notes: tuple[str, ...]  # what is missing, and what to do

    @property
    def lacks_record(self) -> bool:
        """Whether it has trained, and nothing tells of its steps."""
        return self.done > 0 and len(self.steps) == 0


@dataclass(frozen=True, kw_only=True)
class BytesPerToken:
    """UTF-8 bytes a token, by which a loss becomes bits per byte; None where they aren't known."""

    training: float | None
    validation: float | None

    @property
    def is_known(self) -> bool:
        """Both of them."""
        return self.training is not None and self.validation is not None


@dataclass(frozen=True, kw_only=True)
class BestValidation:
    """The lowest validation loss on the newest data set."""

    loss: float
    done: int  # steps before it


def curves_of(run: ReportedRun) -> Curves:
    """What is drawn of a run."""
    ratios = bytes_per_token(run)
    return Curves(
        name=run.name,
        recipe=run.recipe,
        fingerprint=run.fingerprint,
        steps=run.steps,
        bytes_per_token=ratios.training,
        validation_bytes_per_token=ratios.validation,
        marks=tuple(marks_of(run)),
        earlier=tuple(ratios_before(stage) for stage in run.earlier),
    )


def ratios_before(stage: StageData) -> EarlierRatios:
    """Bytes a token of a data set before the newest."""
    return EarlierRatios(
        end=stage.steps.stop,
        training=drawn_ratio(stage.data) if stage.data else None,
        validation=ratio_of(stage.data, "validation") if stage.data else None,
    )


def bytes_per_token(run: ReportedRun) -> BytesPerToken:
    """Of the text that a run trains on, and of the validation split, both of its newest data.

    From the data set or, where that is gone, from an evaluation on it: of the validation split for
    both.
    """
    if run.data is not None:
        return BytesPerToken(
            training=drawn_ratio(run.data),
            validation=ratio_of(run.data, "validation"),
        )
    for result in reversed(run.evaluations):
        whole = result.whole_split
        if result.data_dir is None and whole.targets and whole.text_bytes:
            measured = whole.text_bytes / whole.targets
            return BytesPerToken(training=measured, validation=measured)
    return BytesPerToken(training=None, validation=None)


def drawn_ratio(data: Manifest) -> float | None:
    """Bytes a token of training samples, as the shares of the sources draw them."""
    drawn = 0.0
    for source in data.sources:
        ratio = ratio_of(data, "train", source.name)
        if ratio is None:
            return None
        drawn += ratio * source.share
    return drawn / BLOCK_SAMPLES


def ratio_of(data: Manifest, split: str, source: str | None = None) -> float | None:
    """Bytes a token of a split or a source; None where there is no text behind the tokens."""
    text_bytes = 0
    for shard in data.shards_of(split, source):
        text_bytes += shard.text_bytes
    tokens = data.tokens(split, source)
    if text_bytes == 0 or tokens == 0:
        return None
    return text_bytes / tokens


def marks_of(run: ReportedRun) -> list[Mark]:
    """What happened to a run, kind by kind."""
    marks = [
        Mark(kind="checkpoint", step=step, words=f"checkpoint after step {step:,}")
        for step in run.checkpoints
    ]
    newer = [(stage.steps.start, stage.fingerprint) for stage in run.earlier[1:]]
    if run.earlier:
        newer.append((run.first_step, str(run.fingerprint)))
    for first, fingerprint in newer:
        words = f"other data from step {first + 1:,} on: {fingerprint}"
        marks.append(Mark(kind="data", step=first, words=words))
    begins_at = branched_at(run)
    for start in run.starts:
        if start.step == 0:
            continue
        words = f"went on after step {start.step:,}, {start.time}"
        if start.step == begins_at:
            words = f"branched from {run.branched_from}, {start.time}"
            begins_at = None  # a later start from there is one of its own
        marks.append(Mark(kind="restart", step=start.step, words=words))
    for step in run.steps.skipped:
        done = step.step + 1
        words = f"step {done:,} skipped: {step.skipped}"
        if step.step in run.rewound:
            words += "; the run went back to the checkpoint before it"
        marks.append(Mark(kind="skip", step=done, words=words))
    marks += stalls_of(run)
    return marks


def stalls_of(run: ReportedRun) -> list[Mark]:
    """Where a run stalled: at the step that it went on from afterwards, or at its end."""
    marks = []
    for time in run.stalls:
        later = [start.step for start in run.starts if start.time > time]
        step = later[0] if later else last_step(run.steps)
        words = f"stalled, {time}: logs/ has the stack of every rank"
        marks.append(Mark(kind="stall", step=step, words=words))
    if run.reason and "stalled" in run.reason:
        # the newest, in more words
        del marks[-1:]
        marks.append(Mark(kind="stall", step=last_step(run.steps), words=run.reason))
    return marks


def branched_at(run: ReportedRun) -> int | None:
    """The step of another run's checkpoint that a branch began from."""
    if run.branched_from is None:
        return None
    return step_of(Path(run.branched_from).name)


def tokens_on(run: ReportedRun, steps: range) -> int:
    """How many tokens a run has seen in some of its steps."""
    of_step = run.recipe.batch.global_batch_tokens
    seen = int(tokens_of(run)) - steps.start * of_step
    return max(0, min(seen, len(steps) * of_step))


def tokens_of(run: ReportedRun) -> float:
    """How many tokens a run has seen."""
    if len(run.steps) == 0:
        return 0.0
    tokens = run.steps.column("tokens")
    return float(tokens[-1])


def known(steps: StepColumns, name: str) -> Floats:
    """The values of a figure where there are some."""
    column = steps.column(name)
    values: Floats = column[~np.isnan(column)]
    return values


def best_step(run: ReportedRun) -> BestValidation | None:
    """The lowest validation loss on the newest data set; None where none was made."""
    losses = run.steps.column("val_loss")
    # those on other text can't be compared with it
    losses = np.where(run.steps.column("step") < run.first_step, np.nan, losses)
    if np.isnan(losses).all():
        return None
    row = int(np.nanargmin(losses))
    step = run.steps.column("step")[row]
    return BestValidation(loss=float(losses[row]), done=int(step) + 1)

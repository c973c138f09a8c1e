"""The figures of an evaluation as they are printed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pretrain.data.stages import DataStage, steps_of_stage
from pretrain.evaluation.intervals import FEW_DOCUMENTS, Interval
from pretrain.evaluation.result import EvaluationResult, Score
from pretrain.evaluation.task_results import TaskResult
from pretrain.view.templates import render

WHOLE = "whole split"


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of a text, or of a run."""

    name: str
    score: Score
    loss_interval: str
    bits_interval: str
    documents: str


def interval_text(interval: Interval | None) -> str:
    """An interval in four decimals; empty if there is none."""
    if interval is None:
        return ""
    return f"{interval.low:.4f}-{interval.high:.4f}"


def rows_of(scores: Mapping[str, Score]) -> list[Row]:
    """A row for each text or run."""
    rows = []
    for name, score in scores.items():
        row = Row(
            name=name,
            score=score,
            loss_interval=interval_text(score.loss_interval),
            bits_interval=interval_text(score.bits_per_byte_interval),
            documents="" if score.documents is None else f"{score.documents:,}",
        )
        rows.append(row)
    return rows


def scores_page(title: str, scores: Mapping[str, Score], result: EvaluationResult) -> str:
    """A table of scores that were made as this result's were, below a title."""
    rows = rows_of(scores)
    counts = [score.documents or 0 for score in scores.values()]
    return render(
        "evaluation.txt.jinja",
        title=title,
        rows=rows,
        name_width=max(len(row.name) for row in rows),
        stride=result.stride,
        bootstrap=result.bootstrap,
        few=FEW_DOCUMENTS if min(counts) < FEW_DOCUMENTS else None,
    )


def result_page(place: str, result: EvaluationResult, stages: Sequence[DataStage]) -> str:
    """The figures of one checkpoint: of the whole, and of each source where there are several.

    `stages` are the data sets that its steps were trained on, oldest first.
    """
    scores = {WHOLE: result.whole_split}
    if len(result.sources) > 1:
        scores |= result.sources
    title = place
    if result.data_dir is not None:
        trained = "not trained on"
        for stage in stages:
            if stage.fingerprint == result.fingerprint:
                trained = f"trained on {steps_of_stage(stages, stage)}"
        said = f"which the run was {trained}"
        if not stages:
            said = "and what its imported weights were trained on is not known"
        title += f" on {result.data_dir} ({result.fingerprint}), {said}"
    return scores_page(title, scores, result)


def results_page(places: Sequence[str], results: Sequence[EvaluationResult]) -> str:
    """The figures of several checkpoints, one below another."""
    scores = {}
    for place, result in zip(places, results, strict=True):
        scores[place] = result.whole_split
    return scores_page("side by side", scores, results[0])


def tasks_page(place: str, results: Sequence[TaskResult]) -> str:
    """What a checkpoint gave on tasks, a line for each metric."""
    return render(
        "tasks.txt.jinja",
        place=place,
        results=results,
        task_width=max(len(result.task) for result in results),
        metric_width=max(len(metric.name) for result in results for metric in result.metrics),
        lm_eval=results[0].lm_eval,
    )

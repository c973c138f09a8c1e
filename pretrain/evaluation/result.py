"""What a model was measured to be, and the files in a run's directory that keep it.

    evaluation.json                               the newest checkpoint, on the run's own data set
    evaluations/step-00000100.json                the checkpoint of --step 100
    evaluations/step-00000100.FINGERPRINT.json    on another data set of the same tokenizer

Only this module knows their fields.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, parse_json
from data_prep.files import write_durably
from pretrain.checkpoint.layout import step_name

EVALUATION_NAME = "evaluation.json"
EVALUATIONS_NAME = "evaluations"
ADVICE = "run python -m pretrain.evaluate again, or remove it"

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Score:
    """The figures of a text under a model; those without anything to divide by are NaN."""

    targets: int  # ids that were predicted, end-of-document ids included
    text_bytes: int  # of the text in UTF-8, without end-of-document
    loss: float  # nats a target
    perplexity: float
    bits_per_byte: float


FIGURES = tuple(field.name for field in fields(Score))


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The figures of one checkpoint on one data set's validation split."""

    step: int
    fingerprint: str  # of the data set
    whole_split: Score
    sources: dict[str, Score]
    data_dir: Path | None = None  # of a data set that the run was not trained on

    def to_bytes(self) -> bytes:
        """The file's content."""
        content: Json = {"step": self.step, "fingerprint": self.fingerprint}
        content |= asdict(self.whole_split)
        content["sources"] = {name: asdict(score) for name, score in self.sources.items()}
        if self.data_dir is not None:
            content["data_dir"] = str(self.data_dir)
        return json.dumps(content, indent=1).encode()


def result_path(run_dir: Path, result: EvaluationResult, *, is_newest: bool) -> Path:
    """Where a result is kept, so that none takes the place of another.

    `is_newest` is for that of the newest checkpoint.
    """
    is_own_data = result.data_dir is None
    if is_newest and is_own_data:
        return run_dir / EVALUATION_NAME
    name = step_name(result.step)
    if not is_own_data:
        name = f"{name}.{result.fingerprint}"
    return run_dir / EVALUATIONS_NAME / f"{name}.json"


def write_result(result: EvaluationResult, path: Path) -> None:
    """Write a result where `result_path` says. Raises OSError where that can't be."""
    write_durably(path, result.to_bytes())


def read_result(run_dir: Path, step: int) -> EvaluationResult | None:
    """What was measured after so many steps on the run's own data, if that was done.

    Raises UserError for a file that is not what this module writes.
    """
    # The first may be of another step by now: the run was trained and evaluated again.
    of_newest = run_dir / EVALUATION_NAME
    of_step = run_dir / EVALUATIONS_NAME / f"{step_name(step)}.json"
    for path in (of_newest, of_step):
        if not path.is_file():
            continue
        content: Any = parse_json(path.read_bytes(), str(path), ADVICE)
        if not isinstance(content, dict):
            raise UserError(f"{path}: not what pretrain.evaluate writes; {ADVICE}")
        if content.get("step") == step:
            return result_from(content, path)
    return None


def read_results(run_dir: Path) -> list[EvaluationResult]:
    """All that was measured of a run, by step; of several data sets, its own first.

    Raises UserError for a file that is not what this module writes.
    """
    paths = sorted((run_dir / EVALUATIONS_NAME).glob("*.json"))
    of_newest = run_dir / EVALUATION_NAME
    if of_newest.is_file():
        paths.append(of_newest)
    # One step may stand in both places, and is measured to be the same.
    found = {}
    for path in paths:
        content: Any = parse_json(path.read_bytes(), str(path), ADVICE)
        if not isinstance(content, dict) or not isinstance(content.get("step"), int):
            raise UserError(f"{path}: not what pretrain.evaluate writes; {ADVICE}")
        result = result_from(content, path)
        found[result.step, result.data_dir is not None, result.fingerprint] = result
    return [found[key] for key in sorted(found)]


def result_from(content: Json, path: Path) -> EvaluationResult:
    """The result in a file's JSON object. Raises UserError where figures are missing in it."""
    sources = content.get("sources")
    if not isinstance(sources, dict):
        raise UserError(f"{path}: lacks the figures of each source; {ADVICE}")
    data_dir = content.get("data_dir")
    return EvaluationResult(
        step=content["step"],
        fingerprint=str(content.get("fingerprint")),
        whole_split=score_from(content, path),
        sources={name: score_from(figures, path) for name, figures in sources.items()},
        data_dir=None if data_dir is None else Path(str(data_dir)),
    )


def score_from(content: Any, path: Path) -> Score:
    """The figures of one text in a file. Raises UserError where one is missing."""
    told: Json = content if isinstance(content, dict) else {}
    figures = {name: told.get(name) for name in FIGURES}
    if not all(isinstance(figure, int | float) for figure in figures.values()):
        raise UserError(f"{path}: lacks figures of {', '.join(FIGURES)}; {ADVICE}")
    return Score(**figures)  # type: ignore[arg-type]  # numbers, as seen just now

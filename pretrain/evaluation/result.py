"""What a model was measured to be, and the files in a run's directory that keep it.

    evaluation.json                               the newest checkpoint, on the run's own data set
    evaluations/step-00000100.json                the checkpoint of --step 100
    evaluations/step-00000100.FINGERPRINT.json    on another data set of the same tokenizer
    evaluations/step-00000100.DIGEST.json         on the text of files
    evaluations/step-00000100.stride-64.json      in windows that slide, of any of these

Beside each lie the scores of its documents (pretrain/evaluation/documents.py). Only this module
knows their fields. What earlier versions wrote has no intervals.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, parse_json
from data_prep.files import write_durably
from pretrain.checkpoint.layout import step_name
from pretrain.evaluation.intervals import Bootstrap, Interval

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
    documents: int | None = None
    # By documents drawn anew, as `EvaluationResult.bootstrap` says; None for fewer than two.
    loss_interval: Interval | None = None
    bits_per_byte_interval: Interval | None = None

    def to_json(self) -> Json:
        """The fields that a file holds: those that are known."""
        content: Json = {name: getattr(self, name) for name in FIGURES}
        if self.documents is not None:
            content["documents"] = self.documents
        for name in INTERVALS:
            interval = getattr(self, name)
            if interval is not None:
                content[name] = [interval.low, interval.high]
        return content


FIGURES = ("targets", "text_bytes", "loss", "perplexity", "bits_per_byte")
INTERVALS = ("loss_interval", "bits_per_byte_interval")


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The figures of one checkpoint on one data set's validation split, or on a text."""

    step: int
    fingerprint: str  # of the data set, or the digest of the text
    whole_split: Score
    sources: dict[str, Score]
    data_dir: Path | None = None  # of a data set or a text that the run was not trained on
    stride: int | None = None  # between windows that slide; None: blocks side by side
    bootstrap: Bootstrap | None = None  # how the intervals were made

    def to_bytes(self) -> bytes:
        """The file's content."""
        content: Json = {"step": self.step, "fingerprint": self.fingerprint}
        content |= self.whole_split.to_json()
        content["sources"] = {name: score.to_json() for name, score in self.sources.items()}
        if self.data_dir is not None:
            content["data_dir"] = str(self.data_dir)
        if self.stride is not None:
            content["stride"] = self.stride
        if self.bootstrap is not None:
            content["bootstrap"] = asdict(self.bootstrap)
        return json.dumps(content, indent=1).encode()


def result_path(run_dir: Path, result: EvaluationResult, *, is_newest: bool) -> Path:
    """Where a result is kept, so that none takes the place of another.

    `is_newest` is for that of the newest checkpoint.
    """
    is_own_data = result.data_dir is None
    is_in_blocks = result.stride is None
    if is_newest and is_own_data and is_in_blocks:
        return run_dir / EVALUATION_NAME
    name = step_name(result.step)
    if not is_own_data:
        name += f".{result.fingerprint}"
    if not is_in_blocks:
        name += f".stride-{result.stride}"
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
    """All that was measured of a run, by step; of several data sets, its own first, in blocks
    before sliding windows.

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
        stride = result.stride or 0  # blocks first
        found[result.step, result.data_dir is not None, result.fingerprint, stride] = result
    return [found[key] for key in sorted(found)]


def result_from(content: Json, path: Path) -> EvaluationResult:
    """The result in a file's JSON object. Raises UserError where figures are missing in it."""
    sources = content.get("sources")
    if not isinstance(sources, dict):
        raise UserError(f"{path}: lacks the figures of each source; {ADVICE}")
    data_dir = content.get("data_dir")
    stride = content.get("stride")
    if stride is not None and not isinstance(stride, int):
        raise UserError(f"{path}: its stride is no number; {ADVICE}")
    return EvaluationResult(
        step=content["step"],
        fingerprint=str(content.get("fingerprint")),
        whole_split=score_from(content, path),
        sources={name: score_from(figures, path) for name, figures in sources.items()},
        data_dir=None if data_dir is None else Path(str(data_dir)),
        stride=stride,
        bootstrap=bootstrap_from(content.get("bootstrap"), path),
    )


def bootstrap_from(content: Any, path: Path) -> Bootstrap | None:
    """How a file's intervals were made. Raises UserError where it does not say so."""
    if content is None:
        return None
    names = asdict(Bootstrap())
    told: Json = content if isinstance(content, dict) else {}
    if told.keys() != names.keys() or not all(is_number(value) for value in told.values()):
        raise UserError(f"{path}: does not say how its intervals were made; {ADVICE}")
    return Bootstrap(**told)


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number; its true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def score_from(content: Any, path: Path) -> Score:
    """The figures of one text in a file.

    Raises UserError where one is missing, or what is said of intervals is none.
    """
    told: Json = content if isinstance(content, dict) else {}
    figures = {name: told.get(name) for name in FIGURES}
    if not all(is_number(figure) for figure in figures.values()):
        raise UserError(f"{path}: lacks figures of {', '.join(FIGURES)}; {ADVICE}")
    documents = told.get("documents")
    if documents is not None and not isinstance(documents, int):
        raise UserError(f"{path}: its number of documents is none; {ADVICE}")
    found = {name: interval_from(told.get(name), path) for name in INTERVALS}
    return Score(**figures, documents=documents, **found)  # type: ignore[arg-type]  # as seen


def interval_from(content: Any, path: Path) -> Interval | None:
    """An interval of a file. Raises UserError for what is none."""
    if content is None:
        return None
    is_pair = isinstance(content, list) and len(content) == 2
    if not is_pair or not all(is_number(value) for value in content):
        raise UserError(f"{path}: an interval that is no pair of numbers; {ADVICE}")
    low, high = content
    return Interval(low=low, high=high)

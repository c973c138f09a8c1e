"""What a model scored on a task of lm-eval, and the file in a run's directory that keeps it.

    evaluations/tasks/step-00000100.TASK.json              the checkpoint after 100 steps
    evaluations/tasks/step-00000100.TASK.limit-10.json     the first 10 questions of the task alone

Only this module knows their fields.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pydantic

from data_prep.errors import UserError, first_problem, parse_json
from data_prep.files import write_durably
from pretrain.checkpoint.layout import step_name
from pretrain.evaluation.result import EVALUATIONS_NAME

TASKS_NAME = "tasks"
ADVICE = "run python -m pretrain.evaluate --tasks again, or remove it"


@dataclass(frozen=True, kw_only=True)
class TaskMetric:
    """One figure of a task."""

    name: str  # as lm-eval names it, such as acc or bits_per_byte
    filter: str  # what took the answer out of what the model wrote; none where there is nothing to
    value: float
    standard_error: float | None = None  # as lm-eval tells it, where it tells one


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The figures of one checkpoint on one task, or on a group of tasks."""

    step: int
    task: str
    version: str  # of the task
    samples: int | None  # questions that were asked; None of a group
    limit: int | None  # of the task's questions, the first so many alone
    metrics: tuple[TaskMetric, ...]
    lm_eval: str  # its version

    def to_bytes(self) -> bytes:
        """The file's content."""
        return json.dumps(asdict(self), indent=1).encode()


def task_result_path(run_dir: Path, result: TaskResult) -> Path:
    """Where a result is kept; a part of a task never takes the place of the whole."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", result.task)
    name = f"{step_name(result.step)}.{name}"
    if result.limit is not None:
        name += f".limit-{result.limit}"
    return run_dir / EVALUATIONS_NAME / TASKS_NAME / f"{name}.json"


def write_task_results(results: Iterable[TaskResult], run_dir: Path) -> None:
    """Write results where `task_result_path` says. Raises OSError where that can't be."""
    for result in results:
        write_durably(task_result_path(run_dir, result), result.to_bytes())


def read_task_results(run_dir: Path) -> list[TaskResult]:
    """All that was measured of a run on tasks, by the files' names.

    Raises UserError for a file that is not what this module writes.
    """
    results = []
    for path in sorted((run_dir / EVALUATIONS_NAME / TASKS_NAME).glob("*.json")):
        content: Any = parse_json(path.read_bytes(), str(path), ADVICE)
        try:
            results.append(pydantic.TypeAdapter(TaskResult).validate_python(content))
        except pydantic.ValidationError as error:
            problem = first_problem(error, lambda _: "this version writes no such key")
            raise UserError(f"{path}: {problem}; {ADVICE}") from None
    return results

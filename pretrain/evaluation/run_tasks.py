"""Tasks of EleutherAI's lm-eval: found by their names, loaded, and put to a run's model.

Those of a folder of task files and those that come with this project need no network, and are
looked for first; lm-eval's own thousands take a quarter of a minute to list, and fetch their
questions.
"""

import contextlib
import difflib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_prep.errors import UserError, explained
from pretrain.evaluation.open_run import OpenCheckpoint
from pretrain.evaluation.scoring import scoring_module
from pretrain.evaluation.task_results import TaskMetric, TaskResult
from pretrain.evaluation.text import run_encoder

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

OWN_TASKS = Path(__file__).with_name("tasks")
SEED = 1234  # of few-shot examples and drawn answers, lm-eval's own default
RESAMPLES = 1_000  # for the standard error of metrics that are no means


@dataclass(frozen=True, kw_only=True)
class AskedTasks:
    """Which tasks, and how much of each."""

    names: tuple[str, ...]
    include_path: Path | None  # a folder of task files
    limit: int | None  # the first so many questions alone


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """What a run gave on all tasks, and what is to be said of it."""

    results: tuple[TaskResult, ...]
    cut_short: int  # answers that the context had less room for than their task allows


def load_tasks(asked: AskedTasks) -> Any:
    """The tasks with their questions, as lm-eval's evaluator takes them.

    Files that a task names are looked for beside its own. Raises UserError for a name that nobody
    knows, and for a task that can't be loaded.
    """
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    with quiet_lm_eval():
        manager = manager_of(asked)
        for name in asked.names:
            home = home_of(manager, name)
            advice = "mend its file, or see that its questions are where it says"
            with (
                explained(Exception, f"task {name}: lm-eval can't load it", advice),
                contextlib.chdir(home),
            ):
                found: dict[str, Any] = dict(manager.load([name]))
            for part, of_part in loaded.items():
                of_part |= found.get(part) or {}
        for task in loaded["tasks"].values():
            # As lm-eval's own command does before it evaluates.
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
    return loaded


def manager_of(asked: AskedTasks) -> "TaskManager":
    """Who knows the tasks: of lm-eval's own too only where one is asked for.

    Raises UserError for a name that is none.
    """
    from lm_eval.tasks import TaskManager

    paths: list[str | Path] = [OWN_TASKS]
    if asked.include_path is not None:
        paths.append(asked.include_path.resolve())  # tasks are loaded from elsewhere
    manager = TaskManager(include_path=paths, include_defaults=False)
    if unknown_to(manager, asked.names):
        manager = TaskManager(include_path=paths)
    unknown = unknown_to(manager, asked.names)
    if unknown:
        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=1)
        advice = "python -m lm_eval ls tasks lists lm-eval's own"
        if close:
            advice = f"did you mean {close[0]}?"
        raise UserError(f"--tasks {unknown[0]}: no such task; {advice}")
    return manager


def unknown_to(manager: "TaskManager", names: Sequence[str]) -> list[str]:
    """The names that are no tasks'."""
    known = set(manager.all_tasks)
    return [name for name in names if name not in known]


def home_of(manager: "TaskManager", name: str) -> Path:
    """The folder of a task's file; the working directory of one that has none."""
    path = getattr(manager.task_index.get(name), "yaml_path", None)
    return Path(path).resolve().parent if path else Path.cwd()


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Have lm-eval and `datasets` say nothing below an error."""
    names = ("lm_eval", "datasets")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def score_tasks(opened: OpenCheckpoint, loaded: Any, asked: AskedTasks) -> TaskScores:
    """What the tasks measure of a checkpoint.

    Raises UserError for a prompt that its context has no room for, and where the run's tokenizer is
    not at hand.
    """
    from lm_eval.evaluator import evaluate

    from pretrain.evaluation.lm_eval_model import RunModel

    checkpoint = opened.checkpoint
    encoder = run_encoder(opened.run_dir, checkpoint.manifest.data.tokenizer_sha256)
    model = RunModel(scoring_module(checkpoint, encoder.tokenizer.eos_id), encoder)
    torch.manual_seed(SEED)
    with quiet_lm_eval():
        found: Any = evaluate(
            lm=model,
            task_dict=loaded,
            limit=asked.limit,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
        )
    results = []
    for task, figures in found["results"].items():
        result = TaskResult(
            step=checkpoint.step,
            task=task,
            version=str(found["versions"].get(task, "")),
            samples=found["n-samples"].get(task, {}).get("effective"),
            limit=asked.limit,
            metrics=metrics_of(figures),
            lm_eval=version("lm_eval"),
        )
        results.append(result)
    return TaskScores(results=tuple(results), cut_short=model.cut_short)


def metrics_of(figures: dict[str, Any]) -> tuple[TaskMetric, ...]:
    """The figures of a task; lm-eval calls them `name,filter` and `name_stderr,filter`."""
    metrics = []
    for key, value in figures.items():
        name, comma, filter_name = key.partition(",")
        is_figure = isinstance(value, int | float) and not name.endswith("_stderr")
        if not comma or not is_figure:
            continue
        error = figures.get(f"{name}_stderr,{filter_name}")
        metric = TaskMetric(
            name=name,
            filter=filter_name,
            value=float(value),
            standard_error=float(error) if isinstance(error, int | float) else None,
        )
        metrics.append(metric)
    return tuple(metrics)

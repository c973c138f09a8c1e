"""Score runs on a whole validation split or on other text, with the fp32 masters of the newest
checkpoint of each or of another.

    python -m pretrain.evaluate --run-dir RUN_DIR ... [--step N] [--data-dir DATASET | --text FILE]
                                [--stride N]
    python -m pretrain.evaluate --run-dir RUN_DIR ... --tasks NAME,... [--include-path DIR]

What is measured, and how, is in pretrain/evaluation/scoring.py; where the figures are kept, in
pretrain/evaluation/result.py. A run trained with intra_document_masking is scored with it. Tasks
are those of EleutherAI's lm-eval: pretrain/evaluation/run_tasks.py.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.commands import CommandParser, exit_code, large_number
from data_prep.errors import UserError

if TYPE_CHECKING:
    from pretrain.evaluation.open_run import AskedText, OpenCheckpoint
    from pretrain.evaluation.scoring import Measured

ABOUT = (
    "Loss, perplexity and bits per byte over the whole validation split or over other text, with "
    "the fp32 masters of the newest good checkpoint or of --step, and with intervals from "
    "documents drawn anew; also written into each run's directory: as evaluation.json of the "
    "newest checkpoint on the run's own data set, else below evaluations/."
)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises UserError for flags that do not go together."""
    parser = CommandParser(prog="python -m pretrain.evaluate", description=ABOUT)
    run_help = "directories of runs of pretrain.train, or of checkpoints of theirs"
    parser.add_argument(
        "--run-dir", required=True, type=Path, nargs="+", action="extend", help=run_help
    )
    step_help = "the checkpoint after N steps, in place of the newest"
    parser.add_argument("--step", type=int, metavar="N", help=step_help)
    add_text_flags(parser)
    add_task_flags(parser)
    flags = parser.parse_args(arguments)
    refuse_twice(flags.run_dir)
    check_task_flags(flags)
    check_text_flags(flags)
    return flags


def check_text_flags(flags: argparse.Namespace) -> None:
    """Raise UserError for flags of --text that do not go together."""
    if flags.text is not None and "://" in flags.text:
        raise UserError(f"--text {flags.text}: only local files are measured; fetch it first")
    if flags.text is None:
        for name in ("text_format", "text_field"):
            if getattr(flags, name) is not None:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag}: says how --text is to be read; give --text too")


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """What is measured, and in which windows."""
    what = parser.add_mutually_exclusive_group()
    data_help = (
        "the data set, if it moved since training, or another one made with the same tokenizer"
    )
    what.add_argument("--data-dir", type=Path, help=data_help)
    text_help = (
        "a file, or a glob, of any format that data preparation reads, in place of a data set"
    )
    what.add_argument("--text", metavar="FILE", help=text_help)
    format_help = "of --text, where its name does not tell: txt, jsonl, parquet and so on"
    parser.add_argument("--text-format", metavar="FORMAT", help=format_help)
    field_help = "of --text: the field or column of the text (text)"
    parser.add_argument("--text-field", metavar="NAME", help=field_help)
    stride_help = (
        "windows that slide by N tokens, so that each target has more before it, in place of "
        "blocks side by side; kept in a file of its own"
    )
    parser.add_argument("--stride", type=large_number, metavar="N", help=stride_help)


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    """Which tasks of lm-eval are put to the model, in place of a text."""
    tasks_help = (
        "tasks of EleutherAI's lm-eval in place of a text, such as first_letter (needs pip install "
        "-e '.[tasks]')"
    )
    parser.add_argument("--tasks", metavar="NAME,...", help=tasks_help)
    include_help = "of --tasks: a folder of task files of your own"
    parser.add_argument("--include-path", type=Path, metavar="DIR", help=include_help)
    limit_help = "of --tasks: only the first N questions of each"
    parser.add_argument("--limit", type=large_number, metavar="N", help=limit_help)


def check_task_flags(flags: argparse.Namespace) -> None:
    """Raise UserError for flags of --tasks that do not go together, and without lm-eval."""
    if flags.tasks is None:
        for name in ("include_path", "limit"):
            if getattr(flags, name) is not None:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag}: says something of --tasks; give --tasks too")
        return
    for name in ("data_dir", "text", "stride"):
        if getattr(flags, name) is not None:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: tasks bring their own text; leave it or --tasks out")
    if not all(flags.tasks.split(",")):
        raise UserError(f"--tasks {flags.tasks!r}: expected names with commas between them")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--tasks: the package lm-eval is not installed; install it with pip install -e "
            "'.[tasks]' in this project's folder"
        )
    if flags.include_path is not None and not flags.include_path.is_dir():
        raise UserError(
            f"--include-path {flags.include_path}: no such directory; give the folder of your "
            "task files (*.yaml)"
        )


def refuse_twice(places: Sequence[Path]) -> None:
    """Raise UserError for a run that is named twice."""
    seen = set()
    for place in places:
        if place.resolve() in seen:
            raise UserError(f"--run-dir {place}: is named twice; name each run once")
        seen.add(place.resolve())


def asked_text(flags: argparse.Namespace) -> "AskedText":
    """What the flags ask to measure."""
    from data_prep.tokenizer.text_files import DEFAULT_TEXT_FIELD, TextFile
    from pretrain.evaluation.open_run import AskedText

    files = None
    if flags.text is not None:
        files = TextFile(
            path=flags.text,
            format=flags.text_format,
            text_field=flags.text_field or DEFAULT_TEXT_FIELD,
        )
    return AskedText(data_dir=flags.data_dir, files=files, stride=flags.stride)


def keep(opened: "OpenCheckpoint", write: Callable[[Path], None]) -> None:
    """Write figures that were printed; where that can't be, they were not measured for nothing.

    `write` is given the run's directory.
    """
    if opened.run_dir is None:
        place = opened.checkpoint.path
        print(
            f"{place}: lies in no run's directory, so the figures are printed alone",
            file=sys.stderr,
        )
        return
    try:
        write(opened.run_dir)
    except OSError as error:
        place = error.filename or opened.run_dir
        print(
            f"warning: {place}: {error.strerror}; the figures above are not kept there",
            file=sys.stderr,
        )


def write_measured(measured: "Measured", opened: "OpenCheckpoint", run_dir: Path) -> None:
    """Write figures and the scores of their documents."""
    from pretrain.evaluation.documents import documents_path, write_documents
    from pretrain.evaluation.result import result_path, write_result

    path = result_path(run_dir, measured.result, is_newest=opened.is_newest)
    # The figures last: whoever finds them finds the documents of these figures beside.
    write_documents(measured.documents, documents_path(path))
    write_result(measured.result, path)


def measure_text(flags: argparse.Namespace) -> None:
    """Score runs on a text: print the figures, and keep them in each run's directory."""
    from pretrain.evaluation.open_run import open_run
    from pretrain.evaluation.scoring import measure
    from pretrain.view.evaluation_page import result_page, results_page

    asked = asked_text(flags)
    # All of them first: a bad one is refused before any is scored.
    runs = [open_run(place, flags.step, asked) for place in flags.run_dir]
    results = []
    for run in runs:
        measured = measure(run)
        checkpoint = run.opened.checkpoint
        stages = checkpoint.manifest.data_stages
        print(result_page(str(checkpoint.path), measured.result, stages), flush=True)
        keep(run.opened, partial(write_measured, measured, run.opened))
        results.append(measured.result)
    if len(results) > 1:
        places = [str(run.opened.checkpoint.path) for run in runs]
        print(f"\n{results_page(places, results)}", flush=True)


def put_tasks(flags: argparse.Namespace) -> None:
    """Put tasks of lm-eval to runs: print what they gave, and keep it in each run's directory."""
    from pretrain.evaluation.open_run import open_checkpoint
    from pretrain.evaluation.run_tasks import AskedTasks, load_tasks, score_tasks
    from pretrain.evaluation.task_results import write_task_results
    from pretrain.view.evaluation_page import tasks_page

    asked = AskedTasks(
        names=tuple(dict.fromkeys(flags.tasks.split(","))),
        include_path=flags.include_path,
        limit=flags.limit,
    )
    runs = [open_checkpoint(place, flags.step) for place in flags.run_dir]
    loaded = load_tasks(asked)
    for opened in runs:
        scores = score_tasks(opened, loaded, asked)
        print(tasks_page(str(opened.checkpoint.path), scores.results), flush=True)
        if scores.cut_short:
            print(
                f"{scores.cut_short:,} answers had less room in the model's context than their "
                "task allows",
                file=sys.stderr,
            )
        keep(opened, partial(write_task_results, scores.results))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    flags = parse_arguments(arguments)
    # These bring torch, which takes seconds: nobody waits for it to see --help or a mistyped flag.
    from pretrain.distributed.devices import keep_freed_memory

    keep_freed_memory()
    if flags.tasks is not None:
        put_tasks(flags)
    else:
        measure_text(flags)


def command() -> None:
    """The command as a process of its own, whose log is to hold no progress bars.

    lm-eval and `datasets` draw theirs into logs too, unless told so before tqdm is imported.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    main()


if __name__ == "__main__":
    sys.exit(exit_code(command))

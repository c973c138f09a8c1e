"""Score a run on a whole validation split, with the fp32 masters of its newest checkpoint or of
another.

    python -m pretrain.evaluate --run-dir RUN_DIR [--step N] [--data-dir DATASET]

What is measured, and how, is in pretrain/evaluation/scoring.py; where the figures are kept, in
pretrain/evaluation/result.py. A run trained with intra_document_masking is scored with it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.commands import CommandParser, exit_code
from pretrain.view.templates import render

if TYPE_CHECKING:
    from pretrain.evaluation.open_run import OpenRun
    from pretrain.evaluation.result import EvaluationResult

ABOUT = (
    "Loss, perplexity and bits per byte over the whole validation split, with the fp32 masters of "
    "the newest good checkpoint or of --step; also written into the run's directory: as "
    "evaluation.json of the newest checkpoint on the run's own data set, else below evaluations/."
)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="python -m pretrain.evaluate", description=ABOUT)
    run_help = "directory of a run of pretrain.train, or of one of its checkpoints"
    parser.add_argument("--run-dir", required=True, type=Path, help=run_help)
    step_help = "the checkpoint after N steps, in place of the newest"
    parser.add_argument("--step", type=int, metavar="N", help=step_help)
    data_help = (
        "the data set, if it moved since training, or another one made with the same tokenizer"
    )
    parser.add_argument("--data-dir", type=Path, help=data_help)
    return parser.parse_args(arguments)


def show(run: "OpenRun", result: "EvaluationResult") -> None:
    """Print the figures: of the whole split, and of each source where there are several."""
    rows = {"whole split": result.whole_split}
    if len(result.sources) > 1:
        rows |= result.sources
    other_data = None
    if result.data_dir is not None:
        other_data = f"{run.reader.data_dir} ({result.fingerprint})"
    page = render(
        "evaluation.txt.jinja",
        path=run.checkpoint.path,
        rows=rows,
        name_width=max(map(len, rows)),
        other_data=other_data,
    )
    print(page, flush=True)


def keep(run: "OpenRun", result: "EvaluationResult") -> None:
    """Write figures that were printed; where that can't be, they were not measured for nothing."""
    from pretrain.evaluation.result import result_path, write_result

    if run.run_dir is None:
        place = run.checkpoint.path
        print(
            f"{place}: lies in no run's directory, so the figures are printed alone",
            file=sys.stderr,
        )
        return
    path = result_path(run.run_dir, result, is_newest=run.is_newest)
    try:
        write_result(result, path)
    except OSError as error:
        print(
            f"warning: {path}: {error.strerror}; the figures above are not kept there",
            file=sys.stderr,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    flags = parse_arguments(arguments)
    # These bring torch, which takes seconds: nobody waits for it to see --help or a mistyped flag.
    from pretrain.distributed.devices import keep_freed_memory
    from pretrain.evaluation.open_run import open_run
    from pretrain.evaluation.scoring import evaluate

    keep_freed_memory()
    run = open_run(flags.run_dir, flags.step, flags.data_dir)
    result = evaluate(run.checkpoint, run.reader)
    show(run, result)
    keep(run, result)


if __name__ == "__main__":
    sys.exit(exit_code(main))

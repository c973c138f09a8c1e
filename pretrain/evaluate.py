"""Score runs on a whole validation split or on other text, with the fp32 masters of the newest
checkpoint of each or of another.

    python -m pretrain.evaluate --run-dir RUN_DIR ... [--step N] [--data-dir DATASET | --text FILE]
                                [--stride N]

What is measured, and how, is in pretrain/evaluation/scoring.py; where the figures are kept, in
pretrain/evaluation/result.py. A run trained with intra_document_masking is scored with it.
"""

import argparse
import sys
from collections.abc import Sequence
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
    "documents drawn anew; also written into each run's directory, as the README says where."
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
    flags = parser.parse_args(arguments)
    if flags.text is not None and "://" in flags.text:
        raise UserError(f"--text {flags.text}: only local files are measured; fetch it first")
    if flags.text is None:
        for name in ("text_format", "text_field"):
            if getattr(flags, name) is not None:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag}: says how --text is to be read; give --text too")
    refuse_twice(flags.run_dir)
    return flags


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


def keep(opened: "OpenCheckpoint", measured: "Measured") -> None:
    """Write figures that were printed; where that can't be, they were not measured for nothing."""
    from pretrain.evaluation.documents import documents_path, write_documents
    from pretrain.evaluation.result import result_path, write_result

    if opened.run_dir is None:
        place = opened.checkpoint.path
        print(
            f"{place}: lies in no run's directory, so the figures are printed alone",
            file=sys.stderr,
        )
        return
    path = result_path(opened.run_dir, measured.result, is_newest=opened.is_newest)
    try:
        # The figures last: whoever finds them finds the documents of these figures beside.
        write_documents(measured.documents, documents_path(path))
        write_result(measured.result, path)
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
    from pretrain.evaluation.scoring import measure
    from pretrain.view.evaluation_page import result_page, results_page

    keep_freed_memory()
    asked = asked_text(flags)
    # All of them first: a bad one is refused before any is scored.
    runs = [open_run(place, flags.step, asked) for place in flags.run_dir]
    results = []
    for run in runs:
        measured = measure(run)
        print(result_page(str(run.opened.checkpoint.path), measured.result), flush=True)
        keep(run.opened, measured)
        results.append(measured.result)
    if len(results) > 1:
        places = [str(run.opened.checkpoint.path) for run in runs]
        print(f"\n{results_page(places, results)}", flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Export a run to Hugging Face format or GGUF, from the fp32 masters of a checkpoint, without
DeepSpeed.

    python -m pretrain.export_hf --run-dir RUN_DIR --output-dir DIR
        [--architecture tablefree|gpt_neox|gguf] [--dtype ...] [--step N] [--overwrite]
    python -m pretrain.export_hf --check DIR

    tablefree   the model as trained, with no input table, and modeling_tablefree.py as remote code
    gpt_neox    a stock GPTNeoXForCausalLM, with the codes written out as its embedding table
    gguf        the same as one file for llama.cpp and the engines built on it

All give the same logits, those engines to 0.004. An export is a function of the checkpoint, its
evaluation, and whether the data set is at hand: made twice on one machine, its files are equal bit
for bit. Those that transformers loads end with a proof (pretrain/hf/certificate.py). What an export
may replace is in pretrain/hf/marker.py.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.commands import CommandParser, exit_code
from data_prep.errors import UserError
from pretrain.hf.names import AGAIN, DTYPES, GGUF, TABLEFREE

ABOUT = (
    "Export a checkpoint of a run, the newest good one unless --step names another, to Hugging "
    "Face format."
)


def build_parser() -> CommandParser:
    """The flags."""
    parser = CommandParser(prog="python -m pretrain.export_hf", description=ABOUT)
    run_help = "directory of a run of pretrain.train, or of one of its checkpoints"
    parser.add_argument("--run-dir", type=Path, help=run_help)
    output_help = (
        "where the export goes; an export of the same run that is there is replaced, nothing else"
    )
    parser.add_argument("--output-dir", type=Path, help=output_help)
    parser.add_argument("--step", type=int, metavar="N", help="export the checkpoint after N steps")
    overwrite_help = "replace an export of another run, or one whose files were edited"
    parser.add_argument("--overwrite", action="store_true", help=overwrite_help)
    form_help = (
        "tablefree: as trained, with remote code (default); gpt_neox: loads anywhere, codes as a "
        "table; gguf: the same for llama.cpp, as one file"
    )
    parser.add_argument("--architecture", choices=DTYPES, default=TABLEFREE, help=form_help)
    dtype_help = "of the weights: float32 (default) or bfloat16; of gguf f32 (default), f16 or q8_0"
    every_dtype = dict.fromkeys(dtype for dtypes in DTYPES.values() for dtype in dtypes)
    parser.add_argument("--dtype", choices=every_dtype, help=dtype_help)
    check_help = (
        "tell whether an export is whole and right with the transformers of today, and export "
        "nothing"
    )
    parser.add_argument("--check", type=Path, metavar="DIR", help=check_help)
    return parser


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises UserError for flags that don't go together."""
    parser = build_parser()
    flags = parser.parse_args(arguments)
    if flags.check is not None:
        for name, value in vars(flags).items():
            if name != "check" and value != parser.get_default(name):
                parser.error(f"{flag_of(name)} does not go with --check")
        return flags
    for name in ("run_dir", "output_dir"):
        if getattr(flags, name) is None:
            parser.error(f"{flag_of(name)} is missing")
    possible = DTYPES[flags.architecture]
    if flags.dtype is None:
        flags.dtype = possible[0]
    if flags.dtype not in possible:
        raise UserError(
            f"--dtype {flags.dtype}: --architecture {flags.architecture} takes "
            f"{' or '.join(possible)}"
        )
    return flags


def flag_of(name: str) -> str:
    """The flag that sets a name of the parsed ones."""
    return f"--{name.replace('_', '-')}"


def report(directory: Path) -> None:
    """Print what is to be said of an export. Raises UserError if something is wrong with it."""
    from pretrain.hf.check import check_export

    verdict = check_export(directory)
    print(verdict.about)
    for note in verdict.notes:
        print(f"note: {note}")
    if verdict.certificate is not None:
        print(f"certificate: {verdict.certificate}")
    if len(verdict.problems) == 1:
        raise UserError(verdict.problems[0])
    for problem in verdict.problems:
        print(f"problem: {problem}")
    if verdict.problems:
        raise UserError(
            f"{directory}: {len(verdict.problems)} problems; mend them as said above, or {AGAIN}"
        )
    print("whole, and right as far as is known")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    flags = parse_arguments(arguments)
    if flags.check is not None:
        report(flags.check)
        return
    # These bring torch and transformers, which take seconds: nobody waits for them to see --help
    # or a mistyped flag.
    from pretrain.hf.export import export, open_asked
    from pretrain.hf.gguf import require_gguf

    if flags.architecture == GGUF:
        require_gguf()
    asked = open_asked(flags.run_dir, flags.step, flags.architecture, flags.dtype)
    about_tokenizer = export(asked, flags.output_dir, overwrite=flags.overwrite)
    source = asked.checkpoint.path
    print(f"{flags.output_dir}: {flags.architecture} in {flags.dtype}, from {source}")
    for line in about_tokenizer:
        print(f"tokenizer: {line}")


if __name__ == "__main__":
    sys.exit(exit_code(main))

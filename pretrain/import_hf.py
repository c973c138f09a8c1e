"""Begin a run with the weights of a model in Hugging Face format.

    python -m pretrain.import_hf --from DIR --run-dir RUN_DIR [--recipe R] [--names FILE]

DIR is an export of either form, a stock GPT-NeoX with sequential residual and rotary positions over
the whole head, or a model whose config has the published models' keys. The run has one checkpoint,
at step 0, with an optimizer that has seen nothing: pretrain.train goes on from it,
pretrain.evaluate and pretrain.export_hf read it. What can't be imported is refused, naming the key
or the tensor.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.commands import CommandParser, exit_code
from data_prep.errors import UserError

ABOUT = "Begin a run with the weights of an export, of a GPT-NeoX or of a published model."


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="python -m pretrain.import_hf", description=ABOUT)
    from_help = "a directory with config.json, safetensors weights and a tokenizer"
    parser.add_argument("--from", dest="origin", required=True, type=Path, help=from_help)
    run_help = "the run to begin; nothing may be there yet"
    parser.add_argument("--run-dir", required=True, type=Path, help=run_help)
    recipe_help = (
        "how it will be trained; without one, as the export's marker tells or as `small` is"
    )
    parser.add_argument("--recipe", metavar="R", help=recipe_help)
    names_help = "which tensors of a published model are which of ours, in YAML"
    parser.add_argument("--names", type=Path, metavar="FILE", help=names_help)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    flags = parse_arguments(arguments)
    if not flags.origin.is_dir():
        raise UserError(
            f"--from {flags.origin}: no such directory; give the folder that holds config.json and "
            "the weights"
        )
    # These bring torch, which takes seconds: nobody waits for it to see --help or a mistyped flag.
    from pretrain.importing.begin import begin_run, open_import, refuse_what_is_there

    refuse_what_is_there(flags.run_dir)
    imported = open_import(flags.origin, flags.recipe, flags.names)
    begin_run(imported, flags.run_dir)
    config = imported.decoder.config
    print(f"{flags.run_dir}: {config.input_embedding}, step 0, from {imported.origin}")
    print(
        f"python -m pretrain.train --recipe {flags.run_dir / 'recipe.yaml'} --data-dir DATASET "
        f"--run-dir {flags.run_dir}"
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""From a row of a training step back to the documents it was made of.

    python -m pretrain.trace --run-dir RUN_DIR --data-dir DATASET --step S --row I

A row is a sample of the loader, a sample is a window of its source's stream of tokens, and the
document indexes name the input file and row of every document in it. [first:end] is a slice, as in
Python.
"""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from data_prep.commands import exit_code
from data_prep.errors import UserError, one_line, printable
from data_prep.manifest import Shard
from data_prep.shards import TOKENIZER_NAME, ShardReader
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.config.recipe_parser import RecipeParser
from pretrain.data.digests import check_shards
from pretrain.data.loader import TrainingLoader
from pretrain.data.provenance import Part, parts_of
from pretrain.run.directory import RECIPE_NAME
from pretrain.run.state import STATE_NAME, fingerprint_of


def describe_sample(loader: TrainingLoader, sample: int) -> str:
    """Where a sample comes from."""
    place = loader.place(sample)
    windows = loader.source(place.source).windows
    end = place.start + loader.seq_len + 1
    return (
        f"source     {place.source}, epoch {place.epoch}, ordinal {place.ordinal} of {windows}\n"
        f"window     tokens [{place.start}:{end}] of the source's training shards, one after "
        "another"
    )


def describe_part(part: Part, reader: ShardReader, tokenizer: Tokenizer, characters: int) -> str:
    """A document, what the window holds of it, and the beginning of that text.

    The end-of-document id has no text that is shown.
    """
    start = part.offsets.start
    stop = part.offsets.stop
    # The same in the document's own tokens.
    first = start - part.document.start
    last = stop - part.document.start
    total = len(part.document)
    is_whole_end = last == total
    end_of_text = stop - 1 if is_whole_end else stop
    ids = reader.tokens(part.shard)[start:end_of_text].tolist()
    text = tokenizer.decode(ids, skip_special_tokens=False)
    shown = text[:characters].replace("\r", "␍").replace("\n", "⏎")
    left = "…" if first > 0 else ""
    right = "" if is_whole_end and len(text) <= characters else "…"
    file, row = part.origin
    return (
        f"{file}, row {row}: its tokens [{first}:{last}] of {total}\n"
        f"  {part.shard.path}[{start}:{stop}]\n"
        f"  {left}{shown}{right}"
    )


@cache
def warn_of_damage(reader: ShardReader, shard: Shard) -> None:
    """Say on stderr that a shard is not as it was built.

    What a run has seen in it may be why one asks.
    """
    try:
        check_shards(reader, [shard])
    except UserError as error:
        print(f"warning: {one_line(error)}", file=sys.stderr)


def build_parser() -> RecipeParser:
    """The command line; what it doesn't know must be a dotted recipe key."""
    about = "From a row of a training step back to the documents it was made of."
    more = (
        "Steps, rows and all else count from 0. With --recipe, any recipe key can be set with "
        "--dotted.key=value."
    )
    parser = RecipeParser(prog="python -m pretrain.trace", description=about, epilog=more)
    run = parser.add_mutually_exclusive_group(required=True)
    run.add_argument("--run-dir", type=Path, help="directory of a run of pretrain.train")
    run.add_argument("--recipe", metavar="NAME|FILE", help="a shipped recipe or a YAML file")
    parser.add_argument("--data-dir", required=True, type=Path, help="the data set of the run")
    parser.add_argument(
        "--step", required=True, type=int, metavar="S", help="from 0, as in metrics.jsonl"
    )
    parser.add_argument(
        "--row", required=True, type=int, metavar="I", help="of the batch over all ranks, from 0"
    )
    parser.add_argument(
        "--characters", type=int, default=400, metavar="N", help="shown of a document (%(default)s)"
    )
    return parser


def recipe_of(run_dir: Path, fingerprint: str) -> Recipe:
    """The recipe of a run. Raises UserError if there is none, or it saw another data set."""
    for name in (RECIPE_NAME, STATE_NAME):
        if not (run_dir / name).is_file():
            raise UserError(
                f"--run-dir {run_dir}: no run is there, since {name} is missing; give the "
                "directory of a run, or its recipe with --recipe"
            )
    trained_on = fingerprint_of(run_dir)
    if trained_on != fingerprint:
        raise UserError(
            f"--data-dir: fingerprint {fingerprint}, but {run_dir} was trained on {trained_on}"
        )
    return load_recipe(str(run_dir / RECIPE_NAME))


def check_range(flag: str, number: int, end: int) -> None:
    """Raise UserError unless a flag's number is one of range(end)."""
    if not 0 <= number < end:
        raise UserError(f"--{flag} {number}: expected a number from 0 to {end - 1}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    flags, overrides = build_parser().parse_known_args(arguments)
    reader = ShardReader(flags.data_dir)
    reader.check_files()
    if flags.run_dir and overrides:
        raise UserError(
            f"{overrides[0]}: not a known flag; recipe keys can be set beside --recipe only"
        )
    if flags.run_dir:
        recipe = recipe_of(flags.run_dir, reader.manifest.fingerprint)
    else:
        recipe = load_recipe(flags.recipe, overrides, flags.data_dir)
    rows = recipe.global_batch_size
    check_range("step", flags.step, recipe.total_steps)
    check_range("row", flags.row, rows)
    check_range("characters", flags.characters, 2**31)
    loader = TrainingLoader(reader, seq_len=recipe.model.seq_len, seed=recipe.seed)
    tokenizer_file = flags.data_dir / TOKENIZER_NAME / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    sample = flags.step * rows + flags.row
    print(f"sample     {sample}: row {flags.row} of step {flags.step}, which has {rows} rows")
    print(describe_sample(loader, sample))
    for part in parts_of(loader, sample):
        warn_of_damage(reader, part.shard)
        described = describe_part(part, reader, tokenizer, flags.characters)
        print("\n" + printable(described))


if __name__ == "__main__":
    sys.exit(exit_code(main))

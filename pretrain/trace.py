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

from data_prep.commands import CommandParser, exit_code
from data_prep.errors import UserError, explained, one_line, parse_json, printable
from data_prep.manifest import Shard
from data_prep.shards import TOKENIZER_NAME, ShardReader
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.data.digests import check_shards
from pretrain.data.loader import TrainingLoader
from pretrain.data.provenance import Part, parts_of


def describe_sample(loader: TrainingLoader, sample: int) -> str:
    """Where a sample comes from."""
    place = loader.place(sample)
    windows, end = (
        loader.window_counts[loader.names.index(place.source)],
        place.start + loader.seq_len + 1,
    )
    drawn = f"source     {place.source}, epoch {place.epoch}, ordinal {place.ordinal} of {windows}"
    return f"{drawn}\nwindow     tokens [{place.start}:{end}] of the source's training shards, one after another"


def describe_part(part: Part, reader: ShardReader, tokenizer: Tokenizer, characters: int) -> str:
    """A document, what the window holds of it, and the beginning of that text, without the
    end-of-document id.
    """
    start, stop = part.offsets.start, part.offsets.stop
    first, last, total = start - part.document.start, stop - part.document.start, len(part.document)
    ids = reader.tokens(part.shard)[start : stop - (last == total)].tolist()
    text = tokenizer.decode(ids, skip_special_tokens=False)
    shown = text[:characters].replace("\r", "␍").replace("\n", "⏎")
    left, right = "…" * (first > 0), "…" * (last < total or len(text) > characters)
    head = f"{part.origin[0]}, row {part.origin[1]}: its tokens [{first}:{last}] of {total}"
    return f"{head}\n  {part.shard.path}[{start}:{stop}]\n  {left}{shown}{right}"


@cache
def warn_of_damage(reader: ShardReader, shard: Shard) -> None:
    """Say on stderr that a shard is not as it was built: what a run has seen in it may be why
    one asks.
    """
    try:
        check_shards(reader, [shard])
    except UserError as error:
        print(f"warning: {one_line(error)}", file=sys.stderr)


def build_parser() -> CommandParser:
    """The command line; what it doesn't know must be a dotted recipe key."""
    more = (
        "Steps, rows and all else count from 0. With --recipe, any recipe key can be set with "
        "--dotted.key=value."
    )
    parser = CommandParser(
        prog="python -m pretrain.trace", description=(__doc__ or "").split("\n")[0], epilog=more
    )
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
    """The recipe of a run. Raises UserError if the run saw another data set."""
    path = run_dir / "state.json"
    state = parse_json(path.read_bytes(), str(path), "use --recipe")
    with explained((KeyError, TypeError), f"{path}: damaged", "use --recipe"):
        trained_on = state["fingerprint"]
    if trained_on != fingerprint:
        raise UserError(
            f"--data-dir: fingerprint {fingerprint}, but {run_dir} was trained on {trained_on}"
        )
    return load_recipe(str(run_dir / "recipe.yaml"))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    flags, overrides = build_parser().parse_known_args(arguments)
    reader = ShardReader(flags.data_dir)
    reader.check_files()
    if flags.run_dir and overrides:
        raise UserError(
            f"{overrides[0]}: not a known flag; recipe keys can be set beside --recipe only"
        )
    fingerprint = reader.manifest.fingerprint
    if flags.run_dir:
        recipe = recipe_of(flags.run_dir, fingerprint)
    else:
        recipe = load_recipe(flags.recipe, overrides, flags.data_dir)
    rows = recipe.global_batch_size
    for name, end in (("step", recipe.total_steps), ("row", rows), ("characters", 2**31)):
        if not 0 <= getattr(flags, name) < end:
            raise UserError(
                f"--{name} {getattr(flags, name)}: expected a number from 0 to {end - 1}"
            )
    loader = TrainingLoader(reader, seq_len=recipe.model.seq_len, seed=recipe.seed)
    tokenizer = Tokenizer.from_file(str(flags.data_dir / TOKENIZER_NAME / "tokenizer.json"))
    sample = flags.step * rows + flags.row
    print(f"sample     {sample}: row {flags.row} of step {flags.step}, which has {rows} rows")
    print(describe_sample(loader, sample))
    for part in parts_of(loader, sample):
        warn_of_damage(reader, part.shard)
        print("\n" + printable(describe_part(part, reader, tokenizer, flags.characters)))


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""From a row of a training step back to the documents it was made of.

    python -m pretrain.trace --run-dir RUN_DIR --data-dir DATASET --step S --row I

A row is a sample of the loader, a sample is a window of its source's stream of tokens, and the
document indexes name the input file and row of every document in it. [first:end] is a slice, as in
Python.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
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
from pretrain.data.stages import DataStage, stage_at, steps_of_stage
from pretrain.run.directory import RECIPE_NAME
from pretrain.run.state import STATE_NAME, stages_of_run


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


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What is asked about: a run, or one to come, and its data set at a step."""

    recipe: Recipe
    reader: ShardReader
    stage: DataStage
    steps_of_stage: str  # in words; empty where all steps are of one data set


def of_run(run_dir: Path, given: ShardReader, step: int) -> Traced:
    """A run and the data set of a step: the one given or, where a run has several and it is another
    one of them, the one that the run's record finds.

    Raises UserError if there is no run, or the step's data set is not at hand.
    """
    for name in (RECIPE_NAME, STATE_NAME):
        if not (run_dir / name).is_file():
            raise UserError(
                f"--run-dir {run_dir}: no run is there, since {name} is missing; give the "
                "directory of a run, or its recipe with --recipe"
            )
    stages = stages_of_run(run_dir)
    fingerprints = [stage.fingerprint for stage in stages]
    fingerprint = given.manifest.fingerprint
    if fingerprint not in fingerprints:
        raise UserError(
            f"--data-dir: fingerprint {fingerprint}, but {run_dir} was trained on "
            f"{' and then '.join(fingerprints)}"
        )
    recipe = load_recipe(str(run_dir / RECIPE_NAME))
    check_range("step", step, recipe.total_steps)
    stage = stage_at(stages, step)
    steps = steps_of_stage(stages, stage) if len(stages) > 1 else ""
    reader = given
    if stage.fingerprint != fingerprint:
        reader = reader_of(stage, f"step {step}: {steps} {run_dir} was trained on")
    return Traced(recipe=recipe, reader=reader, stage=stage, steps_of_stage=steps)


def reader_of(stage: DataStage, what: str) -> ShardReader:
    """The data set of a stage, where it lay. Raises UserError if it is no longer there."""
    where = f"{what} the data set {stage.fingerprint}"
    advice = "give --data-dir with where it is now"
    try:
        reader = ShardReader(Path(stage.data_dir))
        reader.check_files()
    except UserError as error:
        raise UserError(f"{where}, which is not whole ({one_line(error)}); {advice}") from None
    if reader.manifest.fingerprint != stage.fingerprint:
        raise UserError(f"{where}, and another one is at {stage.data_dir} by now; {advice}")
    return reader


def of_recipe(name: str, overrides: Sequence[str], reader: ShardReader, step: int) -> Traced:
    """A run to come. Raises UserError for what is no recipe, or has no such step."""
    recipe = load_recipe(name, overrides, reader.data_dir)
    check_range("step", step, recipe.total_steps)
    only = DataStage(fingerprint=reader.manifest.fingerprint)
    return Traced(recipe=recipe, reader=reader, stage=only, steps_of_stage="")


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
        traced = of_run(flags.run_dir, reader, flags.step)
    else:
        traced = of_recipe(flags.recipe, overrides, reader, flags.step)
    recipe = traced.recipe
    reader = traced.reader
    rows = recipe.global_batch_size
    check_range("row", flags.row, rows)
    check_range("characters", flags.characters, 2**31)
    loader = TrainingLoader(reader, seq_len=recipe.model.seq_len, seed=recipe.seed)
    tokenizer_file = reader.data_dir / TOKENIZER_NAME / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    sample = flags.step * rows + flags.row - traced.stage.samples_before
    if traced.steps_of_stage:
        print(f"data set   {traced.stage.fingerprint}, {traced.steps_of_stage}")
        print(f"           {printable(str(reader.data_dir))}")
    print(f"sample     {sample}: row {flags.row} of step {flags.step}, which has {rows} rows")
    print(describe_sample(loader, sample))
    for part in parts_of(loader, sample):
        warn_of_damage(reader, part.shard)
        described = describe_part(part, reader, tokenizer, flags.characters)
        print("\n" + printable(described))


if __name__ == "__main__":
    sys.exit(exit_code(main))

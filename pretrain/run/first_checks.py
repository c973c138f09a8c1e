"""What of a run can be refused by arithmetic and by looking at files: within a second or two,
before torch is imported.

The training command checks it before its own imports, which take from seconds to most of a minute,
and again with all ranks at one table; launch/pretrain.sh checks it, with the ranks and the engine
that it would start, before it starts anything. No torch.
"""

import socket
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import (
    USER_ERROR_EXIT_CODE,
    UserError,
    one_line,
    os_error_line,
    parse_json,
    parse_yaml,
)
from data_prep.shards import TOKENIZER_NAME, ShardReader
from pretrain.checkpoint.layout import saved_steps
from pretrain.config.changes import ENGINE_MAY_CHANGE_ON_RESUME, refuse_changes
from pretrain.config.deepspeed import (
    DS_CONFIGS_DIR,
    accumulation_steps,
    load_engine_config,
    merge_config,
    monitor_objection,
)
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.costs.fit import check_it_fits
from pretrain.data.loader import TrainingLoader
from pretrain.data.tokenizer import open_tokenizer
from pretrain.distributed.world import LET_RANK_0_SPEAK_S, world_from_environment
from pretrain.generation.prompts import Prompt, encode_prompts
from pretrain.metrics.sinks import check_sinks
from pretrain.run.command_line import build_parser
from pretrain.run.directory import (
    ENGINE_CONFIG_NAME,
    RECIPE_NAME,
    refuse_another_tokenizer,
    refuse_what_is_no_run,
)
from pretrain.run.state import read_state
from pretrain.view.figures import counted

CPU_RANKS = 2  # of launch/pretrain.sh where there is no GPU, if they divide a step
CPU_ENGINE = "zero2_fp32"  # in the place of bf16, which CPUs are slow at


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked for, as far as it holds without its data set."""

    flags: Namespace
    recipe: Recipe
    engine_config: dict[str, Any]  # merged, for this number of ranks
    engine_note: str  # what is to be said of the engine; empty: nothing


@dataclass(frozen=True, kw_only=True)
class AskedOnData(Asked):
    """What was asked for, as far as it holds anywhere."""

    reader: ShardReader
    loader: TrainingLoader
    prompts: tuple[Prompt, ...]


def check_arguments(arguments: Sequence[str], ranks: int) -> AskedOnData:
    """Check recipe, engine and data set for a run on so many ranks. Raises UserError."""
    asked = check_recipe_and_engine(arguments, ranks)
    recipe = asked.recipe
    data_dir = asked.flags.data_dir
    reader = open_training_data(data_dir, recipe)
    refuse_another_tokenizer(asked.flags.run_dir, asked.flags.branch_from, reader)
    loader = TrainingLoader(reader, seq_len=recipe.model.seq_len, seed=recipe.seed)
    if sum(loader.window_counts) < recipe.global_batch_size:
        raise UserError(
            f"{data_dir}: {reader.manifest.tokens('train'):,} training tokens are fewer "
            f"than one batch of batch.global_batch_tokens {recipe.batch.global_batch_tokens:,}; "
            "add text or make the batch smaller"
        )
    prompts = prompts_of(recipe, data_dir / TOKENIZER_NAME)
    return AskedOnData(**vars(asked), reader=reader, loader=loader, prompts=prompts)


def prompts_of(recipe: Recipe, tokenizer_dir: Path) -> tuple[Prompt, ...]:
    """The recipe's prompts as the model gets them. Raises UserError for one that does not fit."""
    texts = recipe.log.prompts
    if not texts:
        return ()
    tokenizer = open_tokenizer(tokenizer_dir)
    return encode_prompts(texts, tokenizer, recipe.model.seq_len, "log.prompts: prompt")


def check_recipe_and_engine(arguments: Sequence[str], ranks: int) -> Asked:
    """Check the flags, the recipe and its engine for a run on so many ranks. Raises UserError.

    The run's directory is looked at too, before anything is written there. The data set is needed
    only for the vocabulary of a recipe that leaves that to it.
    """
    flags, overrides = build_parser().parse_known_args(arguments)
    recipe = load_recipe(flags.recipe, overrides, flags.data_dir)
    check_sinks(recipe.log.sinks)
    refuse_what_is_no_run(flags.run_dir, flags.data_dir)
    engine, note = choose_engine(flags, overrides, recipe, ranks)
    engine_config = load_engine_config(engine)
    objection = monitor_objection(engine_config)
    if objection and not has_saved(flags.run_dir):
        raise UserError(f"engine {engine}: {objection}")
    # A run that began with them goes on.
    notes = [note] if note else []
    if objection:
        notes.append(f"warning: engine {engine}: {objection}")
    return Asked(
        flags=flags,
        recipe=recipe,
        engine_config=merge_config(recipe, engine_config, ranks),
        engine_note="\n".join(notes),
    )


def open_training_data(data_dir: Path, recipe: Recipe) -> ShardReader:
    """The data set, whose files are all there and whose ids the model has. Raises UserError."""
    reader = ShardReader(data_dir)
    reader.check_files()
    if reader.manifest.vocab_size > recipe.model.vocab_size:
        raise UserError(
            f"{data_dir}: its tokenizer has {reader.manifest.vocab_size:,} ids, model.vocab_size "
            f"is {recipe.model.vocab_size:,}; set --model.vocab_size={reader.manifest.vocab_size}"
        )
    return reader


# The engine: the flag's, else the one that the run began with, else the recipe's


def choose_engine(
    flags: Namespace, overrides: Sequence[str], recipe: Recipe, ranks: int
) -> tuple[str, str]:
    """The name of the DeepSpeed JSON to use, and what to say of it.

    A run may have begun with another engine than its recipe names: launch/pretrain.sh takes fp32 on
    a CPU. Continued without the flag, it would be refused for what nobody gave; so the shipped
    engine that it began with goes on.
    """
    began_with = {} if names_an_engine(flags, overrides) else recorded_engine(flags.run_dir, recipe)
    if not began_with or gives(recipe.engine, recipe, ranks, began_with):
        return flags.deepspeed_config or recipe.engine, ""
    for path in sorted(DS_CONFIGS_DIR.glob("*.json")):
        if gives(path.stem, recipe, ranks, began_with):
            note = (
                f"the run began with --deepspeed-config {path.stem}, not the recipe's "
                f"{recipe.engine}: it goes on so"
            )
            return path.stem, f"{flags.run_dir}: {note}"
    return recipe.engine, ""


def names_an_engine(flags: Namespace, overrides: Sequence[str]) -> bool:
    """Whether the command line says which engine to use."""
    if flags.deepspeed_config:
        return True
    return any(override.startswith("--engine=") for override in overrides)


def recorded_engine(run_dir: Path, recipe: Recipe) -> dict[str, Any]:
    """The merged configuration of a run that has saved something; empty if none can be read, or its
    recipe's engine was another one: then the recipe's change counts.
    """
    recipe_path = run_dir / RECIPE_NAME
    engine_path = run_dir / ENGINE_CONFIG_NAME
    if not has_saved(run_dir) or not (recipe_path.is_file() and engine_path.is_file()):
        return {}
    try:
        before = parse_yaml(recipe_path.read_bytes(), str(recipe_path))
        merged = parse_json(engine_path.read_bytes(), str(engine_path), "")
    except (UserError, OSError):  # what continues a run by its checkpoints does not depend on them
        return {}
    if not isinstance(before, dict) or not isinstance(merged, dict):
        return {}
    return merged if before.get("engine") == recipe.engine else {}


def has_saved(run_dir: Path) -> bool:
    """Whether a run has a checkpoint that one of its starts made; imported weights are none's."""
    state = read_state(run_dir)
    is_only_imported = state.imported_from is not None and state.fingerprint is None
    return bool(saved_steps(run_dir)) and not is_only_imported


def gives(engine: str, recipe: Recipe, ranks: int, merged: dict[str, Any]) -> bool:
    """Whether a DeepSpeed JSON, merged with the recipe, is what a run may go on with."""
    try:
        now = merge_config(recipe, load_engine_config(engine), ranks)
        refuse_changes(merged, now, ENGINE_MAY_CHANGE_ON_RESUME, "")
    except UserError:
        return False
    return True


# What launch/pretrain.sh starts where it is not told


def ranks_by_default(recipe: Recipe, gpus: int) -> int:
    """A rank for each GPU; without any as many CPU ranks as divide a step."""
    if gpus:
        return gpus
    at_once = recipe.batch.micro_batch_size
    for ranks in range(CPU_RANKS, 0, -1):
        if recipe.global_batch_size % (ranks * at_once) == 0:
            return ranks
    return CPU_RANKS  # which is refused then, with what divides


def engine_flags_by_default(arguments: Sequence[str], gpus: int) -> list[str]:
    """The flags with which launch/pretrain.sh starts a new run on a CPU in fp32, where no engine
    was asked for.
    """
    flags, overrides = build_parser().parse_known_args(arguments)
    if gpus or names_an_engine(flags, overrides) or has_saved(flags.run_dir):
        return []
    recipe = load_recipe(flags.recipe, overrides, flags.data_dir)
    is_bf16 = load_engine_config(recipe.engine).get("bf16", {}).get("enabled")
    return ["--deepspeed-config", CPU_ENGINE] if is_bf16 else []


def describe_default_start(arguments: Sequence[str], gpus: int, bytes_of_rank: float) -> str:
    """What launch/pretrain.sh would start here with the same arguments, and what it would refuse,
    as one line.

    `bytes_of_rank` is the memory of a GPU or, without any, of the whole machine.
    """
    flags, overrides = build_parser().parse_known_args(arguments)
    recipe = load_recipe(flags.recipe, overrides, flags.data_dir)
    ranks = ranks_by_default(recipe, gpus)
    engine_flags = engine_flags_by_default(arguments, gpus)
    start = " ".join(
        [f"launch/pretrain.sh would start {counted(ranks, 'rank')} here", *engine_flags]
    )
    device_type = "cuda"
    available = bytes_of_rank
    if not gpus:  # the ranks share the machine
        device_type = "cpu"
        available = bytes_of_rank / ranks
    try:
        asked = check_recipe_and_engine([*arguments, *engine_flags], ranks)
        check_it_fits(recipe, asked.engine_config, ranks, available, device_type)
    except UserError as error:
        return f"warning: {start}, and that is refused: {error}"
    count = accumulation_steps(recipe, ranks)
    return f"{start}: {count} micro-{'batch' if count == 1 else 'batches'} each"


# Before the imports of the training command


def refuse_early(arguments: Sequence[str]) -> None:
    """End this process with one line and exit code 2 if what was asked cannot be; else return.

    Ranks on several machines are not judged here: they meet first, so that what one machine alone
    lacks is said once and ends all.
    """
    try:
        world = world_from_environment()
        if world.world_size > world.local_world_size:
            return
    except (UserError, ValueError):  # said later, with the rest
        return
    try:
        check_arguments(arguments, world.world_size)
    except (UserError, OSError) as error:
        where = ""
        if not world.is_main:  # it has the same files, and speaks
            time.sleep(LET_RANK_0_SPEAK_S)
            where = f" on rank {world.rank} ({socket.gethostname()})"
        print(
            f"error{where}: {one_line(UserError(os_error_line(error)))}",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(USER_ERROR_EXIT_CODE)

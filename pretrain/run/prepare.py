"""What a rank checks by itself before it trains, and what it knows of its run after that."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.inputs.urls import without_credentials
from data_prep.manifest import Manifest, Source, as_written
from data_prep.shards import TOKENIZER_NAME, ShardReader
from pretrain.checkpoint.reader import Checkpoint
from pretrain.config.load import recipe_to_dict
from pretrain.config.recipe import Recipe
from pretrain.costs.fit import check_it_fits
from pretrain.data.loader import TrainingLoader, ValidationWindows
from pretrain.data.stages import DataStage, manifest_of_stage
from pretrain.data.staging import staged
from pretrain.data.text_size import bytes_per_token
from pretrain.data.tokenizer import open_tokenizer
from pretrain.distributed.agree import inform, say
from pretrain.distributed.devices import check_kernels, memory_of_rank
from pretrain.distributed.world import World
from pretrain.generation.continuation import Speaker
from pretrain.generation.prompts import Prompt
from pretrain.generation.samples import SampleWriter
from pretrain.metrics.told import AboutRun, EarlierText
from pretrain.model.compilation import check_compiler
from pretrain.model.token_codes import config_of_run, saved_config
from pretrain.modeling_tablefree import TableFreeConfig, TableFreeForCausalLM
from pretrain.run.branch import open_origin
from pretrain.run.continuing import check_same_run, stages_with
from pretrain.run.directory import Identity
from pretrain.run.first_checks import check_arguments
from pretrain.run.starts import for_sinks, of_steps, read_starts
from pretrain.run.state import read_state


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a run needs that a rank can check by itself."""

    recipe: Recipe
    model_config: TableFreeConfig  # with the code that the run's checkpoints hold, if it has any
    engine_config: dict[str, Any]
    data_dir: Path
    reader: ShardReader
    loader: TrainingLoader  # of the newest stage of data
    stages: tuple[DataStage, ...]  # of data, oldest first; all new steps are of the newest
    validation: ValidationWindows
    prompts: tuple[Prompt, ...]  # continued at each validation
    run_dir: Path
    stop_at_step: int
    branch_from: Checkpoint | None
    profile_steps: int
    dry_run: bool
    command: list[str]  # the flags, as given

    @property
    def stage(self) -> DataStage:
        """The stage of data that this start trains in."""
        return self.stages[-1]

    @property
    def identity(self) -> Identity:
        """What must be the same for the run to go on."""
        return Identity(
            recipe=self.recipe,
            engine_config=self.engine_config,
            fingerprint=self.reader.manifest.fingerprint,
        )


def prepare(arguments: Sequence[str], world: World) -> Run:
    """Check everything that a rank can check by itself. Raises UserError."""
    asked = check_arguments(arguments, world.world_size)
    flags = asked.flags
    recipe = asked.recipe
    if asked.engine_note:
        inform(world, asked.engine_note)
    check_machine(recipe, asked.engine_config, world, is_dry_run=flags.dry_run)
    identity = Identity(
        recipe=recipe,
        engine_config=asked.engine_config,
        fingerprint=asked.reader.manifest.fingerprint,
    )
    # Before anything is written or staged, and without the engine: it costs a manifest.
    check_same_run(flags.run_dir, identity)
    branch_from = None
    if flags.branch_from:
        branch_from = open_origin(flags.branch_from, flags.run_dir, identity)
    reader = asked.reader
    loader = asked.loader
    if recipe.data.stage_dir and not flags.dry_run:
        reader = staged(reader, Path(recipe.data.stage_dir))
        loader = TrainingLoader(reader, seq_len=recipe.model.seq_len, seed=recipe.seed)
    stages = stages_with(
        flags.run_dir,
        branch_from,
        stage_of(reader.manifest, flags.data_dir),
        recipe.global_batch_size,
    )
    # A run goes on with the code it was begun with, also if new runs would draw another.
    saved = saved_config(recipe.model, flags.run_dir, branch_from)
    return Run(
        recipe=recipe,
        model_config=config_of_run(recipe.model, reader.manifest, saved),
        engine_config=asked.engine_config,
        data_dir=flags.data_dir,
        reader=reader,
        loader=loader,
        stages=stages,
        validation=ValidationWindows(reader, seq_len=recipe.model.seq_len),
        prompts=asked.prompts,
        run_dir=flags.run_dir,
        stop_at_step=min(recipe.total_steps, flags.stop_at_step or recipe.total_steps),
        branch_from=branch_from,
        profile_steps=flags.profile or 0,
        dry_run=flags.dry_run,
        command=[*arguments],
    )


def stage_of(manifest: Manifest, data_dir: Path) -> DataStage:
    """A data set as the first stage of a run."""
    return DataStage(
        fingerprint=manifest.fingerprint,
        data_dir=str(data_dir.resolve()),
        sources=tuple(of_source(source) for source in manifest.sources),
    )


def of_source(source: Source) -> dict[str, object]:
    """What a checkpoint says of a source; data sets of before may hold a URL's secrets."""
    about = as_written(source) | {"origin": without_credentials(source.origin)}
    about.pop("loss", None)  # it is told of all sources together
    return about


def sample_writer(run: Run, model: TableFreeForCausalLM, world: World) -> SampleWriter | None:
    """What continues the recipe's prompts with the model as it is then; None where it has none."""
    if not run.prompts:
        return None
    speaker = Speaker(
        model=model,
        tokenizer=open_tokenizer(run.data_dir / TOKENIZER_NAME),
        end_ids=frozenset([run.reader.manifest.eos_id]),
        seq_len=run.recipe.model.seq_len,
    )
    return SampleWriter(speaker, run.prompts, run.recipe.log.sample_tokens, world)


def about_run(run: Run) -> AboutRun:
    """The run as sinks know it, with the start that is the newest now."""
    starts = of_steps(read_starts(run.run_dir), run.recipe.total_steps)
    config: dict[str, Any] = {
        "recipe": recipe_to_dict(run.recipe),
        "fingerprint": run.reader.manifest.fingerprint,
        "branched_from": read_state(run.run_dir).branched_from,
        "start": for_sinks(starts[-1]) if starts else None,
    }
    if len(run.stages) > 1:
        config["data_stages"] = [
            {"fingerprint": stage.fingerprint, "first_step": stage.first_step}
            for stage in run.stages
        ]
    return AboutRun(
        run_dir=run.run_dir,
        config=config,
        restarts=frozenset(start.step for start in starts if start.step > 0),
        bytes_per_token=bytes_per_token(run.reader.manifest),
        earlier_texts=earlier_texts(run.stages),
    )


def earlier_texts(stages: Sequence[DataStage]) -> tuple[EarlierText, ...]:
    """What is known of the validation texts of all stages but the newest."""
    texts = []
    for stage, after in pairwise(stages):
        manifest = manifest_of_stage(stage)
        ratio = bytes_per_token(manifest) if manifest else None
        texts.append(EarlierText(end=after.first_step, bytes_per_token=ratio))
    return tuple(texts)


def check_machine(
    recipe: Recipe, engine_config: dict[str, Any], world: World, *, is_dry_run: bool
) -> None:
    """Whether this rank's part of the machine can train it. Raises UserError; a dry run, which may
    be asked for anywhere, only says where the memory is too small.
    """
    device_type, available = memory_of_rank(world)
    try:
        check_it_fits(recipe, engine_config, world.world_size, available, device_type)
    except UserError as error:
        if not is_dry_run:
            raise
        say(world, f"warning: not on this machine: {error}")
    check_kernels(device_type, is_bf16=bool(engine_config.get("bf16", {}).get("enabled")))
    if recipe.compile:
        check_compiler(device_type)

"""A run from its process group to its final state: claimed, begun, trained, its end noted."""

import contextlib
import faulthandler
import math
import os
import time

import torch

from data_prep.commands import signal_name
from data_prep.errors import UserError
from data_prep.locks import lock
from pretrain.checkpoint.layout import naming_the_disk, saved_steps
from pretrain.checkpoint.writer import CheckpointWriter
from pretrain.config.recipe import Recipe
from pretrain.data.data_check import DataCheck
from pretrain.data.digests import lengths_that_differ
from pretrain.distributed.agree import inform, say, together
from pretrain.distributed.world import World
from pretrain.engine.engine import SAVE_FAILED, Engine
from pretrain.engine.process_group import start_process_group
from pretrain.metrics.sinks import bring_up_to_date
from pretrain.model.build import build_model
from pretrain.model.token_codes import warnings
from pretrain.run.bad_steps import BadSteps
from pretrain.run.branch import copy_branch
from pretrain.run.directory import describe_run
from pretrain.run.exports.exporter import Exporter
from pretrain.run.prepare import Run, about_run
from pretrain.run.saving import around_saves, save
from pretrain.run.state import note_failure, write_state
from pretrain.run.trainer import Trainer, restore
from pretrain.view.progress import epochs_lines, stages_lines
from pretrain.watch.signals import end_on_signals
from pretrain.watch.watch import Watch

# What sinks lack of a finished run is waited for so long: 200,000 steps take less than a minute.
LATE_SINKS_S = 300.0


def run_training(run: Run, world: World) -> None:
    """From process group to final state. The directory is locked before anything in it changes."""
    # What ends a process by a signal (a disk that fails below a mapped shard) leaves its stack.
    faulthandler.enable()
    set_determinism(run.recipe)
    device = start_process_group(world)
    held = together(
        lambda: lock(run.run_dir, "training there", "--run-dir") if world.is_main else None
    )
    try:
        together(lambda: begin(run) if world.is_main else None)
        with (
            Watch(world, run.run_dir, run.recipe.stalls, note_failure) as watch,
            naming_the_disk(run.run_dir),
            DataCheck(run.reader, run.data_dir, run.run_dir, run.recipe.data, world) as check,
        ):
            train_from_last_checkpoint(run, watch, device, check)
    except Exception as error:
        if world.is_main:
            why = str(error) if isinstance(error, UserError) else repr(error)
            with contextlib.suppress(OSError):  # the disk may be what failed
                note_failure(run.run_dir, why)
        raise
    finally:
        if held:
            held.close()


def set_determinism(recipe: Recipe) -> None:
    """On CUDA, choose kernels that give the same bits each time; CPU kernels do so anyway."""
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def begin(run: Run) -> None:
    """Note what is about to be trained."""
    asked = run.identity
    with naming_the_disk(run.run_dir):
        describe_run(run.run_dir, asked, run.data_dir)
        write_state(
            run.run_dir,
            status="running",
            reason=None,
            fingerprint=asked.fingerprint,
            stages=run.stages if len(run.stages) > 1 else None,
            began=time.time_ns(),
        )


def train_from_last_checkpoint(
    run: Run, watch: Watch, device: torch.device, check: DataCheck
) -> None:
    """Load what was saved, train the rest once the data are known to be good; wait for exports that
    are made beside it.
    """
    world = watch.world
    bad_steps = BadSteps(run.run_dir, run.recipe.bad_steps, world)
    engine = build_engine(run, world, device)
    engine.judge = bad_steps.judge
    watch.clock = engine.clock
    watch.find_damage = lambda: lengths_that_differ(run.reader.data_dir)
    check.on_file = engine.clock.note_progress
    end_on_signals(engine, world)
    announce(run, engine, world)
    branch_off(run, world)
    start_step = restore(run, engine, bad_steps)
    # The digests were checked meanwhile, in threads; no step is trained on data that are not good.
    check.finish()

    def end_run() -> None:
        engine.wants_end = SAVE_FAILED

    checkpoints = run.recipe.checkpoints
    with Exporter(run.run_dir, checkpoints, run.recipe.total_steps, world) as exporter:
        exporter.make_up(start_step)
        around = around_saves(run.run_dir, end_run, engine.clock.note_progress, exporter)
        with CheckpointWriter(run.run_dir, checkpoints, world, around) as writer:
            if run.recipe.bad_steps.policy == "rewind" and not saved_steps(run.run_dir):
                save(run, engine, bad_steps, writer, 0)  # what there is to go back to
            trainer = Trainer(
                run=run,
                engine=engine,
                bad_steps=bad_steps,
                watch=watch,
                writer=writer,
                start_step=start_step,
            )
            steps_done = trainer.fit()
        # All is on the disk by now: leaving the writer waits for its last save, and raises its
        # error.
        finish(run, steps_done, engine, bad_steps)
        # Who sent a signal waits for no export.
        if not engine.ends and exporter.wait(
            lambda: bool(engine.wants_end), engine.clock.note_progress
        ):
            writer.prune_again()


def build_engine(run: Run, world: World, device: torch.device) -> Engine:
    """The engine around the model as it is before the first step.

    Every rank draws all initial weights, from the seed alone: so they are the same on any number of
    ranks.
    """
    model = build_model(run.recipe, run.model_config)
    engine = Engine(model, run.recipe, run.engine_config, world, device)
    engine.mask_documents(run.reader.manifest.eos_id)
    return engine


def announce(run: Run, engine: Engine, world: World) -> None:
    """Say what is about to be trained, on what."""
    recipe = run.recipe
    sizes = {name: math.prod(shape) for name, shape in engine.parameter_shapes().items()}
    in_input = sum(size for name, size in sizes.items() if name.startswith("input_embedding."))
    inform(
        world,
        f"{sum(sizes.values()):,} trained parameters, {in_input:,} of them in the input; "
        f"{recipe.total_steps:,} steps of {recipe.batch.global_batch_tokens:,} tokens; "
        f"ranks: {world.world_size}",
    )
    same_input = together(lambda: warnings(run.model_config, run.reader) if world.is_main else [])
    inform(world, "\n".join([*epochs_lines(recipe, run.loader, run.stage), *same_input]))


def branch_off(run: Run, world: World) -> None:
    """Take over the checkpoint that the run is to branch off from, if it is."""
    origin = run.branch_from
    if origin is None:
        return
    together(lambda: copy_branch(origin, run.run_dir) if world.is_main else None)
    inform(world, f"branching from {origin.path}")
    for line in stages_lines(run.stages):
        inform(world, line)


def close_finished(run: Run, world: World) -> None:
    """Say that a run is finished, once its sinks and its exports have what they lack of it."""
    names = run.recipe.log.sinks
    drew = together(lambda: draw_finished(run, world) if names and world.is_main else [])
    if drew:
        say(world, f"{run.run_dir}: drawn to its end now: {', '.join(drew)}")
    make_up_exports(run, world)
    say(world, f"{run.run_dir}: this run is finished; evaluate or export it")


def draw_finished(run: Run, world: World) -> list[str]:
    """Have the sinks of a finished run draw what they lack; the names of those that did."""

    def warn(text: str) -> None:
        say(world, text)

    steps = run.recipe.total_steps
    with lock(run.run_dir, "drawing it", "--run-dir"):
        return bring_up_to_date(run.recipe.log.sinks, about_run(run), steps, warn, LATE_SINKS_S)


def make_up_exports(run: Run, world: World) -> None:
    """Have a finished run make the exports that it lacks."""
    recipe = run.recipe
    if recipe.checkpoints.export_every_steps is None:
        return
    held = together(
        lambda: lock(run.run_dir, "exporting it", "--run-dir") if world.is_main else None
    )
    try:
        with Exporter(run.run_dir, recipe.checkpoints, recipe.total_steps, world) as exporter:
            exporter.make_up(recipe.total_steps)
            exporter.wait(is_told_to_end=lambda: False, note_progress=lambda: None)
    finally:
        if held:
            held.close()


def finish(run: Run, step: int, engine: Engine, bad_steps: BadSteps) -> None:
    """Note and say how the run stands after its last step here."""
    world = engine.world
    skipped = bad_steps.skipped_steps()
    if skipped:
        say(world, f"steps skipped: {skipped}; {bad_steps.path} tells why")
    is_signal = 0 < engine.ends < SAVE_FAILED
    why = signal_name(engine.ends) if is_signal else "--stop-at-step"
    if step >= run.recipe.total_steps:
        status = "done"
        reason = None
        end = f"finished after {step} steps"
    else:
        status = "preempted"
        reason = f"stopped at step {step}, as {why} asked"
        end = f"stopped at step {step}; the same command continues"
    if world.is_main:
        write_state(run.run_dir, status=status, reason=reason)
    inform(world, f"{run.run_dir}: {end}")

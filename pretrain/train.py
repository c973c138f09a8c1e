"""Train a recipe on a data set, or continue where the run stopped.

    deepspeed --module pretrain.train --recipe NAME|FILE --data-dir DATASET --run-dir RUN_DIR [--dotted.key=value ...]

The same flags work under `deepspeed pretrain/train.py`, `torchrun -m`, `mpiexec -n N python -m` and
plain `python -m`. The same command with the same run directory continues the run, or says that it
is finished.
"""

import gc
import signal
import sys
from pathlib import Path

# Ctrl-C while it imports and checks is no traceback; training has handlers of its own.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# run by path: let `import pretrain` find the package, and keep its modules from shadowing others
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# What arithmetic refuses is refused before the imports below, which take from seconds to most of a
# minute.
if __name__ == "__main__":
    from pretrain.run.first_checks import refuse_early

    refuse_early(sys.argv[1:])
    # What is imported stays to the end: to search it for garbage over and over takes 0.9 of 3.9 s
    # of CPU time.
    gc.disable()

import contextlib
import faulthandler
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.errors import UserError, os_error_line, refusal, signal_name
from data_prep.shards import Manifest, ShardReader, Source, as_written, lock, without_credentials
from pretrain.checkpoint.reader import (
    Checkpoint,
    checkpoints_dir,
    naming_the_disk,
    newest_good,
    saved_steps,
)
from pretrain.checkpoint.writer import CheckpointWriter
from pretrain.config.load import recipe_to_dict
from pretrain.config.recipe import Recipe
from pretrain.config.schedule import learning_rate
from pretrain.costs.fit import check_it_fits
from pretrain.data.data_check import DataCheck
from pretrain.data.digests import lengths_that_differ
from pretrain.data.loader import Prefetch, TrainingLoader, ValidationWindows
from pretrain.data.staging import staged
from pretrain.data.validation import validation_batches, windows_to_validate
from pretrain.distributed.agree import exit_with, gather, met_alone, say, together
from pretrain.distributed.devices import check_kernels, memory_of_rank, set_up_rank
from pretrain.distributed.world import World, world_from_environment
from pretrain.engine.clock import PAUSE
from pretrain.engine.engine import SAVE_FAILED, Engine
from pretrain.engine.figures import StepFigures, finite
from pretrain.engine.process_group import leave_process_group, start_process_group
from pretrain.engine.profiler import StepProfiler
from pretrain.model.build import build_model
from pretrain.model.compilation import check_compiler, compiled_graphs
from pretrain.model.token_codes import check_same_code, config_of_run, saved_config, warnings
from pretrain.modeling_tablefree import TableFreeConfig
from pretrain.run.bad_steps import BadSteps, describe_rows
from pretrain.run.branch import copy_branch, open_origin
from pretrain.run.command_line import build_parser
from pretrain.run.directory import (
    MetricsFile,
    around_saves,
    check_same_run,
    describe_run,
    note_failure,
    read_state,
    refuse_another_run,
    write_state,
)
from pretrain.run.first_checks import check_arguments, describe_default_start
from pretrain.run.signals import end_on_signals
from pretrain.run.starts import record_start
from pretrain.run.watch import Watch
from pretrain.view.dry_run import describe
from pretrain.view.progress import Progress, epochs_lines

if __name__ == "__main__":
    gc.freeze()
    gc.enable()

Line = dict[str, Any]  # of metrics.jsonl


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a run needs that a rank can check by itself."""

    recipe: Recipe
    model_config: TableFreeConfig  # with the code that the run's checkpoints hold, if it has any
    engine_config: dict[str, Any]
    data_dir: Path
    reader: ShardReader
    loader: TrainingLoader
    validation: ValidationWindows
    run_dir: Path
    stop_at_step: int
    branch_from: Checkpoint | None
    profile_steps: int
    dry_run: bool
    command: list[str]  # the flags, as given


def prepare(arguments: Sequence[str], world: World) -> Run:
    """Check everything that a rank can check by itself. Raises UserError."""
    asked = check_arguments(arguments, world.world_size)
    flags, recipe, merged = asked.flags, asked.recipe, asked.engine_config
    reader, loader = asked.reader, asked.loader
    if asked.engine_note:
        say(world, asked.engine_note)
    device_type, available = memory_of_rank(world)
    try:
        check_it_fits(recipe, merged, world.world_size, available, device_type)
    except UserError as error:
        if not flags.dry_run:  # which may be asked anywhere
            raise
        say(world, f"warning: not on this machine: {error}")
    check_kernels(device_type, is_bf16=bool(merged.get("bf16", {}).get("enabled")))
    if recipe.compile:
        check_compiler(device_type)
    fingerprint = reader.manifest.fingerprint
    check_same_run(flags.run_dir, recipe, merged, fingerprint)
    origin = flags.branch_from
    branch_from = (
        open_origin(origin, flags.run_dir, recipe, merged, fingerprint) if origin else None
    )
    if recipe.data.stage_dir and not flags.dry_run:
        reader = staged(reader, Path(recipe.data.stage_dir))
        loader = TrainingLoader(reader, seq_len=recipe.model.seq_len, seed=recipe.seed)
    architecture = config_of_run(
        recipe.model, reader.manifest, saved_config(recipe.model, flags.run_dir, branch_from)
    )
    return Run(
        recipe=recipe,
        model_config=architecture,
        engine_config=merged,
        data_dir=flags.data_dir,
        reader=reader,
        loader=loader,
        validation=ValidationWindows(reader, seq_len=recipe.model.seq_len),
        run_dir=flags.run_dir,
        stop_at_step=min(recipe.total_steps, flags.stop_at_step or recipe.total_steps),
        branch_from=branch_from,
        profile_steps=flags.profile or 0,
        dry_run=flags.dry_run,
        command=[*arguments],
    )


def announce(run: Run, engine: Engine, world: World) -> None:
    """Say what is about to be trained, on what."""
    recipe = run.recipe
    sizes = {name: math.prod(shape) for name, shape in engine.parameter_shapes().items()}
    in_input = sum(size for name, size in sizes.items() if name.startswith("input_embedding."))
    say(
        world,
        f"{sum(sizes.values()):,} trained parameters, {in_input:,} of them in the input; "
        f"{recipe.total_steps:,} steps of {recipe.batch.global_batch_tokens:,} tokens; ranks: "
        f"{world.world_size}",
    )
    one_input = together(lambda: warnings(run.model_config, run.reader) if world.is_main else [])
    say(world, "\n".join([*epochs_lines(recipe, run.loader), *one_input]))


def restore(run: Run, engine: Engine, bad_steps: BadSteps, world: World) -> int:
    """Load the newest good checkpoint, if any; returns the step to go on with."""
    checkpoint, passed_over = newest_good(run.run_dir, world)
    for line in passed_over:
        say(world, line)
    bad_steps.restore(checkpoint.manifest if checkpoint else None)
    if checkpoint is None:
        saved_step = together(lambda: read_state(run.run_dir)).get("saved_step")
        if saved_step is not None:
            raise UserError(
                f"{run.run_dir}: step {saved_step} was saved, but no good checkpoint is left; "
                "restore one, or start again with another --run-dir"
            )
        return 0
    refuse_another_run(
        run.run_dir, checkpoint, run.recipe, run.engine_config, run.reader.manifest.fingerprint
    )
    if checkpoint.shapes != engine.parameter_shapes():
        raise UserError(
            f"{checkpoint.path}: holds another model's parameters; give another --run-dir"
        )
    check_same_code(run.model_config, checkpoint)
    together(lambda: engine.write_state(checkpoint))
    say(world, f"continuing from {checkpoint.path}")
    return checkpoint.step


def of_source(source: Source) -> dict[str, Any]:
    """What a checkpoint says of a source; data sets of before may hold a URL's secrets."""
    about = as_written(source) | {"origin": without_credentials(source.origin)}
    about.pop("loss", None)  # it is told of all sources together
    return about


def about_data(manifest: Manifest) -> dict[str, Any]:
    """What an export must know of the data set."""
    about: dict[str, Any] = {
        "eos_id": manifest.eos_id,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "sources": [of_source(source) for source in manifest.sources],
    }
    return about | ({"loss": str(manifest.loss)} if manifest.loss else {})


def save(
    run: Run, engine: Engine, bad_steps: BadSteps, writer: CheckpointWriter, step: int
) -> None:
    """Have a checkpoint made after `step` steps.

    After a bad step none is dropped for it: whether training diverged, only the next steps will
    tell.
    """
    fragments, optimizer_step = engine.read_state()
    manifest = run.reader.manifest
    about = {
        "optimizer_step": optimizer_step,
        "seed": run.recipe.seed,
        "fingerprint": manifest.fingerprint,
        "data_dir": str(run.data_dir.resolve()),
        "data": about_data(manifest),
        **bad_steps.about(step),
        "recipe": recipe_to_dict(run.recipe),
        "deepspeed": run.engine_config,
        "model_config": run.model_config.to_diff_dict(),
        "parameters": engine.parameter_shapes(),
    }
    writer.save(step, fragments, about, prunes=not bad_steps.replayed(step - 1))


def micro_batches(run: Run, engine: Engine, step: int) -> list[Tensor]:
    """The windows of this rank in a step, one tensor a micro-step, ready to be copied to the
    device.
    """
    batch = run.recipe.global_batch_size
    numbers = np.arange(step * batch, (step + 1) * batch)
    rows = [numbers[engine.rows_of(i)] for i in range(engine.accumulation_steps)]
    with met_alone():
        return [engine.pinned(run.loader.samples(own)) for own in rows]


def head_of_line(run: Run, step: int) -> Line:
    """What a step's line in metrics.jsonl begins with, whether it is trained or not; its figures
    are still open.
    """
    recipe = run.recipe
    rate = learning_rate(
        step, recipe.total_steps, recipe.optimizer.peak_learning_rate, recipe.schedule
    )
    tokens = (step + 1) * recipe.batch.global_batch_tokens
    return {
        "step": step,
        "loss": None,
        "gradient_norm": None,
        "learning_rate": rate,
        "tokens": tokens,
    }


def one_step(
    run: Run, engine: Engine, bad_steps: BadSteps, batches: Prefetch[list[Tensor]], step: int
) -> Line:
    """Train one step, unless it is a bad one; its line for metrics.jsonl."""
    own_batches = batches.take(step)
    engine.clock.mark("data")
    line = head_of_line(run, step)
    figures = engine.train_step(own_batches, line["learning_rate"])
    if figures.refused:
        refuse(run, bad_steps, step, figures, engine.row_nats(own_batches))
        return skipped_line(run, bad_steps, step)
    seconds, tokens = sum(figures.own.seconds.values()), run.recipe.batch.global_batch_tokens
    return {
        **line,
        "loss": figures.loss,
        "gradient_norm": figures.gradient_norm,
        "tokens_per_s": tokens / seconds,
        "tokens_per_s_per_rank": tokens / seconds / engine.world.world_size,
        "step_s": seconds,
        "seconds": figures.own.seconds,
        "peak_memory_bytes": figures.own.peak_memory_bytes,
        "slowest": asdict(figures.slowest) if figures.slowest else None,
    }


def refuse(
    run: Run, bad_steps: BadSteps, step: int, figures: StepFigures, row_nats: list[float]
) -> None:
    """Decide on a bad step, say so and record it. Raises UserError on all ranks where the run is
    to stop.
    """
    policy, batch = bad_steps.decide(step), run.recipe.global_batch_size
    rows = describe_rows(run.loader, run.reader, range(step * batch, (step + 1) * batch), row_nats)
    figures_found = {"loss": finite(figures.loss), "gradient_norm": finite(figures.gradient_norm)}
    bad_steps.record(
        {"step": step, "reason": figures.refused, "policy": policy, **figures_found, **rows}
    )
    if policy == "stop":
        stopped = (
            f"step {step}: {figures.refused}; nothing of it reached the weights; {bad_steps.path} "
            "has its rows"
        )
        if run.recipe.bad_steps.policy == "stop":
            raise UserError(
                f"{stopped}; with --bad_steps.policy=skip the same command goes on without it"
            )
        raise UserError(
            f"{stopped}. All {run.recipe.bad_steps.max_in_a_row} steps before it were bad too: "
            "training diverged. Start a new run with a lower optimizer.peak_learning_rate or a "
            "longer warm-up"
        )


def skipped_line(run: Run, bad_steps: BadSteps, step: int) -> Line:
    """The line of a step that was not trained, from its record alone: the same whenever the run
    comes to it.
    """
    record = bad_steps.records[step]
    figures = {
        "loss": record["loss"],
        "gradient_norm": record["gradient_norm"],
        "skipped": record["reason"],
    }
    return {**head_of_line(run, step), **figures}


def due(step: int, every: int, run: Run) -> bool:
    """Whether something that happens every N steps, and at the end, happens after this step."""
    return (step + 1) % every == 0 or step + 1 == run.stop_at_step


def validate_if_due(run: Run, engine: Engine, progress: Progress, line: Line) -> None:
    """Add the validation figures to a step's line, where they are due."""
    engine.clock.mark("other")
    if due(line["step"], run.recipe.validation.every_steps, run):
        count, batches = validation_batches(run.validation, run.recipe, engine.world)
        with progress.time_left.during("validation"):
            line["val_loss"] = engine.mean_nats(progress.validating(batches, count))
        line["val_perplexity"] = math.exp(min(line["val_loss"], 700.0))
        engine.clock.mark(PAUSE)


def save_if_due(
    run: Run, engine: Engine, bad_steps: BadSteps, writer: CheckpointWriter, step: int
) -> bool:
    """A checkpoint, where it is due; but none between steps for one that would hold the state of
    the one before.

    Returns whether training waited for one to be copied.
    """
    engine.clock.mark("other")
    is_end = bool(engine.ends) or step + 1 == run.stop_at_step
    if is_end or due(step, run.recipe.checkpoints.every_steps, run):
        is_new = is_end or not bad_steps.all_bad(
            range(step + 1 - run.recipe.checkpoints.every_steps, step + 1)
        )
        if is_new:
            save(run, engine, bad_steps, writer, step + 1)
        engine.clock.mark(PAUSE)
        return is_new
    return False


def open_metrics(run: Run, world: World, step: int) -> MetricsFile:
    """The file for the lines of metrics.jsonl from a step on."""
    with naming_the_disk(run.run_dir):
        metrics = MetricsFile(run.run_dir, step)
    if metrics.cut:
        say(world, f"warning: {metrics.cut}")
    if metrics.lacks:
        say(
            world,
            f"warning: {metrics.path} lacks {metrics.lacks} of the lines of the {step} steps so "
            "far",
        )
    return metrics


def leave_passed_over(writer: CheckpointWriter, step: int, world: World) -> None:
    """Have checkpoints that were passed over for the one of a step stay, without counting; said
    once of each.
    """
    names = together(lambda: writer.pass_over_newer(step) if world.is_main else [])
    if names:
        left = (
            "left where it is, and not counted by checkpoints.keep_last, until its step is saved "
            "anew"
        )
        say(world, "\n".join(f"{checkpoints_dir(writer.run_dir) / name}: {left}" for name in names))


def train(
    run: Run, engine: Engine, bad_steps: BadSteps, watch: Watch, step: int, writer: CheckpointWriter
) -> int:
    """Steps, with validation and checkpoints between them; how many of the run are done then."""
    world, start_step = engine.world, step
    leave_passed_over(writer, start_step, world)
    metrics = together(lambda: open_metrics(run, world, start_step) if world.is_main else None)
    for warning in together(
        lambda: record_start(run.run_dir, start_step, run.command, world, engine.device)
    ):
        say(world, warning)
    validation_tokens = windows_to_validate(run.validation, run.recipe) * run.recipe.model.seq_len
    progress = Progress(run.recipe, start_step, engine.device, world, validation_tokens)
    profiled, home = run.profile_steps if world.is_main else 0, run.run_dir / "profile"
    profiler = StepProfiler(
        profiled, range(start_step, run.stop_at_step), home, lambda text: say(world, text)
    )
    batches = Prefetch(lambda step: micro_batches(run, engine, step), run.stop_at_step)
    graphs = 0
    engine.clock.mark(PAUSE)  # setting up is part of no step
    while step < run.stop_at_step and not engine.ends:
        profiler.before(step)
        replayed = bad_steps.replayed(step)
        line = (
            skipped_line(run, bad_steps, step)
            if replayed
            else one_step(run, engine, bad_steps, batches, step)
        )
        profiler.after(step)
        if "skipped" in line:
            say(
                world,
                f"step {step} is skipped{', as recorded' if replayed else ''}: {line['skipped']}",
            )
        if "skipped" in line and not replayed and run.recipe.bad_steps.policy == "rewind":
            say(world, f"rewinding from step {step}")
            watch.step_seconds.clear()  # loading takes as long as at the start
            writer.wait()
            step = restore(run, engine, bad_steps, world)
            leave_passed_over(writer, step, world)
            if metrics:
                metrics.close()
            metrics = together(lambda: open_metrics(run, world, step) if world.is_main else None)  # noqa: B023
            continue
        if step > start_step and compiled_graphs() > graphs:
            say(
                world,
                f"warning: step {step} compiled its blocks again, which takes time; the first "
                "step should do",
            )
        graphs = compiled_graphs()
        validate_if_due(run, engine, progress, line)
        if "step_s" in line:
            progress.show(line)
            watch.step_seconds.append(line["step_s"])
        if metrics:
            metrics.append(line)
        began = time.monotonic()
        if save_if_due(run, engine, bad_steps, writer, step):
            progress.time_left.pause_s["save"] = time.monotonic() - began
        step += 1
    batches.close()
    progress.close()
    if metrics:
        metrics.close()
    return step


def set_determinism(recipe: Recipe) -> None:
    """On CUDA, choose kernels that give the same bits each time; CPU kernels do so anyway."""
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def begin(run: Run) -> None:
    """Note what is about to be trained."""
    fingerprint = run.reader.manifest.fingerprint
    with naming_the_disk(run.run_dir):
        describe_run(run.run_dir, run.recipe, run.engine_config, run.data_dir, fingerprint)
        write_state(
            run.run_dir,
            status="running",
            reason=None,
            fingerprint=fingerprint,
            began=time.time_ns(),
        )


def default_start(arguments: Sequence[str]) -> str:
    """For a dry run without a launcher, which is of one rank: what launch/pretrain.sh would
    start here.
    """
    if "RANK" in os.environ:
        return ""
    alone = World(rank=0, world_size=1, local_rank=0, local_world_size=1)
    return describe_default_start(arguments, torch.cuda.device_count(), memory_of_rank(alone)[1])


def run_training(run: Run, world: World) -> None:
    """From process group to final state. The directory is locked before anything in it changes."""
    # what ends a process by a signal (a disk that fails below a mapped shard) leaves its stack
    faulthandler.enable()
    set_determinism(run.recipe)
    device = start_process_group(world)
    held = together(
        lambda: lock(run.run_dir, "training there", "--run-dir") if world.is_main else None
    )
    try:
        together(lambda: begin(run) if world.is_main else None)
        with (
            Watch(world, run.run_dir, run.recipe.stalls) as watch,
            naming_the_disk(run.run_dir),
            DataCheck(run.reader, run.data_dir, run.run_dir, run.recipe.data, world) as check,
        ):
            train_from_last_checkpoint(run, watch, device, check)
    except Exception as error:
        if world.is_main:
            with contextlib.suppress(OSError):  # the disk may be what failed
                note_failure(
                    run.run_dir, str(error) if isinstance(error, UserError) else repr(error)
                )
        raise
    finally:
        if held:
            held.close()


def train_from_last_checkpoint(
    run: Run, watch: Watch, device: torch.device, check: DataCheck
) -> None:
    """Load what was saved, train the rest once the data are known to be good."""
    world = watch.world
    bad_steps = BadSteps(run.run_dir, run.recipe.bad_steps, world)
    model, eos_id = build_model(run.recipe, run.model_config), run.reader.manifest.eos_id
    engine = Engine(model, run.recipe, run.engine_config, world, device)
    engine.judge = bad_steps.judge
    engine.mask_documents(eos_id)
    watch.clock = engine.clock
    watch.find_damage = lambda: lengths_that_differ(run.reader.data_dir)
    check.on_file = engine.clock.saved_block
    end_on_signals(engine, world)
    announce(run, engine, world)
    if origin := run.branch_from:
        together(lambda: copy_branch(origin, run.run_dir) if world.is_main else None)
        say(world, f"branching from {origin.path}")
    start_step = restore(run, engine, bad_steps, world)
    check.finish()

    def end_run() -> None:
        engine.wants_end = SAVE_FAILED

    around = around_saves(run.run_dir, end_run, engine.clock.saved_block)
    with CheckpointWriter(run.run_dir, run.recipe.checkpoints, world, around) as writer:
        if run.recipe.bad_steps.policy == "rewind" and not saved_steps(run.run_dir):
            save(run, engine, bad_steps, writer, 0)  # what there is to go back to
        steps_done = train(run, engine, bad_steps, watch, start_step, writer)
    if skipped := len([step for step in bad_steps.records if bad_steps.replayed(step)]):
        say(world, f"steps skipped: {skipped}; {bad_steps.path} tells why")
    is_signal = 0 < engine.ends < SAVE_FAILED
    finish(run, steps_done, world, signal_name(engine.ends) if is_signal else "--stop-at-step")


def finish(run: Run, step: int, world: World, why: str) -> None:
    """Say how the run stands after its last step here."""
    done = step >= run.recipe.total_steps
    if world.is_main:
        reason = None if done else f"stopped at step {step}, as {why} asked"
        write_state(run.run_dir, status="done" if done else "preempted", reason=reason)
    end = (
        f"finished after {step} steps"
        if done
        else f"stopped at step {step}; the same command continues"
    )
    say(world, f"{run.run_dir}: {end}")


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    world = World(rank=0, world_size=1, local_rank=0, local_world_size=1)
    try:
        world = world_from_environment()
        set_up_rank(world)
        # --help, or a wrong flag: that takes no other rank
        build_parser().parse_known_args(arguments)
        if world.world_size > 1:  # what one rank cannot use, all are to hear of
            start_process_group(world)
        run = together(lambda: prepare(arguments, world))
        if run.dry_run:
            if world.is_main:
                print(
                    describe(
                        run.recipe,
                        run.engine_config,
                        run.loader,
                        world.world_size,
                        default_start(arguments),
                    )
                )
                for line in warnings(run.model_config, run.reader):
                    say(world, line)
        elif gather(together(lambda: read_state(run.run_dir)).get("status"))[0] == "done":
            say(world, f"{run.run_dir}: this run is finished; evaluate or export it")
        else:
            run_training(run, world)
        leave_process_group()
    except UserError as error:
        return exit_with(error, world)
    except OSError as error:
        return exit_with(refusal(error, os_error_line(error)), world)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

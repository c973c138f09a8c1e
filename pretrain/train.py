"""Train a recipe on a data set, or continue where the run stopped.

    deepspeed --module pretrain.train --recipe NAME|FILE --data-dir DATASET --run-dir RUN_DIR [--dotted.key=value ...]

The same flags work under `deepspeed pretrain/train.py`, `torchrun -m`, `mpiexec -n N python -m` and plain
`python -m`. The same command with the same run directory continues the run, or says that it is finished.
"""

import sys
from pathlib import Path

if not __package__:  # run by path: let `import pretrain` find the package, and keep its modules from shadowing others
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data_prep.errors import CommandParser, UserError, os_error_line
from data_prep.shards import ShardReader, Tokens, lock
from pretrain.activation_checkpointing import apply_activation_checkpointing
from pretrain.checkpoint import newest_good, prune_checkpoints, save_checkpoint
from pretrain.config import Recipe, load_recipe, model_config, recipe_to_dict
from pretrain.distributed import World, exit_with, keep_freed_memory, share_cores, together, world_from_environment
from pretrain.engine import Engine, start_process_group
from pretrain.engine_config import ENGINE_MAY_CHANGE_ON_RESUME, load_engine_config, merge_config
from pretrain.loader import TrainingLoader, ValidationWindows
from pretrain.modeling_tablefree import TableFreeForCausalLM, initialise_parameters
from pretrain.optim import learning_rate
from pretrain.run_directory import MetricsFile, check_same_run, describe_run, read_state, write_state


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a run needs that was checked before any rank met another."""

    recipe: Recipe
    engine_config: dict[str, Any]
    reader: ShardReader
    loader: TrainingLoader
    validation: ValidationWindows
    run_dir: Path
    stop_at_step: int


def build_parser() -> CommandParser:
    """The command line; what it doesn't know must be a dotted recipe key."""
    parser = CommandParser(
        prog="python -m pretrain.train",
        description="Train a recipe on a data set, or continue the run in --run-dir.",
        epilog="Any recipe key can be set with --dotted.key=value, such as --batch.micro_batch_size=8.",
    )
    parser.add_argument("--recipe", required=True, metavar="NAME|FILE", help="a shipped recipe or a YAML file")
    parser.add_argument("--data-dir", required=True, type=Path, help="data set made by data_prep.build_shards")
    parser.add_argument("--run-dir", required=True, type=Path, help="where the run lives; the same one continues it")
    parser.add_argument(
        "--deepspeed-config",
        "--deepspeed_config",
        metavar="NAME|FILE",
        help="DeepSpeed JSON (default: the recipe's engine key)",
    )
    parser.add_argument("--stop-at-step", type=int, metavar="N", help="save and stop after N steps of the whole run")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    return parser


def prepare(arguments: Sequence[str], world: World) -> Run:
    """Check everything that one rank can check alone. Raises UserError."""
    flags, overrides = build_parser().parse_known_args(arguments)
    if flags.stop_at_step is not None and flags.stop_at_step < 1:
        raise UserError(f"--stop-at-step {flags.stop_at_step}: expected a number of steps, 1 or more")
    recipe = load_recipe(flags.recipe, overrides)
    engine_config = load_engine_config(flags.deepspeed_config or recipe.engine)
    merged = merge_config(recipe, engine_config, world.world_size)
    reader = ShardReader(flags.data_dir)
    reader.check_files()
    if reader.manifest.vocab_size > recipe.model.vocab_size:
        raise UserError(
            f"{flags.data_dir}: its tokenizer has {reader.manifest.vocab_size:,} ids, model.vocab_size is "
            f"{recipe.model.vocab_size:,}; set --model.vocab_size={reader.manifest.vocab_size}"
        )
    loader = TrainingLoader(reader, seq_len=recipe.model.seq_len, seed=recipe.seed)
    if sum(loader.window_counts) < recipe.global_batch_size:
        raise UserError(
            f"{flags.data_dir}: {reader.manifest.tokens('train'):,} training tokens are fewer than one batch of "
            f"batch.global_batch_tokens {recipe.batch.global_batch_tokens:,}; add text or make the batch smaller"
        )
    fingerprint = reader.manifest.fingerprint
    check_same_run(flags.run_dir, recipe, merged, fingerprint, ENGINE_MAY_CHANGE_ON_RESUME)
    return Run(
        recipe=recipe,
        engine_config=merged,
        reader=reader,
        loader=loader,
        validation=ValidationWindows(reader, seq_len=recipe.model.seq_len),
        run_dir=flags.run_dir,
        stop_at_step=min(recipe.total_steps, flags.stop_at_step or recipe.total_steps),
    )


def build_model(recipe: Recipe) -> TableFreeForCausalLM:
    """The decoder with its initial weights."""
    model = TableFreeForCausalLM(model_config(recipe.model))
    initialise_parameters(model, recipe.seed)
    checkpointing = recipe.activation_checkpointing
    apply_activation_checkpointing(model, checkpointing.mode, checkpointing.every_n_layers)
    return model


def say(world: World, text: str) -> None:
    """One line of the log, from rank 0. Nobody has to read it: a closed pipe does not end a run."""
    if world.is_main:
        with contextlib.suppress(BrokenPipeError):
            tqdm.write(text, file=sys.stderr)


def announce(run: Run, engine: Engine, world: World) -> None:
    """Say what is about to be trained, on what."""
    recipe, loader = run.recipe, run.loader
    sizes = {name: math.prod(shape) for name, shape in engine.parameter_shapes().items()}
    in_input = sum(size for name, size in sizes.items() if name.startswith("input_embedding."))
    epochs = loader.epochs(recipe.total_steps * recipe.global_batch_size)
    tail = sum(loader.unseen_tail_tokens().values())
    say(
        world,
        f"{sum(sizes.values()):,} trained parameters, {in_input:,} of them in the input; {recipe.total_steps:,} steps "
        f"of {recipe.batch.global_batch_tokens:,} tokens on {world.world_size} ranks",
    )
    say(
        world,
        f"epochs: {', '.join(f'{name} {count:.2f}' for name, count in epochs.items())}; "
        f"{tail:,} tokens at the ends of sources fill no window and are never seen",
    )


def restore(run: Run, engine: Engine, world: World) -> int:
    """Load the newest good checkpoint, if any; returns the step to go on with."""
    checkpoint, passed_over = newest_good(run.run_dir, world)
    for line in passed_over:
        say(world, line)
    if checkpoint is None:
        saved_step = together(lambda: read_state(run.run_dir)).get("saved_step")
        if saved_step is not None:
            raise UserError(
                f"{run.run_dir}: step {saved_step} was saved, but no good checkpoint is left; restore one, or "
                f"start again with another --run-dir"
            )
        return 0
    saved = checkpoint.manifest["fingerprint"]
    if saved != run.reader.manifest.fingerprint:
        raise UserError(f"{checkpoint.path}: made on data set {saved}, got {run.reader.manifest.fingerprint}")
    if checkpoint.shapes != engine.parameter_shapes():
        raise UserError(f"{checkpoint.path}: holds another model's parameters; give another --run-dir")
    together(lambda: engine.write_state(checkpoint))
    say(world, f"continuing from {checkpoint.path}")
    return checkpoint.step


def save(run: Run, engine: Engine, world: World, step: int) -> None:
    """Checkpoint after `step` steps, then drop the oldest ones."""
    fragments, optimizer_step = engine.read_state()
    manifest = run.reader.manifest
    about = {
        "optimizer_step": optimizer_step,
        "seed": run.recipe.seed,
        "fingerprint": manifest.fingerprint,
        "data_dir": str(run.reader.data_dir.resolve()),
        "data": {"eos_id": manifest.eos_id, "sources": [asdict(source) for source in manifest.sources]},
        "skips": [],
        "recipe": recipe_to_dict(run.recipe),
        "deepspeed": run.engine_config,
        "model_config": model_config(run.recipe.model).to_diff_dict(),
        "parameters": engine.parameter_shapes(),
    }
    save_checkpoint(run.run_dir, step, fragments, about, world)
    if world.is_main:
        write_state(run.run_dir, saved_step=step)
        prune_checkpoints(run.run_dir, run.recipe.checkpoints.keep_last)


def micro_batches(run: Run, engine: Engine, step: int) -> list[Tokens]:
    """The windows of this rank in a step, one array a micro-step."""
    batch = run.recipe.global_batch_size
    numbers = np.arange(step * batch, (step + 1) * batch)
    rows = [numbers[engine.rows_of(i)] for i in range(engine.accumulation_steps)]
    return [run.loader.samples(own) for own in rows]


def validation_batches(run: Run, world: World) -> Iterator[Tokens]:
    """This rank's part of the validation windows: always the same ones, at most `eval_tokens` in all."""
    windows = min(run.validation.whole_windows, max(1, run.recipe.validation.eval_tokens // run.recipe.model.seq_len))
    if windows == 0 and world.is_main:  # the whole split is shorter than one window
        yield run.validation.window(0)[None]
    spread = np.arange(windows) * run.validation.whole_windows // max(1, windows)  # over all sources
    mine = spread[world.rank :: world.world_size]
    for start in range(0, len(mine), run.recipe.batch.micro_batch_size):
        yield run.validation.windows(mine[start : start + run.recipe.batch.micro_batch_size])


def one_step(run: Run, engine: Engine, step: int) -> dict[str, Any]:
    """Train one step; its line for metrics.jsonl."""
    recipe = run.recipe
    started = time.perf_counter()
    rate = learning_rate(step, recipe.total_steps, recipe.optimizer.peak_learning_rate, recipe.schedule)
    loss, gradient_norm = engine.train_step(micro_batches(run, engine, step), rate)
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        raise UserError(
            f"step {step}: loss {loss}, gradient norm {gradient_norm}: training diverged; nothing of this step "
            f"was saved. Start a new run with a lower optimizer.peak_learning_rate or a longer warm-up"
        )
    seconds = time.perf_counter() - started
    return {
        "step": step,
        "loss": loss,
        "gradient_norm": gradient_norm,
        "learning_rate": rate,
        "tokens": (step + 1) * recipe.batch.global_batch_tokens,
        "tokens_per_s": recipe.batch.global_batch_tokens / seconds,
        "step_s": seconds,
    }


class Progress:
    """A bar on a terminal; plain lines, now and then, where the output goes to a file."""

    LINE_EVERY_S = 15.0

    def __init__(self, total_steps: int, start_step: int, world: World) -> None:
        self.world = world
        self.on_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            disable=not (world.is_main and self.on_terminal),
            dynamic_ncols=True,
        )
        self.total_steps = total_steps
        self.last_line_at = -math.inf

    def show(self, line: dict[str, Any]) -> None:
        """Report a finished step."""
        figures = (
            f"loss {line['loss']:.4f}, {line['tokens_per_s']:,.0f} tokens/s, lr {line['learning_rate']:.2e}, "
            f"gradient norm {line['gradient_norm']:.2f}"
        )
        self.bar.set_postfix_str(figures, refresh=False)
        self.bar.update()
        place = f"step {line['step'] + 1:,} of {self.total_steps:,}"
        if "val_loss" in line:
            say(self.world, f"{place}: {figures}, validation loss {line['val_loss']:.4f}")
        elif not self.on_terminal and time.monotonic() - self.last_line_at > self.LINE_EVERY_S:
            left = (self.total_steps - line["step"] - 1) * line["step_s"]
            say(self.world, f"{place}: {figures}, {left / 60:.1f} min left")
            self.last_line_at = time.monotonic()

    def close(self) -> None:
        """Leave the terminal clean."""
        self.bar.close()


def due(step: int, every: int, run: Run) -> bool:
    """Whether something that happens every N steps, and at the end, happens after this step."""
    return (step + 1) % every == 0 or step + 1 == run.stop_at_step


def train(run: Run, engine: Engine, world: World, start_step: int) -> None:
    """Steps, with validation and checkpoints between them."""
    metrics = MetricsFile(run.run_dir, start_step) if world.is_main else None
    progress = Progress(run.recipe.total_steps, start_step, world)
    for step in range(start_step, run.stop_at_step):
        line = one_step(run, engine, step)
        if due(step, run.recipe.validation.every_steps, run):
            line["val_loss"] = engine.mean_nats(validation_batches(run, world))
            line["val_perplexity"] = math.exp(min(line["val_loss"], 700.0))
        if metrics:
            metrics.append(line)
        progress.show(line)
        if due(step, run.recipe.checkpoints.every_steps, run):
            if metrics:
                metrics.flush_to_disk()
            save(run, engine, world, step + 1)
    progress.close()
    if metrics:
        metrics.close()


def set_determinism(recipe: Recipe) -> None:
    """On CUDA, choose kernels that give the same bits each time; CPU kernels do so anyway."""
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def run_training(run: Run, world: World) -> None:
    """From process group to final state. The directory is locked before anything in it changes."""
    set_determinism(run.recipe)
    device = start_process_group(world)
    held = together(lambda: lock(run.run_dir, "training there", "--run-dir") if world.is_main else None)
    try:
        train_from_last_checkpoint(run, world, device)
    except Exception as error:
        if world.is_main:
            write_state(run.run_dir, status="failed", reason=f"{type(error).__name__}: {error}")
        raise
    finally:
        if held:
            held.close()


def train_from_last_checkpoint(run: Run, world: World, device: torch.device) -> None:
    """Describe the run, load what was saved, train the rest."""
    if world.is_main:
        describe_run(run.run_dir, run.recipe, run.engine_config, run.reader.data_dir)
        write_state(run.run_dir, status="running", reason=None, fingerprint=run.reader.manifest.fingerprint)
    engine = Engine(build_model(run.recipe), run.recipe, run.engine_config, world, device)
    announce(run, engine, world)
    start_step = restore(run, engine, world)
    train(run, engine, world, start_step)
    finish(run, max(start_step, run.stop_at_step), world)
    engine.close()


def finish(run: Run, step: int, world: World) -> None:
    """Say how the run stands after its last step here."""
    done = step >= run.recipe.total_steps
    if world.is_main:
        reason = None if done else f"stopped at step {step}, as --stop-at-step asked"
        write_state(run.run_dir, status="done" if done else "preempted", reason=reason)
    end = f"finished after {step} steps" if done else f"stopped at step {step}; the same command continues"
    say(world, f"{run.run_dir}: {end}")


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    world = World(rank=0, world_size=1, local_rank=0, local_world_size=1)
    try:
        world = world_from_environment()
        share_cores(world)
        keep_freed_memory()
        run = prepare(arguments, world)
        if read_state(run.run_dir).get("status") == "done":
            say(world, f"{run.run_dir}: this run is finished; evaluate or export it")
        else:
            run_training(run, world)
    except UserError as error:
        return exit_with(error, world)
    except OSError as error:
        return exit_with(UserError(os_error_line(error)), world)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

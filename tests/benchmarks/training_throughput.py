"""Training tokens/s through the engine and the trainer beside a bare torch loop of the same model.

    python tests/benchmarks/training_throughput.py [--recipe quickstart] [--rounds 5] [--steps 3]
        [--quick]

One process, one rank, all cores. The contestants take turns, round by round, so that a drift of the
machine's speed meets all of them; a ratio is the median over rounds of (contestant / bare loop).
The trainer is all that a step of `pretrain.train` does: loader with prefetch, learning rate,
engine, figures, progress, metrics.jsonl.

Then the training command itself: 2 ranks of half the threads beside 1 rank of all of them, in turns
too; each figure is the median over the steps after the first three.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml

REPOSITORY = Path(__file__).parent.parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
from benchmark_recipes import load_for_benchmark
from support.hand_made_shards import write_dataset, write_source

from data_prep.commands import exit_code
from data_prep.shards import Tokens
from pretrain.checkpoint.writer import AroundSaves, CheckpointWriter
from pretrain.config.deepspeed import load_engine_config, merge_config
from pretrain.config.load import recipe_to_dict
from pretrain.config.recipe import Recipe
from pretrain.data.batches import widened
from pretrain.distributed.devices import set_up_rank
from pretrain.distributed.rendezvous import free_port
from pretrain.distributed.world import World
from pretrain.engine.engine import Engine
from pretrain.engine.optim import build_optimizer
from pretrain.engine.process_group import start_process_group
from pretrain.metrics.metrics_file import MetricsFile
from pretrain.metrics.step_record import StepRecord
from pretrain.model.build import build_model
from pretrain.model.loss import LanguageModelLoss
from pretrain.run.bad_steps import BadSteps
from pretrain.run.prepare import prepare
from pretrain.run.state import note_failure
from pretrain.run.trainer import Trainer
from pretrain.view.progress import Progress
from pretrain.view.time_left import TimeLeft
from pretrain.watch.watch import Watch

ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)
Step = Callable[[list[Tokens]], object]


def bare_step(recipe: Recipe, *, naive_loss: bool) -> Step:
    """A training step in plain torch, fp32: with the whole logits at once, or with our chunked
    loss.
    """
    module = LanguageModelLoss(build_model(recipe))
    optimizer = build_optimizer(module, recipe.optimizer)

    def step(micro_batches: list[Tokens]) -> float:
        total = 0.0
        for ids in micro_batches:
            wide = torch.from_numpy(ids.astype("int64"))
            inputs, targets = wide[:, :-1], wide[:, 1:]
            if naive_loss:
                logits = module.model.lm_head(module.model.model.hidden_states(inputs))
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            else:
                loss = module(inputs, targets)
            (loss / len(micro_batches)).backward()
            total += loss.item() / len(micro_batches)
        torch.nn.utils.clip_grad_norm_(module.parameters(), recipe.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def new_engine(recipe: Recipe, device: torch.device) -> tuple[Engine, dict[str, Any]]:
    """DeepSpeed ZeRO-2 in fp32, and its merged configuration."""
    config = merge_config(recipe, load_engine_config("zero2_fp32"), ALONE.world_size)
    return Engine(build_model(recipe), recipe, config, ALONE, device), config


def engine_step(recipe: Recipe, device: torch.device) -> Step:
    """The same step through DeepSpeed ZeRO-2."""
    engine, _ = new_engine(recipe, device)
    on_gpu = device.type == "cuda"

    def step(micro_batches: list[Tokens]) -> object:
        return engine.train_step(
            [widened(ids, pinned=on_gpu) for ids in micro_batches],
            recipe.optimizer.peak_learning_rate,
        )

    return step


def trainer_step(recipe: Recipe, device: torch.device, home: Path) -> Step:
    """A step of the trainer with logging on, on a data set of random ids; what it is given it
    leaves alone.
    """
    engine, config = new_engine(recipe, device)
    flags = [
        "--recipe",
        str(home / "recipe.yaml"),
        "--data-dir",
        str(home / "data"),
        "--run-dir",
        str(home / "run"),
    ]
    run = replace(prepare(flags, ALONE), engine_config=config)
    run.run_dir.mkdir()
    metrics = MetricsFile(run.run_dir, 0)
    progress = Progress(TimeLeft(recipe, 0), 0, ALONE)
    numbers = iter(range(run.stop_at_step))
    bad_steps = BadSteps(run.run_dir, recipe.bad_steps, ALONE)
    engine.judge = bad_steps.judge
    trainer = Trainer(
        run=run,
        engine=engine,
        bad_steps=bad_steps,
        watch=Watch(ALONE, run.run_dir, recipe.stalls, note_failure),
        writer=CheckpointWriter(run.run_dir, recipe.checkpoints, ALONE, AroundSaves()),
        start_step=0,
    )

    def step(_: list[Tokens]) -> None:
        record = trainer.train_step(next(numbers))
        assert isinstance(record, StepRecord)
        progress.show(record)
        metrics.append(record)
        engine.clock.mark("other")

    return step


def write_inputs(recipe: Recipe, steps: int, home: Path) -> None:
    """A recipe of so many steps and a data set of random ids for it."""
    content = recipe_to_dict(recipe) | {"train_tokens": steps * recipe.batch.global_batch_tokens}
    content["engine"] = "zero2_fp32"
    content["validation"]["every_steps"] = content["checkpoints"]["every_steps"] = 10**6
    (home / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    random = np.random.default_rng(0)
    documents = random.integers(1, recipe.model.vocab_size, (200, 2_000)).tolist()
    written = [
        write_source(home / "data", split, "random", documents, 0)
        for split in ("train", "validation")
    ]
    write_dataset(home / "data", written, {"random": 1.0}, recipe.model.vocab_size)


def random_batches(recipe: Recipe, seed: int) -> list[Tokens]:
    """The micro-batches of one step, random ids."""
    size, length = recipe.batch.micro_batch_size, recipe.model.seq_len + 1
    random = np.random.default_rng(seed)
    count = recipe.global_batch_size // size
    return [
        random.integers(0, recipe.model.vocab_size, (size, length)).astype(np.uint16)
        for _ in range(count)
    ]


def measure(recipe: Recipe, rounds: int, steps: int, home: Path) -> dict[str, list[float]]:
    """Tokens/s of each contestant in each round; the first round, which warms up, is not kept."""
    write_inputs(recipe, (rounds + 1) * steps, home)
    device = start_process_group(ALONE)
    contestants = {
        "bare torch loop, whole logits": bare_step(recipe, naive_loss=True),
        "bare torch loop, chunked loss": bare_step(recipe, naive_loss=False),
        "engine (DeepSpeed ZeRO-2), chunked loss": engine_step(recipe, device),
        "trainer, logging on": trainer_step(recipe, device, home),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(rounds + 1):
        for name, step in contestants.items():
            batches = [random_batches(recipe, round_number * steps + i) for i in range(steps)]
            started = time.perf_counter()
            for micro_batches in batches:
                step(micro_batches)
            rates[name].append(
                steps * recipe.batch.global_batch_tokens / (time.perf_counter() - started)
            )
    return {name: values[1:] for name, values in rates.items()}


def trained_rate(ranks: int, threads: int, home: Path) -> float:
    """Median tokens/s of the training command on so many ranks."""
    run_dir = Path(mkdtemp(dir=home)) / "run"
    shared = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    command = [sys.executable, "-m", "pretrain.train", "--recipe", str(home / "recipe.yaml")]
    command += ["--data-dir", str(home / "data"), "--run-dir", str(run_dir)]
    started = []
    for rank in range(ranks):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": max(1, threads)}
        variables = {**os.environ, **{name: str(value) for name, value in own.items()}}
        started.append(
            subprocess.Popen(command, env=variables, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
        )
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit(f"training on {ranks} ranks failed: {command}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["tokens_per_s"] for line in lines[3:])


def measure_ranks(recipe: Recipe, rounds: int, steps: int, home: Path) -> dict[str, list[float]]:
    """Tokens/s of 1 rank on all cores and of 2 ranks on half of them each, in turns."""
    cores = len(os.sched_getaffinity(0))
    write_inputs(recipe, steps + 3, home)
    ways = {
        f"1 rank of {cores} threads": (1, cores),
        f"2 ranks of {max(1, cores // 2)} threads": (2, cores // 2),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (ranks, threads) in ways.items():
            rates[name].append(trained_rate(ranks, threads, home))
    return rates


def table(rates: dict[str, list[float]], base_name: str) -> str:
    """The figures as Markdown; ratios to the first."""
    base = next(iter(rates.values()))
    lines = [f"| | tokens/s (median) | ratio to {base_name} |", "|---|---:|---:|"]
    for name, values in rates.items():
        ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
        lines.append(f"| {name} | {statistics.median(values):,.0f} | {ratio:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of each contestant in a round")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test of a few seconds: a tiny vocabulary"
    )
    flags, overrides = parser.parse_known_args(arguments)
    if flags.quick:
        overrides += [
            "--model.vocab_size=512",
            "--model.num_layers=1",
            "--batch.global_batch_tokens=256",
        ]
        overrides += ["--batch.micro_batch_size=1"]
        flags.rounds, flags.steps = 2, 1
    set_up_rank(ALONE)  # as pretrain.train does, and for every contestant
    recipe = load_for_benchmark(flags.recipe, overrides)
    model = recipe.model
    print(
        f"{flags.recipe}: width {model.d_model}, {model.num_layers} layers, vocabulary "
        f"{model.vocab_size:,}, {recipe.batch.global_batch_tokens:,} tokens a step, fp32, "
        f"{torch.get_num_threads()} threads\n"
    )
    with TemporaryDirectory() as home:
        print(
            table(
                measure(recipe, flags.rounds, flags.steps, Path(home)),
                "the bare loop, whole logits",
            ),
            "\n",
        )
    with TemporaryDirectory() as home:
        rounds, steps = (1, 1) if flags.quick else (3, 20)
        print(table(measure_ranks(recipe, rounds, steps, Path(home)), "1 rank"))


if __name__ == "__main__":
    sys.exit(exit_code(main))

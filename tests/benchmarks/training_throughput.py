"""Training tokens/s through the engine beside a bare torch loop of the same model.

    python tests/benchmarks/training_throughput.py [--recipe quickstart] [--rounds 5] [--steps 3] [--quick]

One process, one rank. The contestants take turns, round by round, on the same random batches, so that a drift of
the machine's speed meets all of them; a ratio is the median over rounds of (contestant / bare loop).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from data_prep.shards import Tokens
from pretrain.config import Recipe, load_recipe
from pretrain.distributed import keep_freed_memory, share_cores, world_from_environment
from pretrain.engine import Engine, start_process_group
from pretrain.engine_config import load_engine_config, merge_config
from pretrain.loss import LanguageModelLoss
from pretrain.optim import build_optimizer
from pretrain.train import build_model

Step = Callable[[list[Tokens]], object]


def bare_step(recipe: Recipe, *, naive_loss: bool) -> Step:
    """A training step in plain torch, fp32: with the whole logits at once, or with our chunked loss."""
    module = LanguageModelLoss(build_model(recipe))
    optimizer = build_optimizer(module, recipe.optimizer)

    def step(micro_batches: list[Tokens]) -> float:
        total = 0.0
        for ids in micro_batches:
            wide = torch.from_numpy(ids.astype("int64"))
            inputs, targets = wide[:, :-1], wide[:, 1:]
            if naive_loss:
                logits = module.model.output_projection(module.model.hidden_states(inputs))
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


def engine_step(recipe: Recipe) -> Step:
    """The same step through DeepSpeed ZeRO-2."""
    world = world_from_environment()
    config = merge_config(recipe, load_engine_config("zero2_fp32"), world.world_size)
    device = start_process_group(world)
    engine = Engine(build_model(recipe), recipe, config, world, device)

    def step(micro_batches: list[Tokens]) -> object:
        return engine.train_step([engine.pinned(ids) for ids in micro_batches], recipe.optimizer.peak_learning_rate)

    return step


def random_batches(recipe: Recipe, seed: int) -> list[Tokens]:
    """The micro-batches of one step, random ids."""
    size, length = recipe.batch.micro_batch_size, recipe.model.seq_len + 1
    random = np.random.default_rng(seed)
    count = recipe.global_batch_size // size
    return [random.integers(0, recipe.model.vocab_size, (size, length)).astype(np.uint16) for _ in range(count)]


def measure(recipe: Recipe, rounds: int, steps: int) -> dict[str, list[float]]:
    """Tokens/s of each contestant in each round; the first round, which warms up, is not kept."""
    contestants = {
        "bare torch loop, whole logits": bare_step(recipe, naive_loss=True),
        "bare torch loop, chunked loss": bare_step(recipe, naive_loss=False),
        "engine (DeepSpeed ZeRO-2), chunked loss": engine_step(recipe),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(rounds + 1):
        for name, step in contestants.items():
            batches = [random_batches(recipe, round_number * steps + i) for i in range(steps)]
            started = time.perf_counter()
            for micro_batches in batches:
                step(micro_batches)
            rates[name].append(steps * recipe.batch.global_batch_tokens / (time.perf_counter() - started))
    return {name: values[1:] for name, values in rates.items()}


def table(rates: dict[str, list[float]]) -> str:
    """The figures as Markdown."""
    base = next(iter(rates.values()))
    lines = ["| | tokens/s (median) | ratio to the bare loop, whole logits |", "|---|---:|---:|"]
    for name, values in rates.items():
        ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
        lines.append(f"| {name} | {statistics.median(values):,.0f} | {ratio:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of each contestant in a round")
    parser.add_argument("--quick", action="store_true", help="a smoke test of a few seconds: a tiny vocabulary")
    flags, overrides = parser.parse_known_args(arguments)
    if flags.quick:
        overrides += ["--model.vocab_size=512", "--model.num_layers=1", "--batch.global_batch_tokens=256"]
        overrides += ["--batch.micro_batch_size=1"]
        flags.rounds, flags.steps = 2, 1
    share_cores(world_from_environment())
    keep_freed_memory()  # as pretrain.train does, and for every contestant
    recipe = load_recipe(flags.recipe, overrides)
    model = recipe.model
    rates = measure(recipe, flags.rounds, flags.steps)
    print(
        f"{flags.recipe}: width {model.d_model}, {model.num_layers} layers, vocabulary {model.vocab_size:,}, "
        f"{recipe.batch.global_batch_tokens:,} tokens a step, fp32, {torch.get_num_threads()} threads\n"
    )
    print(table(rates))


if __name__ == "__main__":
    main()

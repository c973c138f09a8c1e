"""What intra_document_masking costs: forward and backward pass of the loss with and without it.

    python tests/benchmarks/document_masking.py [--recipe quickstart] [--rounds 15] [--steps 4]
        [--quick]

One process, fp32 on the CPU. Both take turns on the same random windows, in which every
`--document-tokens`-th token ends a document; the ratio is the median over rounds of (masked /
plain) times. The goal is at most 1.10.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from benchmark_recipes import load_for_benchmark
from torch import Tensor

from data_prep.commands import exit_code
from pretrain.config.recipe import Recipe
from pretrain.distributed.devices import set_up_rank
from pretrain.distributed.world import world_from_environment
from pretrain.model.build import model_config
from pretrain.model.loss import LanguageModelLoss
from pretrain.modeling_tablefree import TableFreeForCausalLM, initialise_parameters

EOS_ID = 0


def windows(recipe: Recipe, document_tokens: int, seed: int) -> Tensor:
    """A micro-batch of random ids with ends of documents, shape (B, T + 1)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (recipe.batch.micro_batch_size, recipe.model.seq_len + 1)
    ids = torch.randint(1, recipe.model.vocab_size, shape, generator=generator)
    return ids.masked_fill(torch.rand(shape, generator=generator) < 1 / document_tokens, EOS_ID)


def seconds(module: LanguageModelLoss, batches: list[Tensor]) -> float:
    """Time of a forward and backward pass over each batch."""
    started = time.perf_counter()
    for ids in batches:
        module(ids[:, :-1], ids[:, 1:]).backward()
        module.zero_grad()
    return time.perf_counter() - started


def measure(
    recipe: Recipe, rounds: int, steps: int, document_tokens: int
) -> tuple[list[float], list[float]]:
    """Seconds a batch, plain and masked, in each round; the first round, which warms up, is not
    kept.
    """
    model = TableFreeForCausalLM(model_config(recipe.model))
    initialise_parameters(model, recipe.seed)
    modules = [LanguageModelLoss(model), LanguageModelLoss(model, eos_id=EOS_ID)]
    taken: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        batches = [windows(recipe, document_tokens, number * steps + i) for i in range(steps)]
        order = (0, 1) if number % 2 else (1, 0)  # whoever goes second finds warmer caches
        by_module = {which: seconds(modules[which], batches) / steps for which in order}
        taken.append((by_module[0], by_module[1]))
    plain, masked = zip(*taken[1:], strict=True)
    return list(plain), list(masked)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="batches of each in a round")
    parser.add_argument("--document-tokens", type=int, default=64, help="mean length of a document")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test of a few seconds: a tiny vocabulary"
    )
    flags, overrides = parser.parse_known_args(arguments)
    if flags.quick:
        overrides += ["--model.vocab_size=512", "--model.num_layers=1"]
        flags.rounds, flags.steps = 2, 1
    set_up_rank(world_from_environment())
    recipe = load_for_benchmark(flags.recipe, overrides)
    plain, masked = measure(recipe, flags.rounds, flags.steps, flags.document_tokens)
    ratio = statistics.median(m / p for m, p in zip(masked, plain, strict=True))
    model, rows = recipe.model, recipe.batch.micro_batch_size
    print(
        f"{flags.recipe}: {rows} windows of {model.seq_len} tokens, width {model.d_model}, "
        f"{model.num_layers} layers, vocabulary {model.vocab_size:,}, fp32, "
        f"{torch.get_num_threads()} threads\n\n"
        "| | ms (median) | ratio |\n|---|---:|---:|\n"
        f"| plain | {1e3 * statistics.median(plain):.1f} | 1.00 |\n"
        f"| intra_document_masking | {1e3 * statistics.median(masked):.1f} | {ratio:.2f} |"
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))

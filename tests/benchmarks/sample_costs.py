"""What samples cost a run: CPU time of a token of them against that of a training step.

    python tests/benchmarks/sample_costs.py [--prompts 3] [--tokens 64] [--rounds 7]

One thread, of the quick start's shape: in turns a step (forward, backward, AdamW, in plain torch)
and a sample, as a validation writes it. The share is that of all samples of a validation in the
steps from one to the next; ranks share the prompts, which is not counted.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2])]

import torch
from tokenizers import Tokenizer, decoders, models

from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.distributed.world import World
from pretrain.generation.continuation import Speaker
from pretrain.generation.prompts import Prompt
from pretrain.generation.samples import SampleWriter
from pretrain.model.build import build_model
from pretrain.model.loss import LanguageModelLoss

ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)


def words(vocab_size: int) -> Tokenizer:
    """A tokenizer of so many words."""
    vocabulary = {f" w{number}": number for number in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" w0"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def step_of(recipe: Recipe, module: LanguageModelLoss) -> Callable[[], None]:
    """What trains one step on random ids."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    rows = recipe.batch.micro_batch_size
    ids = torch.randint(0, recipe.model.vocab_size, (rows, recipe.model.seq_len + 1))

    def step() -> None:
        for _ in range(recipe.global_batch_size // rows):
            module(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_of(action: Callable[[], object]) -> float:
    """CPU time, which other jobs on the machine change less than the clock's."""
    began = time.process_time()
    action()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe("quickstart")
    model = build_model(recipe)
    step = step_of(recipe, LanguageModelLoss(model))
    speaker = Speaker(
        model=model,
        tokenizer=words(recipe.model.vocab_size),
        end_ids=frozenset(),
        seq_len=recipe.model.seq_len,
    )
    prompt = Prompt(text="", ids=(1, 2, 3, 4, 5))
    writer = SampleWriter(speaker, [prompt], flags.tokens, ALONE)
    step()  # what is paid once
    steps_s = []
    samples_s = []
    for _ in range(flags.rounds):
        steps_s.append(seconds_of(step))
        samples_s.append(seconds_of(lambda: writer.write(lambda: None)))
    step_s = statistics.median(steps_s)
    token_s = statistics.median(samples_s) / flags.tokens
    every = recipe.validation.every_steps
    share = flags.prompts * flags.tokens * token_s / (every * step_s)
    print(
        f"a step {step_s:.3f} s, a token of a sample {token_s * 1e3:.1f} ms: {step_s / token_s:.0f}"
    )
    print(f"{flags.prompts} prompts of {flags.tokens} tokens every {every} steps: {share:.2%}")


if __name__ == "__main__":
    main()

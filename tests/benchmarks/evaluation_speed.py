"""Tokens a second of a whole evaluation on a CPU, beside those of training's forward pass.

    python tests/benchmarks/evaluation_speed.py [--tokens 98304] [--rounds 3] [--threads 1]

The two take turns in one run, in one process, in fp32, on the same ids; their seconds are those of
the processor, which other load on the machine hardly moves while there is one thread. An
evaluation is all that `pretrain.evaluate` does once a run is open: weights read, windows scored,
documents summed and drawn anew. A forward pass is what a training step does before its backward
pass: in windows of a micro-batch, with what gradients need kept, through the default loss head
(which makes the head's gradients on its way) and through the head as it is usually written.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from support.hand_made_shards import write_dataset, write_source
from support.untrained_runs import save_untrained_run

from data_prep.shards import ShardReader
from pretrain.checkpoint.find import load_for_reading
from pretrain.checkpoint.reader import Checkpoint, load_model
from pretrain.data.loader import ValidationWindows
from pretrain.distributed.devices import keep_freed_memory
from pretrain.evaluation.scoring import evaluate
from pretrain.model.loss import LanguageModelLoss

DOCUMENT_TOKENS = 700
MICRO_BATCH = 8  # windows


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=96 * 1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=16_384)
    return parser.parse_args(arguments)


def make_data(home: Path, flags: argparse.Namespace) -> ShardReader:
    """A validation split of so many random ids."""
    random = np.random.default_rng(1)
    documents = [
        random.integers(1, flags.vocab_size, DOCUMENT_TOKENS).tolist()
        for _ in range(flags.tokens // (DOCUMENT_TOKENS + 1) + 1)
    ]
    written = [
        write_source(home, "train", "a", documents[:2], 0),
        write_source(home, "validation", "a", documents, 0),
    ]
    return ShardReader(write_dataset(home, written, {"a": 1.0}, flags.vocab_size))


def open_untrained(home: Path, flags: argparse.Namespace) -> Checkpoint:
    """A checkpoint of the asked size."""
    tokenizer = home / "no_tokenizer"
    tokenizer.mkdir()
    save_untrained_run(
        home / "run",
        tokenizer,
        "binary_code",
        d_model=flags.d_model,
        num_layers=flags.num_layers,
        num_heads=flags.d_model // 64,
        seq_len=flags.seq_len,
        vocab_size=flags.vocab_size,
        code_bits=16,
    )
    return load_for_reading(home / "run")


def forward_pass(checkpoint: Checkpoint, reader: ShardReader, loss_head: str) -> Callable[[], None]:
    """Training's forward pass over the same windows."""
    module = LanguageModelLoss(load_model(checkpoint), loss_head=loss_head).train()
    windows = ValidationWindows(reader, seq_len=module.model.config.seq_len)

    def run() -> None:
        for first in range(0, windows.whole_windows, MICRO_BATCH):
            past_last = min(first + MICRO_BATCH, windows.whole_windows)
            ids = torch.from_numpy(windows.windows(np.arange(first, past_last)).astype(np.int64))
            module(ids[:, :-1], ids[:, 1:])  # the graph goes with the loss

    return run


def seconds_of(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main(arguments: Sequence[str] | None = None) -> None:
    flags = parse_arguments(arguments)
    keep_freed_memory()
    torch.set_num_threads(flags.threads)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        reader = make_data(home / "data", flags)
        checkpoint = open_untrained(home, flags)
        turns: dict[str, Callable[[], object]] = {
            "evaluation": lambda: evaluate(checkpoint, reader),
            "forward pass, chunked head": forward_pass(checkpoint, reader, "chunked"),
            "forward pass, whole head": forward_pass(checkpoint, reader, "whole"),
        }
        for run in turns.values():
            run()  # memory and kernels
        rates: dict[str, list[float]] = {name: [] for name in turns}
        for _ in range(flags.rounds):
            for name, run in turns.items():
                rates[name].append(flags.tokens / seconds_of(run))
    print(
        f"{flags.d_model} wide, {flags.num_layers} layers, V = {flags.vocab_size:,}, windows of "
        f"{flags.seq_len:,}, {torch.get_num_threads()} threads, median of {flags.rounds} rounds"
    )
    own = rates["evaluation"]
    for name, each in rates.items():
        ratios = [a / b for a, b in zip(own, each, strict=True)]
        print(
            f"{name:<28}{statistics.median(each):>10,.0f} tokens/s"
            f"   evaluation is {statistics.median(ratios):.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()

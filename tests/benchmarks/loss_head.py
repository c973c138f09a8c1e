"""Memory, time and accuracy of the loss heads, forward and backward, beside the whole logits.

    python tests/benchmarks/loss_head.py [--tokens 16384] [--d-model 1024] [--rounds 2] [--quick]

CPU. The heads take turns in one run, each turn in a process of its own: its time, and its peak
memory above what it held before. At the default size the whole logits need about 17 GiB. Accuracy
is measured against fp64, on fewer tokens and ids, in fp32 and bf16: the loss, and both gradients
together, relative to their norm.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.loss import LossHead, chunked_head, whole_head


class Turn(NamedTuple):
    """What one forward and backward pass took."""

    seconds: float
    extra_bytes: int


class Errors(NamedTuple):
    """Relative to fp64: of the loss, and of the gradients of hidden states and weight."""

    loss: float
    hidden: float
    weight: float


def torch_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's own, at its best here: chunks of 256 tokens; its mean would be a bf16 sum of bf16
    terms.
    """
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256, chunking_method=None)
    nats = F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)
    return nats.float().mean()


def heads() -> dict[str, LossHead]:
    """The contestants, the one that the others are compared with first."""
    found: dict[str, LossHead] = {"whole": whole_head, "chunked": chunked_head}
    return (
        {**found, "F.linear_cross_entropy": torch_head}
        if hasattr(F, "linear_cross_entropy")
        else found
    )


def example(tokens: int, width: int, vocab_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states as the last LayerNorm leaves them, a projection whose logits spread by 3,
    targets.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocab_size, width, generator=generator) * (3 / width**0.5)
    return hidden, weight, torch.randint(0, vocab_size, (tokens,), generator=generator)


def forward_and_backward(
    head: LossHead, hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, ...]:
    """Loss and the gradients of hidden states and weight."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = head(hidden, weight, targets)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def resident_bytes() -> int:
    """Memory that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def take_turn(name: str, tokens: int, width: int, vocab_size: int) -> Turn:
    """One pass in fp32, after a small one that loads what the first loads."""
    head = heads()[name]
    forward_and_backward(head, *example(16, 16, 16, seed=0))
    tensors = example(tokens, width, vocab_size, seed=1)
    before, started = resident_bytes(), time.perf_counter()
    forward_and_backward(head, *tensors)
    seconds = time.perf_counter() - started
    return Turn(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def measure_turns(tokens: int, width: int, vocab_size: int, rounds: int) -> dict[str, list[Turn]]:
    """Every head once a round, each time in a fresh process."""
    turns: dict[str, list[Turn]] = {name: [] for name in heads()}
    for _ in range(rounds):
        for name, taken in turns.items():
            with multiprocessing.get_context("fork").Pool(1) as process:
                taken.append(process.apply(take_turn, (name, tokens, width, vocab_size)))
    return turns


def relative(value: Tensor, truth: Tensor) -> float:
    """Distance from the truth, in units of its length."""
    return float((value.double() - truth).norm() / truth.norm())


def measure_errors(
    tokens: int, width: int, vocab_size: int, dtype: torch.dtype
) -> dict[str, Errors]:
    """Of every head on operands of a precision, against the same operands in fp64."""
    hidden, weight, targets = example(tokens, width, vocab_size, seed=2)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    wide = hidden.double().requires_grad_(), weight.double().requires_grad_()
    true_loss = F.cross_entropy(wide[0] @ wide[1].T, targets)
    truths = (true_loss.detach(), *torch.autograd.grad(true_loss, wide))
    errors = {}
    for name, head in heads().items():
        values = forward_and_backward(head, hidden, weight, targets)
        errors[name] = Errors(
            *(relative(value, truth) for value, truth in zip(values, truths, strict=True))
        )
    return errors


def speed_table(turns: dict[str, list[Turn]]) -> str:
    """Memory and time as Markdown; a ratio is the median over rounds of (head / whole logits)."""
    lines = [
        "| head, fp32 | peak extra memory | of whole | seconds | of whole |",
        "|---|---:|---:|---:|---:|",
    ]
    base = turns["whole"]
    for name, taken in turns.items():
        extra = [turn.extra_bytes for turn in taken]
        memory = statistics.median(
            mine / b.extra_bytes for mine, b in zip(extra, base, strict=True)
        )
        ratio = statistics.median(
            turn.seconds / b.seconds for turn, b in zip(taken, base, strict=True)
        )
        seconds = statistics.median(turn.seconds for turn in taken)
        size = f"{statistics.median(extra) / 2**20:,.0f} MiB"
        lines.append(f"| {name} | {size} | {memory:.3f} | {seconds:.2f} | {ratio:.2f} |")
    return "\n".join(lines)


def error_table(errors: dict[str, dict[str, Errors]]) -> str:
    """Relative errors as Markdown."""
    lines = [
        "| head | precision | loss | hidden gradient | weight gradient |",
        "|---|---|---:|---:|---:|",
    ]
    for precision, of_heads in errors.items():
        for name, error in of_heads.items():
            lines.append(
                f"| {name} | {precision} | {error.loss:.1e} | {error.hidden:.2e} | "
                f"{error.weight:.2e} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16 * 1024)
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test of a few seconds: tiny shapes"
    )
    flags = parser.parse_args(arguments)
    accuracy = (2048, flags.d_model, 8192)
    if flags.quick:
        flags.tokens, flags.d_model, flags.vocab_size, flags.rounds = 512, 32, 2048, 1
        accuracy = (300, 32, 256)
    turns = measure_turns(flags.tokens, flags.d_model, flags.vocab_size, flags.rounds)
    print(
        f"{flags.tokens:,} tokens, width {flags.d_model:,}, vocabulary {flags.vocab_size:,}", end=""
    )
    print(
        f", {torch.get_num_threads()} threads, median of {flags.rounds}\n\n{speed_table(turns)}\n"
    )
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16}
    errors = {name: measure_errors(*accuracy, dtype) for name, dtype in precisions.items()}
    print("Error relative to fp64, {:,} tokens, width {:,}, vocabulary {:,}\n".format(*accuracy))
    print(error_table(errors))


if __name__ == "__main__":
    main()

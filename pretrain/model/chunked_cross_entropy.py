"""Cross-entropy over chunks of tokens, which never holds the whole logits.

In training the gradients of a chunk are made while its logits are at hand. Whatever the precision
of the model, logits, loss and both gradients are fp32 sums of exact products; a gradient is rounded
once, when it is whole and scaled.

Tensor legend: N tokens of a micro-batch, C tokens of a chunk, D model width, V vocabulary.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.costs.budgets import chunk_tokens


@functools.cache
def multiplies_into_fp32(device_type: str) -> bool:
    """Whether torch here multiplies bf16 matrices into an fp32 sum.

    It does on NVIDIA since 2.8, on AMD later, on no CPU.
    """
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device_type)
    total = torch.zeros(16, 16, device=device_type)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (TypeError, RuntimeError):
        return False
    return True


def factor(matrix: Tensor) -> Tensor:
    """The matrix as a factor of fp32 products.

    That is a copy in fp32 where the device cannot multiply into fp32.
    """
    if multiplies_into_fp32(matrix.device.type):
        return matrix
    return matrix.float()


def into_fp32(matrix: Tensor) -> dict[str, Any]:
    """The keywords with which torch.mm and torch.addmm give the product of such factors in fp32."""
    if matrix.dtype == torch.float32:
        return {}
    return {"out_dtype": torch.float32}


class Chunk(NamedTuple):
    """Some tokens of a micro-batch, and what the head says of them."""

    place: slice  # among the N tokens
    hidden: Tensor  # (C, D)
    targets: Tensor  # (C, 1)
    log_probs: Tensor  # (C, V), fp32; the next chunk overwrites them


def log_probability_chunks(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int | None
) -> Iterator[Chunk]:
    """Chunks of `chunk` tokens, or of as many as their budget allows, one after another.

    `weight_VD` is a factor. The memory is allocated once: on a CPU, page faults would cost more
    than the softmax.
    """
    tokens = len(targets_N)
    vocab_size = len(weight_VD)
    device = weight_VD.device
    chunk = min(tokens, chunk or chunk_tokens(vocab_size, device.type))
    # The logits of a chunk, and their log-probabilities.
    buffers_2CV = torch.empty(2, chunk, vocab_size, dtype=torch.float32, device=device)
    keywords = into_fp32(weight_VD)
    for start in range(0, tokens, chunk):
        place = slice(start, min(start + chunk, tokens))
        hidden_CD = factor(hidden_ND[place])
        logits_CV, log_probs_CV = buffers_2CV[:, : len(hidden_CD)]
        torch.mm(hidden_CD, weight_VD.T, out=logits_CV, **keywords)
        torch.log_softmax(logits_CV, dim=-1, out=log_probs_CV)
        yield Chunk(place, hidden_CD, targets_N[place, None], log_probs_CV)


@torch.no_grad()
def token_nats(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int | None = None
) -> Tensor:
    """Cross-entropy of every target in nats, fp32, shape (N,). For evaluation: no gradients."""
    nats_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_ND.device)
    weight = factor(weight_VD)
    for each in log_probability_chunks(hidden_ND, weight, targets_N, chunk):
        of_targets_C1 = each.log_probs.gather(1, each.targets)
        nats_N[each.place] = -of_targets_C1[:, 0]
    return nats_N


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy over N targets; gradients are made in the forward pass, chunk by chunk.

    Memory in fp32: 2 x C x V, freed before the backward pass, and the gradients' V x D + N x D;
    where the model is bf16 also one bf16 C x V on a GPU or an fp32 copy of the weight on a CPU, and
    last the gradients in bf16.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int | None
    ) -> Tensor:
        weight = factor(weight_VD)
        keywords = into_fp32(weight)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND, dtype=torch.float32)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for each in log_probability_chunks(hidden_ND, weight, targets_N, chunk):
            targets_C1 = each.targets
            total -= each.log_probs.gather(1, targets_C1).sum()
            # Softmax - one-hot, in place: subtracted in fp32, where it cancels.
            errors_CV = each.log_probs.exp_()
            of_targets_C1 = errors_CV.gather(1, targets_C1)
            errors_CV.scatter_(1, targets_C1, of_targets_C1 - 1.0)
            errors_CV = errors_CV.to(weight.dtype)
            torch.mm(errors_CV, weight, out=grad_hidden_ND[each.place], **keywords)
            torch.addmm(grad_weight_VD, errors_CV.T, each.hidden, out=grad_weight_VD, **keywords)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype)
        return total / len(targets_N)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # In place, so that a second V x D in fp32 never exists; autograd refuses a second backward
        # pass for it.
        grad_hidden, grad_weight = ctx.saved_tensors
        (grad_loss,) = grad_outputs
        scale = grad_loss / len(grad_hidden)
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            grad_hidden.mul_(scale).to(hidden_dtype),
            grad_weight.mul_(scale).to(weight_dtype),
            None,
            None,
        )

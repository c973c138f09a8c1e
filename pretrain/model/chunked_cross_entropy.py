"""Cross-entropy over chunks of tokens, whose gradients are made while the logits of a chunk are at hand."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pretrain.costs.budgets import chunk_tokens


@functools.cache
def multiplies_into_fp32(device_type: str) -> bool:
    """Whether torch here multiplies bf16 matrices into an fp32 sum: on NVIDIA since 2.8, on AMD
    later, on no CPU.
    """
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device_type)
    total = torch.zeros(16, 16, device=device_type)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (TypeError, RuntimeError):
        return False
    return True


def factor(matrix: Tensor) -> Tensor:
    """The matrix as a factor of fp32 products: a copy in fp32 where the device cannot multiply
    into fp32.
    """
    return matrix if multiplies_into_fp32(matrix.device.type) else matrix.float()


def into_fp32(matrix: Tensor) -> dict[str, Any]:
    """The keywords with which torch.mm and torch.addmm give the product of such factors in fp32."""
    return {} if matrix.dtype == torch.float32 else {"out_dtype": torch.float32}


def log_probability_chunks(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int | None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """For each chunk its place, hidden_CD, targets_C1 and log_probs_CV in fp32, which the next
    chunk overwrites.

    `weight_VD` is a factor. The memory is allocated once: on a CPU, page faults would cost more
    than the softmax.
    """
    tokens, vocab_size = len(targets_N), len(weight_VD)
    chunk = min(tokens, chunk or chunk_tokens(vocab_size, weight_VD.device.type))
    buffers = torch.empty(2, chunk, vocab_size, dtype=torch.float32, device=weight_VD.device)
    for start in range(0, tokens, chunk):
        place = slice(start, min(start + chunk, tokens))
        hidden_CD = factor(hidden_ND[place])
        logits_CV, log_probs_CV = buffers[:, : len(hidden_CD)]
        torch.mm(hidden_CD, weight_VD.T, out=logits_CV, **into_fp32(weight_VD))
        torch.log_softmax(logits_CV, dim=-1, out=log_probs_CV)
        yield place, hidden_CD, targets_N[place, None], log_probs_CV


@torch.no_grad()
def token_nats(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int | None = None
) -> Tensor:
    """Cross-entropy of every target in nats, fp32, shape (N,). For evaluation: no gradients."""
    nats = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_ND.device)
    for place, _, targets_C1, log_probs_CV in log_probability_chunks(
        hidden_ND, factor(weight_VD), targets_N, chunk
    ):
        nats[place] = -log_probs_CV.gather(1, targets_C1)[:, 0]
    return nats


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
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        for place, hidden, targets, log_probs in log_probability_chunks(
            hidden_ND, weight, targets_N, chunk
        ):
            total -= log_probs.gather(1, targets).sum()
            errors = log_probs.exp_()  # softmax - one-hot: subtracted in fp32, where it cancels
            errors.scatter_(1, targets, errors.gather(1, targets) - 1.0)
            errors = errors.to(weight.dtype)
            torch.mm(errors, weight, out=grad_hidden[place], **into_fp32(weight))
            torch.addmm(grad_weight, errors.T, hidden, out=grad_weight, **into_fp32(weight))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        return total / len(targets_N)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # In place, so that a second V x D in fp32 never exists; autograd refuses a second backward
        # pass for it.
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0] / len(grad_hidden)
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            grad_hidden.mul_(scale).to(hidden_dtype),
            grad_weight.mul_(scale).to(weight_dtype),
            None,
            None,
        )

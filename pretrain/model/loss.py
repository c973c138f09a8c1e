"""The loss head: next-token cross-entropy that never holds the whole logits.

At V = 65,536 the logits of a micro-batch dwarf the model, so the head works on chunks of tokens. In
training it computes the gradients of a chunk while its logits are at hand. Whatever the precision
of the model, logits, loss and both gradients are fp32 sums of exact products; a gradient is rounded
once, when it is whole and scaled.

Tensor legend: N tokens of a micro-batch, C tokens of a chunk, D model width, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.errors import UserError
from pretrain.costs.memory import chunk_tokens
from pretrain.model.documents import hidden_states_by_document
from pretrain.modeling_tablefree import TableFreeForCausalLM

# From (hidden_ND, weight_VD, targets_N) the mean cross-entropy in nats, fp32, to call backward on.
LossHead = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def chunked_head(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int | None = None
) -> Tensor:
    """Ours, the default: chunks of `chunk` tokens, or of as many as `chunk_tokens` says."""
    return ChunkedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, chunk)


def whole_head(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """As it is usually written, with all logits at once."""
    return F.cross_entropy((hidden_ND @ weight_VD.T).float(), targets_N)


def build_loss_head(name: str) -> LossHead:
    """The head that the recipe key `loss_head` names. Raises UserError where it cannot run.

    `liger` is the fused Triton kernel of the package liger-kernel, for CUDA.
    """
    if name != "liger":
        return {"chunked": chunked_head, "whole": whole_head}[name]
    if not torch.cuda.is_available():
        raise UserError(
            "loss_head liger: it needs a CUDA device and this machine has none; set loss_head to "
            "chunked"
        )
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        advice = (
            "install it with pip install -e '.[cuda]' in this project's folder, or set loss_head "
            "to chunked"
        )
        raise UserError(f"loss_head liger: {error}; {advice}") from None
    return functools.partial(liger_fused_linear_cross_entropy, accum_dtype=torch.float32)


class LanguageModelLoss(nn.Module):
    """The decoder and its loss as the one module that the engine trains."""

    def __init__(
        self, model: TableFreeForCausalLM, loss_head: str = "chunked", eos_id: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.eos_id = eos_id
        self.loss_head = build_loss_head(loss_head)

    def hidden_states(self, inputs_BT: Tensor) -> Tensor:
        """Final hidden states, (B, T, D); with an `eos_id`, no token sees another document of
        its window.
        """
        if self.eos_id is None:
            return self.model.model.hidden_states(inputs_BT)
        return hidden_states_by_document(self.model.model, inputs_BT, self.eos_id)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats over all targets; every target counts the same."""
        hidden_ND = self.hidden_states(inputs_BT).flatten(0, 1)
        return self.loss_head(hidden_ND, self.model.lm_head.weight, targets_BT.flatten())

    @torch.no_grad()
    def nats(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy of each target in nats, fp32, shape (B, T)."""
        hidden_ND = self.hidden_states(inputs_BT).flatten(0, 1)
        nats_N = token_nats(hidden_ND, self.model.lm_head.weight, targets_BT.flatten())
        return nats_N.view(targets_BT.shape)

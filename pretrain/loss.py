"""The loss head: next-token cross-entropy that never holds the whole logits.

At V = 65,536 the logits of a micro-batch dwarf the model, so the head works on chunks of tokens. In training
it computes the gradients of a chunk while its logits are at hand; loss and weight gradient accumulate in fp32.

Tensor legend: N tokens of a micro-batch, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pretrain.modeling_tablefree import TableFreeForCausalLM

CHUNK_TOKENS = 256


def log_probabilities(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """Log-softmax of the logits in fp32, whatever the precision of the product, (N, V)."""
    return torch.log_softmax((hidden_ND @ weight_VD.T).float(), dim=-1)


def token_nats(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy of every target in nats, fp32, shape (N,). For evaluation: no gradients."""
    chunks = zip(hidden_ND.split(CHUNK_TOKENS), targets_N.split(CHUNK_TOKENS), strict=True)
    nats = [-log_probabilities(hidden, weight_VD).gather(1, targets[:, None])[:, 0] for hidden, targets in chunks]
    return torch.cat(nats)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy over N targets; gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
        scale = 1.0 / len(targets_N)
        for start in range(0, len(targets_N), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            hidden, targets = hidden_ND[part], targets_N[part, None]
            log_probs = log_probabilities(hidden, weight_VD)
            total -= log_probs.gather(1, targets).sum()
            errors = log_probs.exp_()  # softmax - one-hot
            errors.scatter_add_(1, targets, errors.new_full((), -1.0).expand(targets.shape))
            errors = errors.to(hidden.dtype)
            grad_hidden[part] = (errors @ weight_VD) * scale
            if grad_weight.dtype == hidden.dtype:
                grad_weight.addmm_(errors.T, hidden * scale)
            else:
                grad_weight += errors.T @ (hidden * scale)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        return total * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_outputs[0], grad_weight * grad_outputs[0], None


class LanguageModelLoss(nn.Module):
    """The decoder and its loss as the one module that the engine trains."""

    def __init__(self, model: TableFreeForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats over all targets; every target counts the same."""
        hidden_BTD = self.model.hidden_states(inputs_BT)
        weight_VD = self.model.output_projection.weight
        return ChunkedCrossEntropy.apply(hidden_BTD.flatten(0, 1), weight_VD, targets_BT.flatten())

    @torch.no_grad()
    def nats(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy of each target in nats, fp32, shape (B, T)."""
        hidden_BTD = self.model.hidden_states(inputs_BT)
        flat = token_nats(hidden_BTD.flatten(0, 1), self.model.output_projection.weight, targets_BT.flatten())
        return flat.view(targets_BT.shape)

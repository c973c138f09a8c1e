"""The loss of next tokens, and which of its heads a run takes.

At V = 65,536 the logits of a micro-batch dwarf the model, so the default head works on chunks of
tokens; see pretrain/model/chunked_cross_entropy.py.

Tensor legend: B windows, T tokens, N = B T tokens of a micro-batch, D model width, V vocabulary.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.errors import UserError, install_advice
from pretrain.model.chunked_cross_entropy import ChunkedCrossEntropy, token_nats
from pretrain.model.documents import hidden_states_by_document
from pretrain.modeling_tablefree import TableFreeForCausalLM

# From (hidden_ND, weight_VD, targets_N) the mean cross-entropy in nats, fp32, to call backward on.
LossHead = Callable[[Tensor, Tensor, Tensor], Tensor]


def chunked_head(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int | None = None
) -> Tensor:
    """Ours, the default: chunks of `chunk` tokens, or of as many as `chunk_tokens` says."""
    apply: Callable[..., Tensor] = ChunkedCrossEntropy.apply
    return apply(hidden_ND, weight_VD, targets_N, chunk)


def whole_head(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """As it is usually written, with all logits at once."""
    logits_NV = hidden_ND @ weight_VD.T
    return F.cross_entropy(logits_NV.float(), targets_N)


def build_loss_head(name: str) -> LossHead:
    """The head that the recipe key `loss_head` names. Raises UserError where it cannot run.

    `liger` is the fused Triton kernel of the package liger-kernel, for CUDA.
    """
    if name == "chunked":
        return chunked_head
    if name == "whole":
        return whole_head
    if not torch.cuda.is_available():
        raise UserError(
            "loss_head liger: it needs a CUDA device and this machine has none; set loss_head to "
            "chunked"
        )
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        advice = f"{install_advice('cuda')}, or set loss_head to chunked"
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
        """Final hidden states, (B, T, D).

        With an `eos_id`, no token sees another document of its window.
        """
        if self.eos_id is None:
            hidden_BTD: Tensor = self.model.model.hidden_states(inputs_BT)
            return hidden_BTD
        return hidden_states_by_document(self.model.model, inputs_BT, self.eos_id)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats over all targets; every target counts the same."""
        hidden_ND = self.hidden_states(inputs_BT).flatten(0, 1)
        targets_N = targets_BT.flatten()
        return self.loss_head(hidden_ND, self.model.lm_head.weight, targets_N)

    @torch.no_grad()
    def nats(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy of each target in nats, fp32, shape (B, T)."""
        hidden_ND = self.hidden_states(inputs_BT).flatten(0, 1)
        targets_N = targets_BT.flatten()
        nats_N = token_nats(hidden_ND, self.model.lm_head.weight, targets_N)
        return nats_N.view(targets_BT.shape)

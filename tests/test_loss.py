from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config import ModelRecipe, model_config
from pretrain.loss import CHUNK_TOKENS, ChunkedCrossEntropy, LanguageModelLoss, token_nats
from pretrain.modeling_tablefree import INPUT_EMBEDDINGS, TableFreeForCausalLM, initialise_parameters

AROUND_A_CHUNK = [1, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS, 2 * CHUNK_TOKENS + 77]


def example(tokens: int, width: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, width, generator=generator) * 0.3).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab_size, (tokens,), generator=generator)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss as it is usually written, with all logits at once."""
    return F.cross_entropy((hidden @ weight.T).float(), targets)


def gradients(loss: Tensor, hidden: Tensor, weight: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    grad_hidden, grad_weight = torch.autograd.grad(loss * scale, (hidden, weight))
    return grad_hidden, grad_weight


def distance(value: Tensor, truth: Tensor) -> float:
    return float((value.float() - truth).norm() / truth.norm())


@pytest.mark.parametrize("tokens", AROUND_A_CHUNK)
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_loss_and_both_gradients_equal_cross_entropy_in_fp32(tokens: int, scale: float) -> None:
    hidden, weight, targets = example(tokens, 16, 50, torch.float32)
    expected, loss = naive(hidden, weight, targets), ChunkedCrossEntropy.apply(hidden, weight, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    pairs = zip(gradients(loss, hidden, weight, scale), gradients(expected, hidden, weight, scale), strict=True)
    for mine, theirs in pairs:
        assert distance(mine, theirs) < 1e-5


@pytest.mark.parametrize("tokens", [64, 8 * CHUNK_TOKENS, 8 * CHUNK_TOKENS + 1])
def test_in_bf16_the_figure_is_the_true_loss_of_the_bf16_weights(tokens: int) -> None:
    hidden, weight, targets = example(tokens, 64, 512, torch.bfloat16)
    true = naive(hidden.float(), weight.float(), targets)
    loss = ChunkedCrossEntropy.apply(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(true.item(), rel=1e-3)
    nats = token_nats(hidden.detach(), weight.detach(), targets)
    assert nats.mean().item() == pytest.approx(true.item(), rel=1e-3)


@pytest.mark.parametrize("tokens", [64, 4 * CHUNK_TOKENS, 64 * CHUNK_TOKENS + 1])
def test_in_bf16_gradients_stay_as_accurate_as_those_of_the_naive_loss_for_any_number_of_chunks(tokens: int) -> None:
    hidden, weight, targets = example(tokens, 64, 128, torch.bfloat16)
    wide_hidden, wide_weight = (x.detach().float().requires_grad_() for x in (hidden, weight))
    true = gradients(naive(wide_hidden, wide_weight, targets), wide_hidden, wide_weight)
    usual = gradients(naive(hidden, weight, targets), hidden, weight)
    mine = gradients(ChunkedCrossEntropy.apply(hidden, weight, targets), hidden, weight)
    for name, one, other, truth in zip(("hidden", "weight"), mine, usual, true, strict=True):
        assert distance(one, truth) < 1.25 * distance(other, truth), name  # one rounding of a chunk's product more
        assert distance(one, truth) < 5e-3, name


@pytest.mark.parametrize("tokens", AROUND_A_CHUNK)
def test_token_nats_are_the_cross_entropy_of_each_target(tokens: int) -> None:
    hidden, weight, targets = (x.detach() for x in example(tokens, 16, 50, torch.float32))
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(token_nats(hidden, weight, targets), expected, rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """The most elements that any result of an operator has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_whole_logits_never_exist() -> None:
    tokens, vocab_size = 4 * CHUNK_TOKENS, 1_000
    hidden, weight, targets = example(tokens, 8, vocab_size, torch.float32)
    with LargestTensor() as training:
        ChunkedCrossEntropy.apply(hidden, weight, targets).backward()
    with LargestTensor() as evaluation, torch.no_grad():
        token_nats(hidden, weight, targets)
    with LargestTensor() as usual:
        naive(hidden, weight, targets).backward()
    assert training.elements == evaluation.elements == CHUNK_TOKENS * vocab_size
    assert usual.elements == tokens * vocab_size


@pytest.mark.parametrize("input_embedding", INPUT_EMBEDDINGS)
def test_the_trained_module_gives_the_loss_and_gradients_of_the_decoder_s_own_labels(input_embedding: str) -> None:
    recipe = ModelRecipe(
        vocab_size=60, d_model=24, num_layers=2, num_heads=2, seq_len=16, input_embedding=input_embedding
    )  # type: ignore[arg-type]
    model = TableFreeForCausalLM(model_config(recipe))
    initialise_parameters(model, 1)
    module, ids = LanguageModelLoss(model), torch.randint(0, 60, (3, 17), generator=torch.Generator().manual_seed(1))
    expected = model(ids, labels=ids).loss
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = module(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, list(model.parameters())), expected_gradients, rtol=1e-4, atol=1e-7
    )
    nats = module.nats(ids[:, :-1], ids[:, 1:])
    assert nats.shape == (3, 16)
    torch.testing.assert_close(nats.mean(), expected)

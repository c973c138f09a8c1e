import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.runs import run_command
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep.errors import UserError
from pretrain.config.recipe import ModelRecipe
from pretrain.costs.budgets import chunk_tokens
from pretrain.model.build import model_config
from pretrain.model.chunked_cross_entropy import token_nats
from pretrain.model.loss import LanguageModelLoss, build_loss_head, chunked_head, whole_head
from pretrain.modeling_tablefree import (
    INPUT_EMBEDDINGS,
    TableFreeForCausalLM,
    initialise_parameters,
)

CHUNK = 64
AROUND_A_CHUNK = [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 17]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def example(
    tokens: int, width: int, vocab_size: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states as a LayerNorm leaves them, a projection whose logits spread by 2, targets."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    generator = torch.Generator().manual_seed(1000 * seed + tokens)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (
        (torch.randn(vocab_size, width, generator=generator) * 2 / width**0.5)
        .to(device, dtype)
        .requires_grad_()
    )
    return hidden, weight, torch.randint(0, vocab_size, (tokens,), generator=generator).to(device)


def gradients(
    loss: Tensor, hidden: Tensor, weight: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    grad_hidden, grad_weight = torch.autograd.grad(loss * scale, (hidden, weight))
    return grad_hidden, grad_weight


def distance(value: Tensor, truth: Tensor) -> float:
    return float((value.to(truth.dtype) - truth).norm() / truth.norm())


def widened(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers in fp64, in which the truth is computed."""
    return hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", AROUND_A_CHUNK)
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_loss_and_both_gradients_equal_cross_entropy_in_fp32(
    tokens: int, scale: float, device: str
) -> None:
    hidden, weight, targets = example(tokens, 16, 50, torch.float32, device=device)
    expected, loss = (
        whole_head(hidden, weight, targets),
        chunked_head(hidden, weight, targets, CHUNK),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    pairs = zip(
        gradients(loss, hidden, weight, scale),
        gradients(expected, hidden, weight, scale),
        strict=True,
    )
    for mine, theirs in pairs:
        assert distance(mine, theirs) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [CHUNK, 8 * CHUNK, 8 * CHUNK + 1])
def test_in_bf16_the_figure_is_the_true_loss_of_the_bf16_weights(tokens: int, device: str) -> None:
    hidden, weight, targets = example(tokens, 64, 512, torch.bfloat16, device=device)
    true = F.cross_entropy(hidden.double() @ weight.double().T, targets)
    loss = chunked_head(hidden, weight, targets, CHUNK)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(true.item(), rel=1e-6)
    assert token_nats(hidden, weight, targets, CHUNK).mean().item() == pytest.approx(
        true.item(), rel=1e-6
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("tokens", "width", "vocab_size"),
    [
        (CHUNK, 64, 128),
        (4 * CHUNK, 64, 512),
        (64 * CHUNK + 1, 64, 128),
        (100, 1024, 512),
        (5 * CHUNK, 1024, 1000),
    ],
)
def test_in_bf16_gradients_are_as_accurate_as_those_of_the_whole_logits_in_any_number_of_chunks(
    tokens: int, width: int, vocab_size: int, seed: int, device: str
) -> None:
    hidden, weight, targets = example(tokens, width, vocab_size, torch.bfloat16, seed, device)
    wide = widened(hidden, weight)
    true = gradients(F.cross_entropy(wide[0] @ wide[1].T, targets), *wide, scale=1 / 3)
    usual = gradients(whole_head(hidden, weight, targets), hidden, weight, scale=1 / 3)
    mine = gradients(chunked_head(hidden, weight, targets, CHUNK), hidden, weight, scale=1 / 3)
    for name, one, other, truth in zip(("hidden", "weight"), mine, usual, true, strict=True):
        assert one.dtype == torch.bfloat16, name
        assert distance(one, truth) <= distance(other, truth), name
        assert distance(one, truth) < 4e-3, name  # a bf16 keeps 8 bits


def test_a_token_that_the_model_is_sure_of_keeps_the_digits_of_its_small_error() -> None:
    hidden = torch.eye(2, 16).bfloat16().requires_grad_()
    weight = torch.zeros(4, 16).index_put((torch.arange(2), torch.arange(2)), torch.tensor(7.0))
    weight, targets = weight.bfloat16().requires_grad_(), torch.arange(2)
    wide = widened(hidden, weight)
    true = gradients(F.cross_entropy(wide[0] @ wide[1].T, targets), *wide)
    for mine, truth in zip(
        gradients(chunked_head(hidden, weight, targets), hidden, weight), true, strict=True
    ):
        assert distance(mine, truth) < 4e-3


def test_a_second_backward_pass_is_refused_and_not_scaled_twice() -> None:
    hidden, weight, targets = example(CHUNK, 16, 50, torch.float32)
    loss = chunked_head(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("tokens", AROUND_A_CHUNK)
def test_token_nats_are_the_cross_entropy_of_each_target(tokens: int) -> None:
    hidden, weight, targets = example(tokens, 16, 50, torch.float32)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none").detach()
    torch.testing.assert_close(
        token_nats(hidden, weight, targets, CHUNK), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("vocab_size", "on_cpu", "on_gpu"), [(65_536, 256, 4_096), (2_000, 8_388, 134_217)]
)
def test_a_chunk_s_logits_have_a_budget_of_bytes_by_device(
    vocab_size: int, on_cpu: int, on_gpu: int
) -> None:
    assert chunk_tokens(vocab_size, "cpu") == on_cpu
    assert chunk_tokens(vocab_size, "cuda") == on_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a CUDA device it can run")
def test_a_head_that_cannot_run_here_is_refused_in_one_line() -> None:
    with pytest.raises(
        UserError, match="liger: it needs a CUDA device and this machine has none; set loss_head to"
    ):
        build_loss_head("liger")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["whole", "liger"])
def test_every_head_gives_the_true_loss_and_gradients_on_cuda(name: str) -> None:
    hidden, weight, targets = example(300, 64, 512, torch.bfloat16, device="cuda")
    if name == "liger":
        pytest.importorskip("liger_kernel")
    wide = widened(hidden, weight)
    true_loss, loss = (
        F.cross_entropy(wide[0] @ wide[1].T, targets),
        build_loss_head(name)(hidden, weight, targets),
    )
    assert loss.item() == pytest.approx(true_loss.item(), rel=1e-3)
    for mine, truth in zip(
        gradients(loss, hidden, weight), gradients(true_loss, *wide), strict=True
    ):
        assert distance(mine, truth) < 1e-2


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
    tokens, vocab_size = 6 * CHUNK, 1_000
    hidden, weight, targets = example(tokens, 8, vocab_size, torch.float32)
    with LargestTensor() as training:
        chunked_head(hidden, weight, targets, CHUNK).backward()
    with LargestTensor() as evaluation:
        token_nats(hidden, weight, targets, CHUNK)
    with LargestTensor() as usual:
        whole_head(hidden, weight, targets).backward()
    # logits and log-probabilities
    assert training.elements == evaluation.elements == 2 * CHUNK * vocab_size
    assert usual.elements == tokens * vocab_size


@pytest.mark.parametrize("loss_head", ["chunked", "whole"])
@pytest.mark.parametrize("input_embedding", INPUT_EMBEDDINGS)
def test_the_trained_module_gives_the_loss_and_gradients_of_the_decoder_s_own_labels(
    input_embedding: str, loss_head: str
) -> None:
    recipe = ModelRecipe(
        vocab_size=60,
        d_model=24,
        num_layers=2,
        num_heads=2,
        seq_len=16,
        input_embedding=input_embedding,
    )  # type: ignore[arg-type]
    model = TableFreeForCausalLM(model_config(recipe))
    initialise_parameters(model, 1)
    module = LanguageModelLoss(model, loss_head=loss_head)
    ids = torch.randint(0, 60, (3, 17), generator=torch.Generator().manual_seed(1))
    expected = model(ids, labels=ids).loss
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = module(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, list(model.parameters())),
        expected_gradients,
        rtol=1e-4,
        atol=1e-7,
    )
    nats = module.nats(ids[:, :-1], ids[:, 1:])
    assert nats.shape == (3, 16)
    torch.testing.assert_close(nats.mean(), expected)


def test_the_benchmark_of_the_heads_runs() -> None:
    result = run_command(sys.executable, "tests/benchmarks/loss_head.py", "--quick")
    assert result.returncode == 0, result.stderr
    assert "| chunked | bf16 |" in result.stdout

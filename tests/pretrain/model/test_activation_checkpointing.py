import json
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from support.runs import run_command
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config.recipe import ModelRecipe
from pretrain.model.activation_checkpointing import apply_activation_checkpointing
from pretrain.model.build import model_config
from pretrain.model.loss import LanguageModelLoss
from pretrain.modeling_tablefree import TableFreeForCausalLM, initialise_parameters

NUM_LAYERS = 4
FEED_FORWARD, ATTENTION = "aten.addmm", "aten._scaled_dot_product_flash_attention_for_cpu"
GELU, LAYER_NORM = "aten.gelu", "aten.native_layer_norm"


def build(mode: str, every_n_layers: int = 1) -> TableFreeForCausalLM:
    recipe = ModelRecipe(
        vocab_size=64,
        d_model=24,
        num_layers=NUM_LAYERS,
        num_heads=2,
        seq_len=16,
        input_embedding="learned",
    )
    model = TableFreeForCausalLM(model_config(recipe))
    initialise_parameters(model, 1)
    apply_activation_checkpointing(model, mode, every_n_layers)
    return model


def some_ids() -> Tensor:
    return torch.randint(0, 64, (3, 17), generator=torch.Generator().manual_seed(1))


def loss_of(model: TableFreeForCausalLM) -> Tensor:
    return LanguageModelLoss(model)(some_ids()[:, :-1], some_ids()[:, 1:])


class CountOperators(TorchDispatchMode):
    """Counts the kernels that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__str__()] += 1
        return func(*args, **(kwargs or {}))


def kernels(mode: str, every_n_layers: int = 1) -> Counter[str]:
    """How often each kernel runs in a forward and backward pass of the decoder without its loss
    head.
    """
    model = build(mode, every_n_layers)
    with CountOperators() as counter:
        model.model.hidden_states(some_ids()).sum().backward()
    return counter.counts


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("every_n_layers", [1, 2, 3, 9])
def test_loss_and_gradients_are_bitwise_those_of_a_model_that_keeps_everything(
    mode: str, every_n_layers: int
) -> None:
    kept, recomputed = build("none"), build(mode, every_n_layers)
    losses = [loss_of(kept), loss_of(recomputed)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, mine), (_, theirs) in zip(
        kept.named_parameters(), recomputed.named_parameters(), strict=True
    ):
        assert mine.grad is not None, name
        assert torch.equal(mine.grad, theirs.grad), name


def test_none_runs_every_block_once() -> None:
    counts = kernels("none")
    assert counts[GELU] == counts[ATTENTION] == NUM_LAYERS
    assert counts[FEED_FORWARD] == 4 * NUM_LAYERS  # query_key_value, output, up, down
    assert counts[LAYER_NORM] == 2 * NUM_LAYERS + 1


@pytest.mark.parametrize(("every_n_layers", "recomputed"), [(1, 4), (2, 2), (3, 2), (4, 1), (9, 1)])
def test_full_runs_every_nth_block_again_matrix_products_included(
    every_n_layers: int, recomputed: int
) -> None:
    counts, once = kernels("full", every_n_layers), kernels("none")
    for kernel, in_block in ((GELU, 1), (ATTENTION, 1), (LAYER_NORM, 2)):
        assert counts[kernel] == once[kernel] + in_block * recomputed, kernel
    # the last product of a block, `down`, has nothing after it that would need its result
    assert 3 * recomputed <= counts[FEED_FORWARD] - once[FEED_FORWARD] <= 4 * recomputed


@pytest.mark.parametrize(("every_n_layers", "recomputed"), [(1, 4), (2, 2), (3, 2)])
def test_selective_runs_only_what_is_cheap_again(every_n_layers: int, recomputed: int) -> None:
    counts, once = kernels("selective", every_n_layers), kernels("none")
    assert counts[GELU] == once[GELU] + recomputed
    assert counts[LAYER_NORM] == once[LAYER_NORM] + 2 * recomputed
    assert counts[FEED_FORWARD] == once[FEED_FORWARD]
    assert counts[ATTENTION] == once[ATTENTION]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_every_block_is_entered_once_and_each_recomputed_one_twice(mode: str) -> None:
    model = build(mode, every_n_layers=2)
    entered: Counter[int] = Counter()
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: entered.update([index]))
    loss_of(model).backward()
    again = 1 if mode == "none" else 2
    assert entered == {0: again, 1: 1, 2: again, 3: 1}


def test_evaluation_recomputes_nothing() -> None:
    model = build("full")
    with torch.no_grad(), CountOperators() as counter:
        loss_of(model)
    assert counter.counts[GELU] == NUM_LAYERS


PEAK_MEMORY = """
import json, multiprocessing, resource, sys
import torch
from pretrain.model.activation_checkpointing import apply_activation_checkpointing
from pretrain.config.recipe import ModelRecipe
from pretrain.model.build import model_config
from pretrain.modeling_tablefree import TableFreeForCausalLM

def peak_megabytes(mode):
    torch.set_num_threads(1)
    recipe = ModelRecipe(
        vocab_size=64, d_model=64, num_layers=12, num_heads=2, seq_len=512,
        input_embedding="learned",
    )
    model = TableFreeForCausalLM(model_config(recipe))
    apply_activation_checkpointing(model, mode, 1)
    model.model.hidden_states(torch.zeros(4, 512, dtype=torch.int64)).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

if __name__ == "__main__":
    # a fresh process for each
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(peak_megabytes, ["none", "selective", "full"], chunksize=1)))
"""


def test_peak_memory_falls_from_none_to_selective_to_full() -> None:
    # A fixed threshold makes malloc give freed tensors back at once, so that the peak is what
    # autograd holds.
    result = run_command(sys.executable, "-c", PEAK_MEMORY, MALLOC_MMAP_THRESHOLD_="65536")
    assert result.returncode == 0, result.stderr
    none, selective, full = json.loads(result.stdout)
    # One array of 2,048 tokens x 64 channels is 0.5 MB. A block keeps about 18 of them, of which 9
    # come from matrix products and attention, and 1 is its input: 12 blocks keep 110, 55 and 6 MB.
    assert none - full > 60
    assert none - selective > 15
    assert selective - full > 25

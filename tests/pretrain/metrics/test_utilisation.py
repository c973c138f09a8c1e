"""Against what the utilisation of a device is held."""

import pytest
import torch
from support.runs import tiny_recipe_content

from pretrain.config.load import build_recipe
from pretrain.costs.devices import find_device
from pretrain.distributed.world import World
from pretrain.metrics import utilisation
from pretrain.metrics.utilisation import Utilisation
from pretrain.view.log_lines import LONGEST

ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)
CPU = torch.device("cpu")


def utilisation_of(dtype: torch.dtype = torch.float32) -> Utilisation:
    return Utilisation(build_recipe(tiny_recipe_content(), "tiny.yaml"), CPU, dtype, ALONE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_is_held_against_a_matrix_product_which_is_said(dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    own = utilisation_of(dtype)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))  # the measurement draws no random numbers
    assert own.mfu(1e3) is None
    assert own.matmul_flops is not None
    assert 1e8 < own.matmul_flops < 1e15
    # a model that multiplies as fast as that is at 1
    tokens_per_s = own.matmul_flops / own.flops_per_token
    assert own.mfu_of_matmul(tokens_per_s) == pytest.approx(1)
    kind = str(dtype).removeprefix("torch.")
    assert f"; MFU* is against a measured {kind} matrix product" in str(own)
    assert len(str(own)) <= LONGEST


def test_a_device_whose_peak_is_known_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    known = find_device("NVIDIA H200")
    assert known
    monkeypatch.setattr(utilisation, "find_device", lambda *_: known)
    own = utilisation_of()
    assert own.matmul_flops is None
    assert own.mfu_of_matmul(1e3) is None
    assert own.mfu(known.peak_flops / own.flops_per_token) == pytest.approx(1)
    assert "peak 990 TFLOP/s over all ranks" in str(own)

"""Arithmetic stands for the model: parameters, FLOPs a token, and which device a driver's name
means.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import overrides_of

from pretrain.config.load import RECIPES_DIR, load_recipe
from pretrain.config.recipe import ModelRecipe
from pretrain.costs.devices import DEVICES, Device, find_device
from pretrain.costs.flops import count_parameters, flops_per_token
from pretrain.model.build import model_config
from pretrain.modeling_tablefree import TableFreeForCausalLM


def counted_by_torch(model: ModelRecipe) -> dict[str, int]:
    with torch.device("meta"):
        built = TableFreeForCausalLM(model_config(model))
    parts = {
        "input_embedding": built.model.input_embedding,
        "blocks": built.model.layers,
        "final_norm": built.model.final_norm,
        "output_projection": built.lm_head,
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert sum(counts.values()) == sum(p.numel() for p in built.parameters())
    return counts


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES_DIR.glob("*.yaml")))
def test_parameters_of_every_recipe_are_those_of_its_model(name: str) -> None:
    model = load_recipe(name, overrides_of(name)).model
    assert count_parameters(model) == counted_by_torch(model)


@settings(max_examples=20)
@given(
    vocab_size=st.integers(2, 70),
    heads=st.integers(1, 3),
    half_head=st.integers(1, 3),
    layers=st.integers(1, 3),
    embedding=st.sampled_from(["binary_code", "affine_code", "permuted_code", "learned"]),
)
def test_parameters_of_any_shape_are_those_of_its_model(
    vocab_size: int, heads: int, half_head: int, layers: int, embedding: str
) -> None:
    model = ModelRecipe(
        vocab_size=vocab_size,
        d_model=2 * half_head * heads * 7,
        num_layers=layers,
        num_heads=heads * 7,
        seq_len=8,
        input_embedding=embedding,  # type: ignore[arg-type]
        code_bits=7,
    )
    assert count_parameters(model) == counted_by_torch(model)


def test_a_token_of_the_paper_s_model_costs_three_gflop_whatever_its_input() -> None:
    binary, learned = (load_recipe(f"paper_{name}").model for name in ("binary_code", "learned"))
    assert flops_per_token(binary) == flops_per_token(learned) == pytest.approx(3.02e9, rel=1e-3)


def test_flops_are_those_that_torch_counts_with_half_of_attention_for_causality() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = ModelRecipe(
        vocab_size=96,
        d_model=64,
        num_layers=3,
        num_heads=2,
        seq_len=32,
        input_embedding="binary_code",
        code_bits=16,
    )
    built = TableFreeForCausalLM(model_config(model))
    ids_BT = torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        built(ids_BT).logits.sum().backward()
    whole_attention = flops_per_token(model) + 6 * model.num_layers * model.seq_len * model.d_model
    assert counter.get_total_flops() == pytest.approx(64 * whole_attention, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100 pcie"),
        ("NVIDIA H100 NVL", "h100 nvl"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A100-SXM4-80GB", "a100 80gb"),
        ("NVIDIA A100 80GB PCIe", "a100 pcie 80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100 pcie"),
        ("NVIDIA H100 NVL 94GB", "h100 nvl"),
        ("NVIDIA GeForce RTX 4090", "rtx 4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("4090", "rtx 4090"),
        *((device.name, device.name) for device in DEVICES),
    ],
)
def test_a_device_is_found_by_its_driver_s_name_and_by_its_short_one(
    name: str, device: str
) -> None:
    found = find_device(name)
    assert found is not None
    assert found.name == device


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "",
        "nvidia",
        "NVIDIA H20",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA A100-PCIE-30GB",
        "NVIDIA H100 96GB HBM3",
        "NVIDIA H100 SXM5 64GB",
        "NVIDIA H100 80GB HBM2e",
        "NVIDIA H100 NVL 80GB",
        "NVIDIA H200 PCIe",
        "NVIDIA GH200 144G HBM3e",
        "NVIDIA GH200 120GB",
        "NVIDIA RTX 3090 12GB",
        "NVIDIA L4-SXM4",
        "AMD Instinct MI300X 128GB",
    ],
)
def test_a_part_or_a_namesake_of_a_known_device_is_not_taken_for_it(name: str) -> None:
    assert find_device(name) is None


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_a_device_whose_driver_reports_other_memory_than_its_data_sheet_is_another_one(
    device: Device,
) -> None:
    """Drivers report 0.98 to 1.08 times the data sheet's gigabytes."""
    assert find_device(device.name) == device
    for share in (0.95, 1.0, 1.08):
        assert find_device(device.name, share * device.memory_bytes) == device
    for share in (0.5, 0.8, 1.2, 2.0):
        assert find_device(device.name, share * device.memory_bytes) is None

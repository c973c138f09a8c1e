"""What a model costs by arithmetic, and what devices give: parameters, FLOPs a token, peak figures. No torch.

MFU, model-FLOPs utilisation, is tokens/s x FLOPs a token / peak FLOP/s. What is counted for a token, forward and
backward together (the backward pass costs twice the forward one):

    6 x (12 L D^2 + V D)     the matrices of the blocks and the output projection: a multiplication and an addition each
    6 x L T D                causal attention: a token meets T/2 keys on average, twice (scores, then values)

Nothing is counted for the input, table or code, nor for recomputed activations, norms and the optimizer.
L layers, D model width, T window, V vocabulary.
"""

import re
from dataclasses import dataclass

from pretrain.config import ModelRecipe

FORMULA = "6 x (12 L D^2 + V D) + 6 L T D"


def count_parameters(model: ModelRecipe) -> dict[str, int]:
    """Trained parameters of each part of the decoder."""
    width, table = model.d_model, model.vocab_size * model.d_model
    return {
        "input_embedding": table if model.input_embedding == "learned" else 0,
        "blocks": model.num_layers * (12 * width**2 + 13 * width),  # 9 D biases, 4 D in two LayerNorms
        "final_norm": 2 * width,
        "output_projection": table,
    }


def flops_per_token(model: ModelRecipe) -> float:
    """FLOPs of a trained token, forward and backward: 6 x (12 L D^2 + V D) + 6 L T D, as the module says."""
    matrices = 12 * model.num_layers * model.d_model**2 + model.vocab_size * model.d_model
    return 6.0 * (matrices + model.num_layers * model.seq_len * model.d_model)


@dataclass(frozen=True)
class Device:
    """An accelerator as torch counts them: dense bf16 peak with fp32 sums, memory, memory bandwidth, link in its node.

    Memory is in the data sheet's decimal gigabytes; what the driver reports is some per cent more. The link is one of
    pretrain.plan's, the one that holds for all devices of a node: of cards that bridges join in pairs, PCIe.
    """

    name: str
    peak_flops: float
    memory_bytes: float
    bytes_per_s: float
    link: str


# The makers' data sheets: dense figures, half of those "with sparsity"; of GeForce cards the architecture white
# papers, bf16 with fp32 accumulation. (name, TFLOP/s, GB, TB/s, link)
DEVICES = tuple(
    Device(name, tflops * 1e12, gigabytes * 1e9, terabytes_per_s * 1e12, link)
    for name, tflops, gigabytes, terabytes_per_s, link in (
        ("b200", 2250.0, 180, 7.7, "nvlink5"),  # HGX B200 data sheet: 8 GPUs have 1,440 GB and 62 TB/s
        ("gb200", 2500.0, 186, 8.0, "nvlink5"),
        ("gh200", 990.0, 96, 4.0, "nvlink4"),
        ("h200", 989.5, 141, 4.8, "nvlink4"),
        ("h200 nvl", 835.5, 141, 4.8, "pcie5"),
        ("h100", 989.5, 80, 3.35, "nvlink4"),  # SXM
        ("h100 pcie", 756.5, 80, 2.0, "pcie5"),
        ("h100 nvl", 835.5, 94, 3.9, "pcie5"),
        ("a100", 312.0, 40, 1.555, "nvlink3"),
        ("a100 80gb", 312.0, 80, 1.935, "nvlink3"),  # memory of the PCIe card, SXM 2.039; link of SXM
        ("l40s", 362.0, 48, 0.864, "pcie4"),
        ("l4", 121.0, 24, 0.3, "pcie4"),
        ("a40", 149.7, 48, 0.696, "pcie4"),
        ("a10", 125.0, 24, 0.6, "pcie4"),
        ("rtx 5090", 209.5, 32, 1.792, "pcie5"),
        ("rtx 4090", 165.2, 24, 1.008, "pcie4"),
        ("rtx 3090", 71.0, 24, 0.936, "pcie4"),
        ("mi355x", 2516.6, 288, 8.0, "infinity-fabric4"),
        ("mi325x", 1307.4, 256, 6.0, "infinity-fabric3"),
        ("mi300x", 1307.4, 192, 5.3, "infinity-fabric3"),
        ("mi250x", 191.5, 64, 1.6, "infinity-fabric2"),  # a die of two, each a device to torch: half of 383, 128, 3.2
    )
)
# What a driver's name may hold beside a device's own words. Others, such as MIG or Laptop, make it another device.
NEUTRAL = re.compile(r"nvidia|amd|instinct|geforce|rtx|tesla|oam|sxm\d?|pcie|hbm\d\w?|\d+gb")


def find_device(name: str) -> Device | None:
    """The device of a driver's name ("NVIDIA A100-SXM4-80GB") or a short one ("h200"); None: not known.

    The entry with the most words that all occur in the name, if what remains of the name says nothing else.
    """
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    matching = [d for d in DEVICES if set(d.name.split()) - {"rtx"} <= words]
    best = max(matching, key=lambda d: len(d.name.split()), default=None)
    rest = words - set(best.name.split()) if best else words
    return best if all(NEUTRAL.fullmatch(word) for word in rest) else None


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of a rank's work: of a window, forward and backward; of a parameter, each micro-step and each update."""

    window: float
    reduced_parameter: float
    updated_parameter: float

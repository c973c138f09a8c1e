"""What a model costs by arithmetic, and what devices give: parameters, FLOPs a token, peak figures.
No torch.

MFU, model-FLOPs utilisation, is tokens/s x FLOPs a token / peak FLOP/s. What is counted for a
token, forward and backward together (the backward pass costs twice the forward one):

    6 x (12 L D^2 + V D)     the matrices of the blocks and the output projection: a multiplication and an addition each
    6 x L T D                causal attention: a token meets T/2 keys on average, twice (scores, then values)

Nothing is counted for the input, table or code, nor for recomputed activations, norms and the
optimizer. L layers, D model width, T window, V vocabulary.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from pretrain.config.recipe import ModelRecipe

FORMULA = "6 x (12 L D^2 + V D) + 6 L T D"


def count_parameters(model: ModelRecipe) -> dict[str, int]:
    """Trained parameters of each part of the decoder."""
    width, table = model.d_model, model.vocab_size * model.d_model
    return {
        "input_embedding": table if model.input_embedding == "learned" else 0,
        # 9 D biases, 4 D in two LayerNorms
        "blocks": model.num_layers * (12 * width**2 + 13 * width),
        "final_norm": 2 * width,
        "output_projection": table,
    }


def flops_per_token(model: ModelRecipe) -> float:
    """FLOPs of a trained token, forward and backward: 6 x (12 L D^2 + V D) + 6 L T D, as the
    module says.
    """
    matrices = 12 * model.num_layers * model.d_model**2 + model.vocab_size * model.d_model
    return 6.0 * (matrices + model.num_layers * model.seq_len * model.d_model)


@dataclass(frozen=True)
class Device:
    """An accelerator as torch counts them: dense bf16 peak with fp32 sums, memory, memory
    bandwidth, link in its node.

    Memory is in the data sheet's decimal gigabytes; what the driver reports is some per cent more.
    A bandwidth of infinity is one that is not known. The link is one of LINKS, the one that holds
    for all devices of a node: of cards that bridges join in pairs, PCIe.
    """

    name: str
    peak_flops: float
    memory_bytes: float
    bytes_per_s: float
    link: str


# The size in this device's name is that of its processor's memory.
HOST_MEMORY_BYTES = {"gh200": 480e9}
FIGURES = yaml.safe_load(Path(__file__).with_name("devices.yaml").read_bytes())
LINKS: dict[str, float] = FIGURES["links"]  # GB/s
DEVICES = tuple(
    Device(name, tflops * 1e12, gigabytes * 1e9, terabytes_per_s * 1e12, link)
    for name, (tflops, gigabytes, terabytes_per_s, link) in FIGURES["devices"].items()
)
# What a driver's name may hold beside a device's own words. Others, such as MIG or Laptop, make it
# another device.
NEUTRAL = re.compile(r"nvidia|amd|instinct|geforce|rtx|tesla|oam|hbm3e?")
FORM = re.compile(r"(pcie)|sxm\d?")
SIZE = re.compile(r"(\d+)gb?")
# What a driver reports over the data sheet's figure: 0.98 (an L4 with ECC) to 1.08 (cards whose
# "GB" are 2^30 bytes).
LEAST_REPORTED, MOST_REPORTED = 0.9, 1.1


def find_device(name: str, memory_bytes: float | None = None) -> Device | None:
    """The device of a driver's name ("NVIDIA A100-SXM4-80GB") or a short one ("h200"); None: not
    known.

    The entry with the most words that all occur in the name, if what remains of the name says
    nothing else: exactly that device, or none. `memory_bytes` is what the driver reports; a card
    with other memory is another device.
    """
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    matching = [device for device in DEVICES if set(device.name.split()) - {"rtx"} <= words]
    best = max(matching, key=lambda device: len(device.name.split()), default=None)
    if best is None or not all(
        says_nothing_else(word, best) for word in words - set(best.name.split())
    ):
        return None
    if memory_bytes and not LEAST_REPORTED <= memory_bytes / best.memory_bytes <= MOST_REPORTED:
        return None
    return best


def says_nothing_else(word: str, device: Device) -> bool:
    """Whether a word of a driver's name is one that this device may have: no other size, no
    other model.
    """
    if form := FORM.fullmatch(word):
        return device.link.startswith("pcie" if form[1] else "nvlink")
    if size := SIZE.fullmatch(word):
        return float(size[1]) * 1e9 in (device.memory_bytes, HOST_MEMORY_BYTES.get(device.name))
    return bool(NEUTRAL.fullmatch(word))


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of a rank's work: of a window, forward and backward; of a parameter, each
    micro-step and each update.
    """

    window: float
    reduced_parameter: float
    updated_parameter: float

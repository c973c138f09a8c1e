"""What devices give: peak figures, memory and links of accelerators, found by the name that a driver says."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml


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

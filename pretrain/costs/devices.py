"""What devices give: peak figures, memory and links, found by the name that a driver says."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Device:
    """An accelerator as torch counts them."""

    name: str
    peak_flops: float  # dense, in bf16 with fp32 sums
    memory_bytes: float  # decimal, as data sheets count; a driver reports some per cent more
    bytes_per_s: float  # of its memory; infinity where it is not known
    # One of LINKS, which all devices of a node have: PCIe of cards that bridges join in pairs.
    link: str


# The size in this device's name is that of its processor's memory.
HOST_MEMORY_BYTES = {"gh200": 480e9}


def read_devices(rows: dict[str, list[Any]]) -> tuple[Device, ...]:
    """Devices from the rows of devices.yaml, which are in the units of data sheets."""
    devices = []
    for name, row in rows.items():
        tflops, gigabytes, terabytes_per_s, link = row
        device = Device(
            name=name,
            peak_flops=tflops * 1e12,
            memory_bytes=gigabytes * 1e9,
            bytes_per_s=terabytes_per_s * 1e12,
            link=link,
        )
        devices.append(device)
    return tuple(devices)


FIGURES = yaml.safe_load(Path(__file__).with_name("devices.yaml").read_bytes())
LINKS: dict[str, float] = FIGURES["links"]  # GB/s
DEVICES = read_devices(FIGURES["devices"])
# What a driver's name may hold beside a device's own words. Others, such as MIG or Laptop, make it
# another device.
NEUTRAL = re.compile(r"nvidia|amd|instinct|geforce|rtx|tesla|oam|hbm3e?")
FORM = re.compile(r"(pcie)|sxm\d?")
SIZE = re.compile(r"(\d+)gb?")
# What a driver reports over the data sheet's figure: 0.98 (an L4 with ECC) to 1.08 (cards whose
# "GB" are 2^30 bytes).
LEAST_REPORTED = 0.9
MOST_REPORTED = 1.1


def find_device(name: str, memory_bytes: float | None = None) -> Device | None:
    """The device of a driver's name ("NVIDIA A100-SXM4-80GB") or a short one ("h200"), or None.

    The entry with the most words that all occur in the name, if what remains of the name says
    nothing else: exactly that device, or none. `memory_bytes` is what the driver reports; a card
    with other memory is another device.
    """
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    matching = [device for device in DEVICES if needed_words(device) <= words]
    best = max(matching, key=lambda device: len(device.name.split()), default=None)
    if best is None:
        return None
    others = words - set(best.name.split())
    if not all(says_nothing_else(word, best) for word in others):
        return None
    if memory_bytes:
        ratio = memory_bytes / best.memory_bytes
        if not LEAST_REPORTED <= ratio <= MOST_REPORTED:
            return None
    return best


def needed_words(device: Device) -> set[str]:
    """The words that a name must have: a driver may leave the series RTX out."""
    return set(device.name.split()) - {"rtx"}


def says_nothing_else(word: str, device: Device) -> bool:
    """Whether a word of a driver's name is one that this device may have.

    It is none of another size, form or model.
    """
    form = FORM.fullmatch(word)
    if form:
        return device.link.startswith("pcie" if form[1] else "nvlink")
    size = SIZE.fullmatch(word)
    if size:
        in_bytes = float(size[1]) * 1e9
        return in_bytes in (device.memory_bytes, HOST_MEMORY_BYTES.get(device.name))
    return NEUTRAL.fullmatch(word) is not None

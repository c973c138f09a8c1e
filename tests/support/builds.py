"""What decides the last digits of a figure on this machine."""

import platform
from pathlib import Path

import torch


def this_build() -> dict[str, str]:
    """Torch, and what its libraries choose kernels by."""
    cpuinfo = Path("/proc/cpuinfo")
    words = cpuinfo.read_text().split("\n\n")[0].split() if cpuinfo.exists() else []
    vendor = next(
        (word for word in words if word in ("AuthenticAMD", "GenuineIntel")), platform.processor()
    )
    widest = next((flag for flag in ("amx_bf16", "avx512f", "avx2", "avx") if flag in words), "")
    return {
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{vendor} {widest}",
    }

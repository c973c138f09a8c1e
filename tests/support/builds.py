"""What decides the last digits of a figure on this machine."""

import platform
from pathlib import Path

import torch


def this_build() -> dict[str, str]:
    """What decides the last digits: torch, and the kernels that its libraries choose for this
    processor.
    """
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

"""Prints how many GPUs torch finds on this machine; given a directory, after its name in Slurm.

    python count_gpus.py               8
    python count_gpus.py DIRECTORY     n1 8, or exit code 1 where n1 does not see the directory

A torch that was built for CPUs finds none: that is read in its file version.py, in a tenth of a
second, where importing torch takes two.
"""

import importlib.util
import os
import runpy
import sys
from pathlib import Path


def is_built_for_gpus() -> bool:
    """Whether torch was built for CUDA or ROCm, or does not say."""
    about = importlib.util.find_spec("torch")
    version = Path(about.origin).with_name("version.py") if about and about.origin else Path()
    if not version.is_file():
        return True
    built = runpy.run_path(str(version))
    return not {"cuda", "hip"} <= built.keys() or bool(built["cuda"] or built["hip"])


def gpus_here() -> int:
    """GPUs that torch finds on this machine."""
    if not is_built_for_gpus():
        return 0
    import torch

    return int(torch.cuda.device_count())


def main() -> None:
    """The command."""
    if not sys.argv[1:]:
        print(gpus_here())
        return
    node = os.environ["SLURMD_NODENAME"]
    if not Path(sys.argv[1]).is_dir():
        sys.exit(f"{node}: {sys.argv[1]}: no such directory there")
    print(node, gpus_here())


if __name__ == "__main__":
    main()

"""What the process from which ranks are forked does once, so that no rank has to.

Imports; and, without a GPU, what DeepSpeed asks a compiler before its first engine (with one, that would begin CUDA).
"""

import contextlib

import conftest  # noqa: F401
import forked_ranks  # noqa: F401
import torch

import pretrain.train  # noqa: F401
from pretrain.engine import deepspeed

with contextlib.suppress(ImportError):  # DeepSpeed's first engine imports it, and torch's compiler with it
    import deepspeed.runtime.zero.muon.muon_optimizer
if not torch.accelerator.is_available():
    assert isinstance(deepspeed.ops.__compatible_ops__, dict)

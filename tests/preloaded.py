"""What the process from which ranks are forked imports once, so that no rank has to."""

import contextlib

import conftest  # noqa: F401
import forked_ranks  # noqa: F401

import pretrain.train  # noqa: F401

with contextlib.suppress(ImportError):  # DeepSpeed's first engine imports it, and torch's compiler with it
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

#!/usr/bin/env bash
# DeepSpeed loads torch's compiler (Inductor) with every ZeRO optimizer, though nothing is compiled: to learn whether it
# knows the optimizer, it imports its Muon, whose functions are handed to torch.compile as the module is imported
# (deepspeed/runtime/zero/utils.py, is_zero_supported_optimizer). Seen with DeepSpeed 0.19.8 and torch 2.13.0:
#
#   DeepSpeed 0.19.8, torch 2.13.0: Inductor is imported before initialize(): False, after it: True
#
# In a rank that has imported transformers it took 1.1 s of CPU time, on a loaded machine, a fifth of the whole start.
# Here: pretrain/engine/deepspeed_library.py, import_muon_uncompiled
# (tests/pretrain/engine/test_engine.py::test_a_rank_that_compiles_nothing_does_not_import_torch_s_compiler).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 deepspeed==0.19.8 numpy
export DS_ACCELERATOR=cpu RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29613
cd "$work"
"$work/venv/bin/python" - <<'END'
import sys

import deepspeed
import torch

deepspeed.ops.__compatible_ops__ = {}  # or an extension is compiled, for a minute
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
model = torch.nn.Linear(8, 8)
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
before = "torch._inductor.compiler_bisector" in sys.modules
deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
after = "torch._inductor.compiler_bisector" in sys.modules
versions = f"DeepSpeed {deepspeed.__version__}, torch {torch.__version__.partition('+')[0]}"
print(f"{versions}: Inductor is imported before initialize(): {before}, after it: {after}")
sys.exit(0 if (before, after) == (False, True) else 1)
END

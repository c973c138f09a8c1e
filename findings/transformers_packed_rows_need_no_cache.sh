#!/usr/bin/env bash
# transformers 4.57.6 to 5.24.0: several texts in one row, told apart by `position_ids` that start anew and no attention
# mask, are kept apart only without a KV cache. Since `use_cache` is true by default, a model in evaluation mode makes an
# empty cache first, takes it for a continued text, and lets each text see the ones before it in its row: no error, other
# logits. (Training with `use_cache=False`, as most trainers have it, is right.)
#
# Seen, a text of 7 tokens behind one of 5, largest difference to the logits of that text alone:
#   transformers 5.24.0, use_cache default: 8.36; use_cache=False: 0.00
#
# Here: modeling_tablefree.py keeps them apart either way
# (tests/pretrain/test_model_in_tools.py::test_positions_that_start_anew_keep_documents_apart).
set -euo pipefail

home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
cd "$home"
python3 -m venv venv
venv/bin/python -m pip install --quiet "torch==2.13.0" "numpy==2.4.6" "transformers==5.24.0"
venv/bin/python - <<'PYTHON'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64}
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=32, initializer_range=0.3, **sizes)).eval()
ids = torch.arange(1, 13)[None]
positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
with torch.no_grad():
    alone = model(ids[:, 5:]).logits
    off = [(model(ids, position_ids=positions, **more).logits[:, 5:] - alone).abs().max().item()
           for more in ({}, {"use_cache": False})]
print(f"transformers {transformers.__version__}, use_cache default: {off[0]:.2f}; use_cache=False: {off[1]:.2f}")
if not (off[0] > 0.01 and off[1] < 1e-4):
    sys.exit("that has changed")
PYTHON

#!/usr/bin/env bash
# transformers 5.0.0: a GPT-NeoX whose rotary positions cover the whole head, saved and loaded again, gives other logits.
#
# save_pretrained writes rope_parameters.partial_rotary_factor as it is, and no rotary_pct; from_pretrained then takes
# 0.25, the default of rotary_pct, over what rope_parameters says. No warning, no error. 5.12.1 believes rope_parameters.
#
# Seen:
#   transformers 5.0.0:  saved 1.0, loaded 0.25, logits differ; with "rotary_pct": 1.0 written into config.json: equal
#   transformers 5.12.1: saved 1.0, loaded 1.0, logits equal; with "rotary_pct": 1.0 written into config.json: equal
#
# Here: the config.json of a stock export says it in both ways (pretrain/hf/architectures.py), so it loads rightly in 5.0.0;
# what 5.0.0 saves of it does not (tests/pretrain/hf/test_matrix.py, and the note to its table in pretrain/README.md).
set -euo pipefail

home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
cd "$home"
python3 -m venv venv

check() { # VERSION EXPECTED
  venv/bin/python -m pip install --quiet "torch==2.13.0" "transformers==$1"
  venv/bin/python - > seen.txt 2> errors.txt <<'PYTHON' || { cat errors.txt && exit 1; }
import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, GPTNeoXConfig

torch.manual_seed(0)
config = GPTNeoXConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=32, rotary_pct=1.0, initializer_range=0.5,
)
model = AutoModelForCausalLM.from_config(config).eval()
ids = torch.arange(16)[None]


def factor(config):
    return config.rope_parameters["partial_rotary_factor"]


def equal():
    again = AutoModelForCausalLM.from_pretrained("saved").eval()
    with torch.no_grad():
        return "equal" if torch.allclose(again(ids).logits, model(ids).logits, atol=1e-4) else "differ"


model.save_pretrained("saved")
path = Path("saved/config.json")
saved = json.loads(path.read_text())
loaded = transformers.AutoConfig.from_pretrained("saved")
line = f"saved {saved['rope_parameters']['partial_rotary_factor']}, loaded {factor(loaded)}, logits {equal()}"
path.write_text(json.dumps(saved | {"rotary_pct": 1.0}))
print(f'{line}; with "rotary_pct": 1.0 written into config.json: {equal()}')
PYTHON
  echo "transformers $1: $(cat seen.txt)"
  [ "$(cat seen.txt)" = "$2" ] || { echo "that has changed" && exit 1; }
}

mended='with "rotary_pct": 1.0 written into config.json: equal'
check 5.0.0 "saved 1.0, loaded 0.25, logits differ; $mended"
check 5.12.1 "saved 1.0, loaded 1.0, logits equal; $mended"

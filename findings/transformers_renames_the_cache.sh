#!/usr/bin/env bash
# transformers 5.24.0: `generate` hands the KV cache to `forward` as `cache`, where until 5.23 it was `past_key_values`. A
# class of one's own whose `forward` takes `past_key_values` and `**kwargs`, as most remote code on the hub does, swallows
# it: each new token is computed as if it stood alone. No error; the text is another than without a cache.
#
# Seen, eight tokens, greedy, with the cache and without:
#   transformers 5.23.0: equal
#   transformers 5.24.0: differ
#
# Here: modeling_tablefree.py takes both names and refuses what it does not know
# (tests/pretrain/test_model_in_tools.py::test_a_cache_is_used_under_either_of_its_names,
# ::test_what_would_be_ignored_is_refused).
set -euo pipefail

home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
cd "$home"
python3 -m venv venv
venv/bin/python -m pip install --quiet "torch==2.13.0" "numpy==2.4.6"

check() { # VERSION EXPECTED
  venv/bin/python -m pip install --quiet "transformers==$1"
  seen=$(venv/bin/python - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class Mine(LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs):
        return super().forward(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            use_cache=use_cache,
        )


sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64}
torch.manual_seed(0)
model = Mine(LlamaConfig(vocab_size=100, hidden_size=32, initializer_range=0.3, eos_token_id=None, **sizes)).eval()
ids = torch.arange(1, 13)[None]
asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
texts = [model.generate(ids, use_cache=use_cache, **asked) for use_cache in (True, False)]
print("equal" if torch.equal(*texts) else "differ")
PYTHON
  )
  echo "transformers $1: $seen"
  [ "$seen" = "$2" ] || { echo "that has changed" && exit 1; }
}

check 5.23.0 equal
check 5.24.0 differ

#!/usr/bin/env bash
# transformers 4.57.6 and 5.0.0: Trainer divides the loss of a causal model by more labels than there are targets.
#
# A causal model predicts every id of a row but the first, so rows of 60 and 8 ids have 66 targets. Trainer counts all
# 68 labels and hands that to the model as num_items_in_batch: loss and gradient are 66/68 of the mean, and the shorter
# the rows, the smaller. Whoever compares losses between releases, or with another trainer, sees that as progress.
# 5.12.1 counts the targets.
#
# Seen (a GPT-NeoX of random weights; the mean over the 66 targets by hand beside what Trainer logs):
#   transformers 4.57.6: logged 0.971 of the mean (66/68 is 0.971)
#   transformers 5.0.0:  logged 0.971 of the mean
#   transformers 5.12.1: logged 1.000 of the mean
#
# Here: an export takes the number as it is given, as stock classes do, so it trains alike beside them in each release;
# tests/pretrain/hf/matrix/rows.py expects of each release what it counts.
set -euo pipefail

home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
cd "$home"
python3 -m venv venv

check() { # VERSION EXPECTED
  venv/bin/python -m pip install --quiet "torch==2.13.0" "transformers==$1" "accelerate==1.15.0"
  venv/bin/python - > seen.txt 2> errors.txt <<'PYTHON' || { cat errors.txt && exit 1; }
import contextlib
import io

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPTNeoXConfig, Trainer, TrainingArguments

torch.manual_seed(0)
config = GPTNeoXConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=64,
)
model = AutoModelForCausalLM.from_config(config)
rows = [torch.randint(0, 64, (length,)).tolist() for length in (60, 8)]
with torch.no_grad():
    logits = [model(torch.tensor([row])).logits[0, :-1] for row in rows]
targets = torch.tensor([token for row in rows for token in row[1:]])
mean = F.cross_entropy(torch.cat(logits), targets).item()


def collate(chosen):
    ids = torch.tensor([row["input_ids"] for row in chosen])
    return {"input_ids": ids, "labels": ids.clone()}


arguments = TrainingArguments(
    output_dir="out", per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=1, learning_rate=0.0,
    logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
)
dataset = [{"input_ids": row} for row in rows]
trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate)
with contextlib.redirect_stdout(io.StringIO()):
    trainer.train()
print(f"{float(trainer.state.log_history[0]['loss']) / mean:.3f}")
PYTHON
  echo "transformers $1: logged $(cat seen.txt) of the mean (66/68 is 0.971)"
  [ "$(cat seen.txt)" = "$2" ] || { echo "that has changed" && exit 1; }
}

check 4.57.6 0.971
check 5.0.0 0.971
check 5.12.1 1.000

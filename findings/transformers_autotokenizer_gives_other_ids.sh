#!/usr/bin/env bash
# transformers 4.57.6 and 5.24.0: AutoTokenizer gives other ids than the tokenizer.json that it loads, without a word.
#
#   5.24.0    a class that tokenizer_config.json names (here GPT2Tokenizer) builds its own pre-tokenizer; that of
#             tokenizer.json, which splits digits, is dropped. Known as #45812 and #45920; any normaliser fares the same.
#   4.57.6    even the plain class, PreTrainedTokenizerFast, sets add_prefix_space of a ByteLevel pre-tokenizer to what
#             tokenizer_config.json says, and to false if it says nothing.
#
# Here: pretrain/hf/tokenizer.py names the plain class and repeats add_prefix_space; an export is refused if
# AutoTokenizer gives other ids (pretrain/hf/ids.py);
# tests/pretrain/hf/test_export_tokenizer.py holds 53 kinds of tokenizers.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/compare.py" <<'PYTHON'
import json
import pathlib
import sys

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXT = "Fellow citizens of 1861"


def save(directory, pre_tokenizer, **config):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([f"{TEXT} " * 9], trainer)
    tokenizer.pre_tokenizer = pre_tokenizer
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    return tokenizer


home = pathlib.Path(sys.argv[1])
byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
space = pre_tokenizers.ByteLevel(add_prefix_space=True)
print("transformers", transformers.__version__)
differ = {}
for name, pre_tokenizer, class_name in (
    ("digits, GPT2Tokenizer", digits, "GPT2Tokenizer"),
    ("space before, PreTrainedTokenizerFast", space, "PreTrainedTokenizerFast"),
):
    expected = save(home / name, pre_tokenizer, tokenizer_class=class_name).encode(TEXT).ids
    got = transformers.AutoTokenizer.from_pretrained(home / name).encode(TEXT)
    differ[name] = got != expected
    print(f"  {name}: tokenizer.json {expected}, AutoTokenizer {got}")
seen = [False, True] if transformers.__version__.startswith("4.") else [True, False]
sys.exit(0 if list(differ.values()) == seen else 1)
PYTHON
for version in 4.57.6 5.24.0; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet transformers=="$version"
  mkdir "$work/$version/home"
  "$work/$version/bin/python" "$work/compare.py" "$work/$version/home"
done

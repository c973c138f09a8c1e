#!/usr/bin/env bash
# tokenizers 0.23.3 and gigabpe 0.1.0: training a byte-level BPE on files reads them line by line, and cuts each word
# pattern there. No token holds a line end and what follows, so an indented line of code never begins with one token.
# The same text given to train_from_iterator as whole documents learns such tokens and encodes code in fewer.
# Encoding never cuts at line ends, so nothing shows it later.
#
# Here: data_prep/tokenizer/byte_bpe.py writes documents so that gigabpe learns them whole;
# tests/data_prep/test_train_tokenizer.py compares its merges with those of train_from_iterator.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tokenizers==0.23.3 gigabpe==0.1.0
cat > "$work/compare.py" <<'PYTHON'
import json
import pathlib
import sys
import sysconfig
from importlib.metadata import version

import gigabpe
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

VOCAB_SIZE = 4_000
library = pathlib.Path(sysconfig.get_paths()["stdlib"])
documents = [path.read_text(encoding="utf-8") for path in sorted(library.glob("[a-p]*.py"))[:100]]
held_out = "".join(path.read_text(encoding="utf-8") for path in sorted(library.glob("[q-t]*.py"))[:30])
file = pathlib.Path(sys.argv[1], "documents")
file.write_text("".join(documents), encoding="utf-8")


def trained(train):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(tokenizer, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def with_line_end(merges):
    return sum("Ċ" in left + right for left, right in merges)


def merges_of(tokenizer):
    return json.loads(tokenizer.to_str())["model"]["merges"]


by_file = trained(lambda tokenizer, trainer: tokenizer.train([str(file)], trainer))
whole = trained(lambda tokenizer, trainer: tokenizer.train_from_iterator(documents, trainer))
_, giga = gigabpe.train_bpe([str(file)], VOCAB_SIZE, pretokenizer="bytelevel")
tokens = {name: len(t.encode(held_out).ids) for name, t in (("file", by_file), ("whole", whole))}
print("tokenizers", version("tokenizers"), "gigabpe", version("gigabpe"))
print("merges that hold a line end:")
print("  tokenizers, train([file])          ", with_line_end(merges_of(by_file)))
print("  gigabpe, train_bpe([file])         ", with_line_end(giga))
print("  tokenizers, train_from_iterator    ", with_line_end(merges_of(whole)))
print("tokens of unseen Python files:")
print("  after train([file])                ", tokens["file"])
print("  after train_from_iterator          ", tokens["whole"], f"({tokens['file'] / tokens['whole'] - 1:+.1%} by file)")
is_as_seen = with_line_end(merges_of(by_file)) == with_line_end(giga) == 0 < with_line_end(merges_of(whole))
sys.exit(0 if is_as_seen and tokens["file"] > 1.02 * tokens["whole"] else 1)
PYTHON
"$work/venv/bin/python" "$work/compare.py" "$work"

#!/usr/bin/env bash
# tokenizers 0.23.3: NFC (and NFD, NFKC, NFKD) goes by Unicode 9 (2016), regular expressions by Unicode 16.
#
# Marks that came with Unicode 10 or later count as ordinary characters: they are not put into canonical order, so two
# spellings of one text, equal by the standard, get different ids. Python's unicodedata (14) orders them.
#
# Here: data_prep/tokenizer/doubtful_characters.py has texts with such characters encoded by the reference, whoever
# encodes the rest.
set -euo pipefail

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet tokenizers==0.23.3

"$scratch/venv/bin/python" - <<'PYTHON'
import sys
import unicodedata

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

print(f"tokenizers {tokenizers.__version__}, Python's Unicode {unicodedata.unidata_version}")
nfc = normalizers.NFC()
marks = {"\u08d4": "9.0", "\u1df6": "10.0", "\u09fe": "11.0", "\U00010eab": "13.0", "\u0898": "14.0"}
ordered = {}
for mark, version in marks.items():
    text = "a" + mark + "\u0316"  # a mark above, then one below: the standard puts the lower class first
    right = unicodedata.normalize("NFC", text)
    ordered[version] = nfc.normalize_str(text) == right
    got = " ".join(f"U+{ord(c):04X}" for c in nfc.normalize_str(text))
    print(f"Unicode {version:>4}: U+{ord(mark):04X}  NFC -> {got}  {'as the standard says' if ordered[version] else 'NOT ordered'}")
letter = pre_tokenizers.Split(Regex(r"\p{L}"), "removed")
known = {version: not letter.pre_tokenize_str(c) for c, version in (("\u1c89", "16.0"), ("\ua7ce", "17.0"))}
print("regular expressions take as letters those of Unicode", *(version for version, is_known in known.items() if is_known))
expected = {"9.0": True, "10.0": False, "11.0": False, "13.0": False, "14.0": False}
sys.exit(0 if ordered == expected and known == {"16.0": True, "17.0": False} else 1)
PYTHON

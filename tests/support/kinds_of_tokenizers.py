"""Tokenizers as others publish them, of every kind that reads a text its own way.

    python tests/support/kinds_of_tokenizers.py DIRECTORY

checks exports in the folders of a directory with any release of transformers, and needs neither
this project nor pytest: whether `AutoTokenizer` gives the ids that `expected.json` beside each
says.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

IDS_NAME = "expected.json"
SPECIAL = ["<unk>", "<s>", "</s>"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
# so that there are tokens of several digits
NUMBERS = " ".join(str(1000 + 7 * i % 1500) for i in range(4000))
GPT_4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What makes a tokenizer of its kind: a change of a plain one, and of its configuration."""

    change: Callable[[Tokenizer], Any] = lambda tokenizer: None
    config: dict[str, Any] = field(default_factory=dict)  # beside NAMES and a plain class
    files: dict[str, Any] = field(default_factory=dict)  # further ones
    base: str = "bytes"  # what is trained before the change


def set_parts(**parts: Any) -> Callable[[Tokenizer], None]:
    """A change that sets normaliser, pre-tokenizer and the like."""

    def change(tokenizer: Tokenizer) -> None:
        for name, part in parts.items():
            setattr(tokenizer, name, part)

    return change


def add_limits(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=64, pad_id=2, pad_token="</s>")


def add_dropout(tokenizer: Tokenizer) -> None:
    tokenizer.model.dropout = 0.5


def of_class(name: str, **config: Any) -> Kind:
    return Kind(config={"tokenizer_class": name, **config})


TEMPLATE = processors.TemplateProcessing(
    single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
)
BEGIN = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
BYTES_ALONE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PLAIN_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
FLAGS = {
    "lstrip": False,
    "rstrip": False,
    "single_word": False,
    "normalized": False,
    "special": False,
}

KINDS: dict[str, Kind] = {
    "plain": Kind(),
    # what is added, cut or drawn
    "template": Kind(change=set_parts(post_processor=TEMPLATE)),
    "template in a sequence": Kind(
        change=set_parts(
            post_processor=processors.Sequence([processors.ByteLevel(trim_offsets=False), BEGIN])
        )
    ),
    "roberta": Kind(
        change=set_parts(post_processor=processors.RobertaProcessing(("</s>", 2), ("<s>", 1)))
    ),
    "byte-level post-processor": Kind(
        change=set_parts(post_processor=processors.ByteLevel(trim_offsets=False))
    ),
    "truncation and padding": Kind(change=add_limits),
    "dropout": Kind(change=add_dropout),
    "flags of a class": of_class("LlamaTokenizerFast", add_eos_token=True),
    "flags of a plain class": Kind(config={"add_bos_token": True, "add_eos_token": True}),
    # pre-tokenizers
    "digits": Kind(
        change=set_parts(
            pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), PLAIN_BYTES])
        )
    ),
    "digits of gpt2": Kind(
        change=set_parts(
            pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), PLAIN_BYTES])
        ),
        config={"tokenizer_class": "GPT2Tokenizer"},
    ),
    "expression of gpt4": Kind(
        change=set_parts(
            pre_tokenizer=pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(GPT_4), "isolated"), BYTES_ALONE]
            )
        )
    ),
    "space before": Kind(
        change=set_parts(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
    ),
    "space before, not told": Kind(
        change=set_parts(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        config={"add_prefix_space": False},
    ),
    "space told, not before": Kind(config={"add_prefix_space": True}),
    "no expression": Kind(change=set_parts(pre_tokenizer=BYTES_ALONE)),
    "punctuation": Kind(
        change=set_parts(
            pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), BYTES_ALONE])
        )
    ),
    "scripts": Kind(
        change=set_parts(
            pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.UnicodeScripts(), BYTES_ALONE])
        )
    ),
    # normalisers
    "nfc": Kind(change=set_parts(normalizer=normalizers.NFC())),
    "nfkc": Kind(change=set_parts(normalizer=normalizers.NFKC())),
    "lower case": Kind(change=set_parts(normalizer=normalizers.Lowercase())),
    "lower case, of a class": Kind(
        change=set_parts(normalizer=normalizers.Lowercase()),
        config={"tokenizer_class": "GPT2TokenizerFast"},
    ),
    "replaced words": Kind(change=set_parts(normalizer=normalizers.Replace("citizens", "people"))),
    "stripped": Kind(
        change=set_parts(normalizer=normalizers.Sequence([normalizers.Strip(), normalizers.NFD()]))
    ),
    # models
    "metaspace": Kind(base="metaspace"),
    "llama": Kind(base="llama", config={"tokenizer_class": "LlamaTokenizer", "legacy": False}),
    "llama, legacy": Kind(
        base="llama", config={"tokenizer_class": "LlamaTokenizerFast", "legacy": True}
    ),
    "unigram": Kind(base="unigram"),
    "t5": Kind(base="unigram", config={"tokenizer_class": "T5TokenizerFast", "extra_ids": 100}),
    "wordpiece": Kind(base="wordpiece"),
    "bert": Kind(
        base="wordpiece", config={"tokenizer_class": "BertTokenizerFast", "do_lower_case": True}
    ),
    "words": Kind(base="words"),
    # classes that build their own
    "gpt neox": of_class("GPTNeoXTokenizerFast"),
    "gpt2": of_class("GPT2Tokenizer"),
    "codegen": of_class("CodeGenTokenizerFast"),
    "qwen": of_class("Qwen2Tokenizer"),
    "bloom": of_class("BloomTokenizerFast"),
    "whisper": of_class("WhisperTokenizer"),
    "unheard of": of_class("NoSuchTokenizer"),
    "code of its own": Kind(config={"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}),
    "from slow": Kind(config={"from_slow": True}),
    # tokens
    "added word": Kind(
        change=lambda tokenizer: tokenizer.add_tokens([AddedToken("Fellow", normalized=False)])
    ),
    "added word with flags": Kind(
        change=lambda tokenizer: tokenizer.add_tokens(
            [AddedToken("citizens", single_word=True, lstrip=True), AddedToken(" of", rstrip=True)]
        )
    ),
    "special with flags": Kind(
        change=lambda tokenizer: tokenizer.add_special_tokens(
            [AddedToken("<mask>", lstrip=True, rstrip=True)]
        ),
        config={"mask_token": {"content": "<mask>", "lstrip": True, "__type": "AddedToken"}},
    ),
    "end of text is a word": Kind(config={"eos_token": "\u0120the"}),
    "unknown is a word": Kind(config={"unk_token": "\u0120the"}),
    "padding that is no token": Kind(config={"pad_token": "<pad>"}),
    "padding told elsewhere": Kind(
        change=lambda tokenizer: tokenizer.add_special_tokens(["<pad>"]),
        files={"special_tokens_map.json": {"pad_token": {"content": "<pad>", "lstrip": False}}},
    ),
    "word that is no token": Kind(
        config={"added_tokens_decoder": {"600": {"content": "Fellow", **FLAGS}}}
    ),
    "more special": Kind(config={"additional_special_tokens": ["<s>", "<unk>"]}),
    "more special, not added": Kind(config={"additional_special_tokens": ["\u0120the", "<none>"]}),
    "more special, of 5": Kind(config={"extra_special_tokens": ["<s>", "\u0120the"]}),
    "named special": Kind(config={"extra_special_tokens": {"image_token": "<s>"}}),
}


@cache
def trained(base: str, texts: tuple[str, ...]) -> str:
    """A tokenizer of 600 ids or so, as its file."""
    models_and_trainers: dict[str, tuple[Any, Any]] = {
        "bytes": (models.BPE(), trainers.BpeTrainer),
        "metaspace": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer),
        "llama": (
            models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True),
            trainers.BpeTrainer,
        ),
        "unigram": (models.Unigram(), trainers.UnigramTrainer),
        "wordpiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer),
        "words": (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer),
    }
    model, trainer = models_and_trainers[base]
    tokenizer, special = Tokenizer(model), list(SPECIAL)
    options: dict[str, Any] = {"vocab_size": 600, "show_progress": False}
    if base == "bytes":
        tokenizer.pre_tokenizer, tokenizer.decoder = PLAIN_BYTES, decoders.ByteLevel()
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    elif base in ("metaspace", "unigram"):
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.Metaspace(),
            decoders.Metaspace(),
        )
    elif base == "llama":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback()]
        )
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        options["vocab_size"] = 900
        options["max_token_length"] = 8  # without pre-tokenizer whole sentences would be tokens
    elif base == "wordpiece":
        tokenizer.normalizer, tokenizer.pre_tokenizer = (
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
        )
        tokenizer.decoder = decoders.WordPiece()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if base == "unigram":
        options["unk_token"] = "<unk>"
    tokenizer.train_from_iterator([*texts, NUMBERS], trainer(special_tokens=special, **options))
    content: str = tokenizer.to_str()
    return content


def write_tokenizer(directory: Path, kind: Kind, texts: Sequence[str]) -> Path:
    """A tokenizer's directory, as others publish them."""
    tokenizer = Tokenizer.from_str(trained(kind.base, tuple(texts)))
    kind.change(tokenizer)
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES, **kind.config}
    for name, content in {"tokenizer_config.json": config, **kind.files}.items():
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def differences(export: Path) -> list[str]:
    """Where AutoTokenizer, of the release that is installed, gives other ids than stated."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=False)
    expected = json.loads((export / IDS_NAME).read_bytes())
    found = []
    for text, ids in expected["ids"]:
        got = tokenizer.encode(text, split_special_tokens=True)
        if got != ids:
            found.append(f"{text[:40]!r}: {got[:8]}, expected {ids[:8]}")
    for role, id_ in expected["roles"].items():
        if getattr(tokenizer, f"{role}_id") != id_:
            found.append(f"{role}: {getattr(tokenizer, f'{role}_id')}, expected {id_}")
    if len(tokenizer) != expected["size"]:
        found.append(f"{len(tokenizer)} tokens, expected {expected['size']}")
    end = tokenizer.eos_token
    if end is not None and tokenizer(f"a {end}")["input_ids"][-1] != expected["roles"]["eos_token"]:
        found.append(f"the text of {end} is {tokenizer(f'a {end}')['input_ids']}")
    if set(tokenizer("a text")) != {"input_ids", "attention_mask"}:
        found.append(f"gives {sorted(tokenizer('a text'))}")
    return found


if __name__ == "__main__":
    bad = 0
    for directory in sorted(Path(sys.argv[1]).iterdir()):
        try:
            lines = differences(directory)
        except Exception as error:
            lines = [f"{type(error).__name__}: {str(error)[:150]}"]
        bad += bool(lines)
        for line in lines:
            print(f"{directory.name}: {line}")
    print(f"{bad} differ")

"""Train a tokenizer on text: first stage of the line, before `build_shards`.

`byte_bpe` is byte-level BPE with exactly the number of ids asked for: id 0 ends documents, 256 bytes, then
merges. `char_ngram` is that of the paper, rebuilt: characters, bigrams and trigrams. Any text survives
encoding and decoding with either, and no text, not even a special token spelled out, encodes to a special
id. The same text gives the same files, byte for byte.
"""

import argparse
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gigabpe
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from data_prep import char_ngram
from data_prep.corpus import read_documents
from data_prep.errors import CommandParser, UserError, exit_code, large_number
from data_prep.inputs import find_inputs
from data_prep.shards import MAX_VOCAB_SIZE, replace_directory, tokenizer_sha256
from data_prep.work_units import FORMATS, WorkUnit, cut_units, format_of

EOS_TOKEN = "<|endoftext|>"
MAX_CHARACTERS = 1_000_000_000
MIN_VOCAB_SIZE = 1 + 256  # end of document, bytes
SPECIAL_TOKENS = {
    "byte_bpe": {"bos_token": EOS_TOKEN, "eos_token": EOS_TOKEN, "pad_token": EOS_TOKEN},
    "char_ngram": char_ngram.SPECIAL_TOKENS,
}
CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1024,
}

Merges = list[tuple[str, str]]


def main(argv: list[str] | None = None) -> None:
    """The command."""
    arguments = parse_arguments(argv)
    started = time.perf_counter()
    check_vocab_size(arguments.algorithm, arguments.vocab_size)
    texts = TrainingTexts(units=source_units(arguments), max_characters=arguments.max_characters)
    special_tokens = SPECIAL_TOKENS[arguments.algorithm]
    if arguments.algorithm == "char_ngram":
        vocab, merges = char_ngram.learn_vocab(texts)
    else:
        vocab, merges = learn_byte_bpe(texts, arguments.vocab_size)
    is_new = save(new_tokenizer(vocab, merges, special_tokens.values()), arguments.output_dir, special_tokens)
    seconds = time.perf_counter() - started
    state = f"trained on {texts.characters:,} characters in {seconds:.1f} s" if is_new else "already there, identical"
    print(f"tokenizer    {arguments.vocab_size:,} ids, {state}")
    print(f"sha256       {tokenizer_sha256(arguments.output_dir)}")
    print(f"directory    {arguments.output_dir}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="python -m data_prep.train_tokenizer", description="Train a tokenizer on text.")
    parser.add_argument("--algorithm", choices=SPECIAL_TOKENS, default="byte_bpe", help="which kind (%(default)s)")
    size_help = f"{MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}, met exactly; {char_ngram.VOCAB_SIZE} for char_ngram"
    parser.add_argument("--vocab-size", type=int, required=True, help=size_help)
    parser.add_argument("--source", nargs="+", required=True, metavar="FILE_OR_GLOB", help="text to learn from")
    parser.add_argument("--format", choices=FORMATS, help="format of the sources (by default from the file's name)")
    parser.add_argument("--text-field", default="text", help="column or JSON field of the text (%(default)s)")
    most_help = "learn from N characters at most, taken evenly over the sources (%(default)s)"
    parser.add_argument("--max-characters", type=large_number, default=MAX_CHARACTERS, metavar="N", help=most_help)
    parser.add_argument("--output-dir", type=Path, required=True, help="directory of the new tokenizer")
    return parser.parse_args(argv)


def check_vocab_size(algorithm: str, vocab_size: int) -> None:
    """Raises UserError for a size that can't be met."""
    if algorithm == "char_ngram" and vocab_size != char_ngram.VOCAB_SIZE:
        raise UserError(f"--vocab-size {vocab_size}: expected {char_ngram.VOCAB_SIZE}, the one size of char_ngram")
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f"--vocab-size {vocab_size}: expected {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE:,}")


def source_units(arguments: argparse.Namespace) -> list[WorkUnit]:
    """The files of --source, cut into work units."""
    units: list[WorkUnit] = []
    for pattern in arguments.source:
        for file in find_inputs(Path(), pattern, "--source"):
            format_ = arguments.format or format_of(file.name, "--source")
            field = None if format_ == "txt" else arguments.text_field
            units += cut_units([file], source="text", format=format_, text_field=field)
    return units


@dataclass(kw_only=True)
class TrainingTexts:
    """The documents to learn from: all, or the beginning of every work unit where all would be too much."""

    units: list[WorkUnit]
    max_characters: int
    characters: int = 0  # read so far

    def __iter__(self) -> Iterator[str]:
        """Read them. Raises UserError if there is no text."""
        is_cut = False
        with tqdm(desc="reading", unit=" characters", unit_scale=True, leave=False, disable=None) as bar:
            for number, unit in enumerate(self.units):
                share = (self.max_characters - self.characters) // (len(self.units) - number)
                for text in itertools.chain.from_iterable(d.texts.to_pylist() for d in read_documents(unit)):
                    taken = min(len(text), share)
                    yield text[:taken]
                    bar.update(taken)
                    self.characters += taken
                    share -= taken
                    if not share:
                        is_cut = True
                        break
        if not self.characters:
            raise UserError("--source: no text in the sources; name files that hold some")
        if is_cut:
            note = f"learning from {self.characters:,} characters, evenly over the sources; --max-characters takes more"
            print(f"note: {note}", file=sys.stderr)


def learn_byte_bpe(texts: Iterable[str], vocab_size: int) -> tuple[dict[str, int], Merges]:
    """Exactly vocab_size ids of a byte-level BPE, and their merges. Raises UserError if the texts can't fill them.

    A text has only so many merges: at some point each of its words is one token. The merges that are
    then missing are learned from the same words in other spellings (`spellings`).
    """
    with tempfile.TemporaryDirectory(prefix="train_tokenizer.") as scratch:
        path, extra = Path(scratch, "text"), Path(scratch, "spellings")
        with path.open("w", encoding="utf-8", newline="") as file:
            file.writelines(text if text.endswith("\n") else text + "\n" for text in texts)
        vocab, merges = build_vocab(learn_merges([path], vocab_size), vocab_size)
        if (own := len(vocab)) == vocab_size:
            return vocab, merges
        extra.write_text("".join(spellings(path.read_text(encoding="utf-8"))), encoding="utf-8")
        vocab, merges = build_vocab(learn_merges([path, extra], vocab_size), vocab_size)
    if len(vocab) < vocab_size:
        problem = f"this text supports {len(vocab):,} ids"
        raise UserError(f"--vocab-size {vocab_size:,}: {problem}; ask for fewer, or add text")
    print(f"note: the text's words fill {own:,} ids; other spellings of them fill the rest", file=sys.stderr)
    return vocab, merges


def learn_merges(files: list[Path], vocab_size: int) -> Merges:
    """BPE merges in order, at least as many as needed where the text has them. Text is cut at line ends."""
    _, merges = gigabpe.train_bpe([*map(str, files)], vocab_size, special_tokens=[EOS_TOKEN], pretokenizer="bytelevel")
    return [(left, right) for left, right in merges]


def spellings(text: str) -> Iterator[str]:
    """Every word of the text in lower case, with a capital and in capitals; each also after a space."""
    for word in sorted({word.lower() for word in set(re.findall(r"[^\W\d_]+", text))}):
        for spelling in (word, word.capitalize(), word.upper()):
            yield f"{spelling} {spelling}\n"


def build_vocab(merges: Merges, vocab_size: int) -> tuple[dict[str, int], Merges]:
    """Ids: end of document, the 256 bytes, then what the merges make, until vocab_size; and the merges used."""
    vocab = {token: i for i, token in enumerate([EOS_TOKEN, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    used: Merges = []
    for left, right in merges:
        if len(vocab) == vocab_size:
            break
        vocab.setdefault(left + right, len(vocab))
        used.append((left, right))
    return vocab, used


def new_tokenizer(vocab: dict[str, int], merges: Merges, special_tokens: Iterable[str]) -> Tokenizer:
    """A lossless byte-level tokenizer that adds nothing of its own to a text."""
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, normalized=False, special=True) for token in dict.fromkeys(special_tokens)]
    tokenizer.add_special_tokens(added)
    return tokenizer


def save(tokenizer: Tokenizer, output_dir: Path, special_tokens: dict[str, str]) -> bool:
    """Write the tokenizer's directory in one step; False if it is there already, identical."""
    config = json.dumps(CONFIG | special_tokens, indent=2, sort_keys=True)
    texts = {"tokenizer.json": tokenizer.to_str(pretty=True), "tokenizer_config.json": config}
    files = {name: f"{text}\n".encode() for name, text in texts.items()}
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        if all((output_dir / name).is_file() and (output_dir / name).read_bytes() == files[name] for name in files):
            return False
        raise UserError(f"{output_dir}: holds something else; choose another --output-dir, or remove that one")

    def write(directory: Path) -> None:
        for name, content in files.items():
            (directory / name).write_bytes(content)

    replace_directory(output_dir, write)
    return True


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Train a tokenizer on text: first stage of the line, before `build_shards`.

`byte_bpe` is byte-level BPE with exactly the number of ids asked for: id 0 ends documents, 256
bytes, then merges, and padding at last. `char_ngram` is that of the paper, rebuilt: characters,
bigrams and trigrams. Any text survives encoding and decoding with either, and no text, not even a
special token spelled out, encodes to a special id. The same text gives the same files, byte for
byte; `training.json` beside them says what they were learned from.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from data_prep.building.mixture import load_mixture, mixture_path
from data_prep.commands import CommandParser, exit_code, large_number
from data_prep.errors import UserError
from data_prep.files import replace_directory
from data_prep.formats.known import FORMATS
from data_prep.inputs.urls import without_credentials
from data_prep.manifest import MAX_VOCAB_SIZE
from data_prep.shards import tokenizer_sha256
from data_prep.tokenizer import byte_bpe, char_ngram
from data_prep.tokenizer.training_texts import TrainingTexts, texts_of_files, texts_of_mixture

MAX_CHARACTERS = 1_000_000_000
TRAINING_NAME = "training.json"
SPECIAL_TOKENS = {"byte_bpe": byte_bpe.SPECIAL_TOKENS, "char_ngram": char_ngram.SPECIAL_TOKENS}
# Special to us, no role in transformers.
WITHOUT_NAME = {"byte_bpe": (), "char_ngram": (char_ngram.LAST_TOKEN,)}
CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1024,
}


def main(argv: list[str] | None = None) -> None:
    """The command."""
    arguments = parse_arguments(argv)
    started = time.perf_counter()
    check_vocab_size(arguments.algorithm, arguments.vocab_size)
    texts = find_texts(arguments)
    names = SPECIAL_TOKENS[arguments.algorithm]
    if arguments.algorithm == "char_ngram":
        vocab, merges = char_ngram.learn_vocab(texts)
    else:
        vocab, merges = byte_bpe.learn_vocab(texts, arguments.vocab_size)
    tokenizer = new_tokenizer(vocab, merges, [*names.values(), *WITHOUT_NAME[arguments.algorithm]])
    is_new = save(tokenizer, arguments.output_dir, names, about_training(arguments, texts, argv))
    seconds = time.perf_counter() - started
    state = "already there, identical"
    if is_new:
        state = f"trained on {texts.characters:,} characters in {seconds:.1f} s"
    print(f"tokenizer    {arguments.vocab_size:,} ids, {state}")
    print(f"sha256       {tokenizer_sha256(arguments.output_dir)}")
    print(f"directory    {arguments.output_dir}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(
        prog="python -m data_prep.train_tokenizer", description="Train a tokenizer on text."
    )
    parser.add_argument(
        "--algorithm", choices=SPECIAL_TOKENS, default="byte_bpe", help="which kind (%(default)s)"
    )
    least = byte_bpe.MIN_VOCAB_SIZE
    size_help = f"{least} to {MAX_VOCAB_SIZE}, met exactly; {char_ngram.VOCAB_SIZE} for char_ngram"
    parser.add_argument("--vocab-size", type=int, required=True, help=size_help)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--source", nargs="+", metavar="FILE_OR_GLOB", help="text to learn from")
    mixture_help = (
        "learn from its training documents, in the shares of its weights: a name or a file, as "
        "build_shards"
    )
    text.add_argument("--mixture", metavar="NAME_OR_FILE", help=mixture_help)
    parser.add_argument(
        "--format", choices=FORMATS, help="format of the --source (by default from the file's name)"
    )
    parser.add_argument(
        "--text-field", help="column or JSON field of the text of the --source (text)"
    )
    most_help = "learn from N characters at most, taken evenly over the sources (%(default)s)"
    parser.add_argument(
        "--max-characters", type=large_number, default=MAX_CHARACTERS, metavar="N", help=most_help
    )
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="directory of the new tokenizer"
    )
    arguments = parser.parse_args(argv)
    if arguments.mixture:
        given = {"--format": arguments.format, "--text-field": arguments.text_field}
        for flag, value in given.items():
            if value:
                raise UserError(
                    f"{flag}: the mixture says it for each of its sources; leave it out"
                )
    return arguments


def check_vocab_size(algorithm: str, vocab_size: int) -> None:
    """Raises UserError for a size that can't be met."""
    if algorithm == "char_ngram" and vocab_size != char_ngram.VOCAB_SIZE:
        raise UserError(
            f"--vocab-size {vocab_size}: expected {char_ngram.VOCAB_SIZE}, the one size of "
            "char_ngram"
        )
    least = byte_bpe.MIN_VOCAB_SIZE
    if not least <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f"--vocab-size {vocab_size}: expected {least} to {MAX_VOCAB_SIZE:,}")


def find_texts(arguments: argparse.Namespace) -> TrainingTexts:
    """What to learn from."""
    if not arguments.mixture:
        field = arguments.text_field or "text"
        return texts_of_files(arguments.source, arguments.format, field, arguments.max_characters)
    # Which takes its tokenizer's place.
    mixture = load_mixture(mixture_path(arguments.mixture), arguments.output_dir)
    return texts_of_mixture(mixture, arguments.max_characters)


def new_tokenizer(
    vocab: dict[str, int], merges: list[tuple[str, str]], special_tokens: Iterable[str]
) -> Tokenizer:
    """A lossless byte-level tokenizer that adds nothing of its own to a text."""
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict.fromkeys(special_tokens)  # a token may have two roles
    added = [AddedToken(name, normalized=False, special=True) for name in names]
    tokenizer.add_special_tokens(added)
    return tokenizer


def about_training(
    arguments: argparse.Namespace, texts: TrainingTexts, argv: Sequence[str] | None
) -> dict[str, Any]:
    """What made the tokenizer: everything that decides its files, and nothing of when and where."""
    given = sys.argv[1:] if argv is None else argv
    own = [without_credentials(argument) for argument in given]
    sources = [
        {
            "name": source.name,
            "share": source.share,
            "characters": source.characters,
            "files": [{"name": file.name, "size": file.size} for file in source.files],
        }
        for source in texts.sources
    ]
    versions = {"python": platform.python_version()}
    for package in ("gigabpe", "tokenizers", "tablefree"):
        versions[package] = version(package)
    return {
        "command": shlex.join(["python", "-m", "data_prep.train_tokenizer", *own]),
        "algorithm": arguments.algorithm,
        "vocab_size": arguments.vocab_size,
        "characters": texts.characters,
        "max_characters": arguments.max_characters,
        "validation_fraction_left_out": texts.validation_fraction,
        "sources": sources,
        "versions": versions,
    }


def is_empty_directory(path: Path) -> bool:
    """Whether a path that exists is a directory with nothing in it."""
    return path.is_dir() and not any(path.iterdir())


def holds(path: Path, content: bytes) -> bool:
    """Whether a file is there and has this content."""
    return path.is_file() and path.read_bytes() == content


def save(
    tokenizer: Tokenizer, output_dir: Path, special_tokens: dict[str, str], training: dict[str, Any]
) -> bool:
    """Write the tokenizer's directory in one step.

    False if it is there already, identical, however it was made.
    """
    config = json.dumps(CONFIG | special_tokens, indent=2, sort_keys=True)
    texts = {"tokenizer.json": tokenizer.to_str(pretty=True), "tokenizer_config.json": config}
    files = {name: f"{text}\n".encode() for name, text in texts.items()}
    if output_dir.exists() and not is_empty_directory(output_dir):
        if all(holds(output_dir / name, content) for name, content in files.items()):
            return False
        raise UserError(
            f"{output_dir}: holds something else; choose another --output-dir, or remove that one"
        )
    about = json.dumps(training, indent=1, ensure_ascii=False) + "\n"
    # A name that is not UTF-8 as JSON escapes it.
    files[TRAINING_NAME] = about.encode(errors="backslashreplace")

    def write(directory: Path) -> None:
        for name, content in files.items():
            (directory / name).write_bytes(content)

    replace_directory(output_dir, write)
    return True


if __name__ == "__main__":
    sys.exit(exit_code(main))

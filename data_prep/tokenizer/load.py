"""Load a tokenizer: a directory with `tokenizer.json` and `tokenizer_config.json`.

Code that it brings along is never run, and what would have it encode at random is not used.
"""

import codecs
import contextlib
import json
import re
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from tokenizers import Tokenizer, decoders

from data_prep.errors import UserError, explained, parse_json
from data_prep.formats.flat_arrays import large_strings
from data_prep.manifest import MAX_VOCAB_SIZE
from data_prep.shards import CHAT_TEMPLATE_NAME, TOKENIZER_FILES, sha256_of_files
from data_prep.tokenizer.char_ngram import SPELLING
from data_prep.tokenizer.doubtful_characters import Doubtful, other_normal_forms
from data_prep.tokenizer.reference import RANDOM, LocalReference, Reference
from data_prep.tokenizer.reference_beside import ReferenceBeside

COLON = re.compile(rb"\s*:\s*")
ADDED_TOKENS_BYTES = 1 << 18  # some 1,500 tokens
TRAIN = "train one with python -m data_prep.train_tokenizer"

Backend = Any  # gigatoken's own tokenizer, which has no types


@dataclass(frozen=True, kw_only=True)
class LoadedTokenizer:
    """A tokenizer that fits the shards: at most 65,536 ids, and an end-of-document id."""

    directory: Path
    files: dict[str, bytes]
    # here or beside; what only a `Tokenizer` can do is asked of `reference`
    by_reference: Reference
    vocab_size: int
    eos_id: int
    eos_token: str
    special_tokens: dict[str, int]
    # special ids that some text might give; such a text is a bad document
    ids_of_no_text: frozenset[int]
    unknown_id: int | None  # what stands for text that the vocabulary lacks
    sha256: str
    keeps_all_text: bool  # whether every text comes back from its ids, as its definition tells
    normalizer: str  # as in its definition; empty if there is none
    not_for_gigatoken: str | None  # why gigatoken would give other ids
    is_random: bool = False  # its file asks for dropout or the like, which is not used
    notes: tuple[str, ...] = ()  # on what was left out of its files
    gigatoken: Backend | Exception | None = None  # as loaded beside the reference; None: not yet

    @cached_property
    def here(self) -> LocalReference:
        """The reference in this process, loaded if need be."""
        if isinstance(self.by_reference, LocalReference):
            return self.by_reference
        return _load_reference(self.directory, self.files)

    @property
    def reference(self) -> Tokenizer:
        """`tokenizers`, in this process."""
        return self.here.tokenizer

    @cached_property
    def definition(self) -> dict[str, Any]:
        """tokenizer.json."""
        where = str(self.directory / "tokenizer.json")
        content: dict[str, Any] = parse_json(self.files["tokenizer.json"], where, TRAIN)
        return content

    def name_of(self, special: int) -> str:
        """The special token of an id."""
        named = {**self.special_tokens, self.eos_token: self.eos_id}
        return next(token for token, id_ in named.items() if id_ == special)

    @cached_property
    def ranges_of_no_text(self) -> list[range]:
        """Ids that no text may give, neighbours together: a comparison or two for each range
        find them all.
        """
        ids = sorted(self.ids_of_no_text | {self.eos_id})
        first_of_a_range = [id_ for id_ in ids if id_ - 1 not in ids]
        last_of_a_range = [id_ for id_ in ids if id_ + 1 not in ids]
        return [
            range(first, last + 1)
            for first, last in zip(first_of_a_range, last_of_a_range, strict=True)
        ]

    @cached_property
    def doubtful(self) -> Doubtful:
        """Characters that gigatoken and the reference may take for different ones."""
        return Doubtful(other_normal_forms(self.normalizer))

    @cached_property
    def token_bytes(self) -> pa.LargeBinaryArray | None:
        """What each id of a byte-level tokenizer stands for; a byte that no text holds if it has
        no token.
        """
        if not isinstance(self.reference.decoder, decoders.ByteLevel):
            return None
        byte_of = {chr(SPELLING.get(byte, byte)): byte for byte in range(256)}
        table = [b"\xff"] * self.vocab_size
        for token, id_ in self.reference.get_vocab(with_added_tokens=False).items():
            table[id_] = (
                bytes(map(byte_of.__getitem__, token))
                if byte_of.keys() >= set(token)
                else token.encode()
            )
        for id_, added in self.reference.get_added_tokens_decoder().items():
            table[id_] = added.content.encode()
        return large_strings(table).cast(pa.large_binary())


def load_tokenizer(
    directory: Path, *, prefer: str = "tokenizers", threads: int = 1
) -> LoadedTokenizer:
    """Load and check a tokenizer directory. Raises UserError if the shards can't be made with it.

    Where gigatoken is preferred it is loaded too, and the reference beside it in a process of its
    own, which may use so many threads: each takes as long as the other.
    """
    files, eos_token, notes = read_files(directory)
    by_reference: Reference
    backend: Backend | Exception | None = None
    if prefer == "gigatoken" and "tokenizer.json" in files:
        load_here = partial(_load_reference, directory, files)
        by_reference = ReferenceBeside(files["tokenizer.json"], load_here, threads)
        backend = load_gigatoken(
            without_special_tokens(files["tokenizer.json"], str(directory / "tokenizer.json"))
        )
    else:
        by_reference = _load_reference(directory, files)
    traits = by_reference.traits(eos_token)
    if traits.random_settings:
        backend = None  # its file is to be loaded without them
        reason = "which encodes at random, is not used: the same text gives the same ids"
        notes += tuple(f"its {name}, {reason}" for name in traits.random_settings)
    if traits.vocab_size > MAX_VOCAB_SIZE:
        raise UserError(
            f"{directory}: {traits.vocab_size:,} ids, but shards hold at most {MAX_VOCAB_SIZE:,}; "
            f"{TRAIN}"
        )
    if not isinstance(eos_token, str) or traits.eos_id is None:
        where = directory / "tokenizer_config.json"
        raise UserError(
            f"{where}: eos_token is {eos_token!r}, expected a token of the vocabulary; set it"
        )
    return LoadedTokenizer(
        directory=directory,
        files=files,
        by_reference=by_reference,
        vocab_size=traits.vocab_size,
        eos_id=traits.eos_id,
        eos_token=eos_token,
        special_tokens=traits.special_tokens,
        sha256=sha256_of_files(files),
        unknown_id=traits.unknown_id,
        ids_of_no_text=frozenset(traits.ids_of_no_text),
        keeps_all_text=traits.keeps_all_text,
        normalizer=traits.normalizer,
        not_for_gigatoken=traits.not_for_gigatoken,
        is_random=bool(traits.random_settings),
        notes=tuple(f"{directory}: {note}" for note in notes),
        gigatoken=backend,
    )


def _load_reference(directory: Path, files: dict[str, bytes]) -> LocalReference:
    """The reference in this process. Raises UserError if it can't load the tokenizer."""
    with explained(Exception, f"{directory / 'tokenizer.json'}: not a loadable tokenizer", TRAIN):
        return LocalReference(files["tokenizer.json"])


def load_gigatoken(tokenizer_json: bytes) -> Backend | Exception:
    """gigatoken, or why it can't load a tokenizer. It keeps Python's lock meanwhile: 0.2 s for
    65,536 ids.
    """
    try:
        from gigatoken.gigatoken_rs import load_hf_json

        backend: Backend = load_hf_json(tokenizer_json)
    except Exception as error:  # it may be missing, too; the reference can do the work
        return error
    return backend


def read_files(directory: Path) -> tuple[dict[str, bytes], object, tuple[str, ...]]:
    """The files that make a tokenizer, the token that ends documents, and what was left out of
    them.

    transformers supplies what they lack. Code that the directory brings along (`auto_map`) is never
    run: a tokenizer whose tokenizer.json says all does without, and any other one is refused.
    """
    known = (*TOKENIZER_FILES, CHAT_TEMPLATE_NAME)
    files = {
        name: (directory / name).read_bytes() for name in known if (directory / name).is_file()
    }
    config: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = parse_json(files.get(name, b"{}"), str(directory / name), TRAIN)
        if not isinstance(content, dict):
            raise UserError(
                f"{directory / name}: a JSON {type(content).__name__}, expected an object; {TRAIN}"
            )
        if content.pop("auto_map", None):
            if "tokenizer.json" not in files:
                problem = (
                    "asks for code of its own (auto_map), which is never run here, and there is "
                    "no tokenizer.json"
                )
                raise UserError(
                    f"{directory / name}: {problem}; save it as one (save_pretrained of a fast "
                    "tokenizer)"
                )
            files[name] = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
            notes += (
                f"auto_map is left out of {name}: code that a tokenizer brings along is never run",
            )
        config |= content
    eos = config.get("eos_token")
    if eos and {"tokenizer.json", "tokenizer_config.json"} <= files.keys():
        return files, eos.get("content") if isinstance(eos, dict) else eos, notes
    if not any(directory.glob("*.json")) and not any(directory.glob("*.model")):
        problem = "No such file or directory; a tokenizer directory needs it"
        raise UserError(f"{directory / 'tokenizer.json'}: {problem}; {TRAIN}")
    from transformers import AutoTokenizer

    with explained(Exception, f"{directory}: AutoTokenizer can't load it", TRAIN):
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        files.setdefault("tokenizer.json", tokenizer.backend_tokenizer.to_str().encode())
    config = {
        **config,
        "eos_token": tokenizer.eos_token,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files["tokenizer_config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return {name: files[name] for name in known if name in files}, tokenizer.eos_token, notes


def without_special_tokens(tokenizer_json: bytes, where: str) -> bytes:
    """What gigatoken is to load: it always parses special tokens in text, so it must not know them.

    Parsing 65,536 tokens and their merges and writing them again takes 0.13 s, so only the list of
    added tokens is changed where it can be found for certain: where its name stands once in the
    file, all before it, closed there, is an object of which it is a key, and it ends soon.
    """
    before, name, after = tokenizer_json.partition(b'"added_tokens"')
    colon = COLON.match(after)
    if colon and name not in after:
        with contextlib.suppress(ValueError, RecursionError):
            value, _ = codecs.utf_8_decode(
                after[colon.end() : colon.end() + ADDED_TOKENS_BYTES], "strict", False
            )
            added, length = json.JSONDecoder().raw_decode(value)
            if "added_tokens" in json.loads(before + name + b": null}"):
                kept = json.dumps([token for token in added or [] if not token["special"]])
                behind = after[colon.end() + len(value[:length].encode()) :]
                return before + name + b": " + kept.encode() + behind
    model = parse_json(tokenizer_json, where, TRAIN)
    model["added_tokens"] = [
        token for token in model.get("added_tokens") or [] if not token["special"]
    ]
    return json.dumps(model).encode()


def for_gigatoken(tokenizer: LoadedTokenizer) -> bytes:
    """tokenizer.json as gigatoken is to load it: without special tokens, and without what
    encodes at random.
    """
    content = tokenizer.files["tokenizer.json"]
    if tokenizer.is_random:
        model = {
            key: value for key, value in tokenizer.definition["model"].items() if key not in RANDOM
        }
        content = json.dumps(tokenizer.definition | {"model": model}).encode()
    return without_special_tokens(content, str(tokenizer.directory / "tokenizer.json"))

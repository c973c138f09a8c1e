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
from typing import Any, NamedTuple

import pyarrow as pa
from tokenizers import Tokenizer, decoders

from data_prep.errors import UserError, explained, parse_json
from data_prep.formats.flat_arrays import large_strings
from data_prep.manifest import MAX_VOCAB_SIZE
from data_prep.shards import CHAT_TEMPLATE_NAME, TOKENIZER_FILES, sha256_of_files
from data_prep.tokenizer.char_ngram import bytes_of
from data_prep.tokenizer.doubtful_characters import Doubtful, neighbours, other_normal_forms
from data_prep.tokenizer.reference import RANDOM, LocalReference, Reference
from data_prep.tokenizer.reference_beside import ReferenceBeside

TOKENIZER_JSON = "tokenizer.json"
CONFIG_JSON = "tokenizer_config.json"
SPECIAL_TOKENS_JSON = "special_tokens_map.json"
KNOWN_FILES = (*TOKENIZER_FILES, CHAT_TEMPLATE_NAME)
NO_TEXT = b"\xff"  # in no UTF-8
COLON = re.compile(rb"\s*:\s*")
ADDED_TOKENS_BYTES = 1 << 18  # some 1,500 tokens
TRAIN = "train one with python -m data_prep.train_tokenizer"

Definition = dict[str, Any]  # tokenizer.json, or a part of it
Backend = Any  # gigatoken's own tokenizer, which has no types


@dataclass(frozen=True, kw_only=True)
class LoadedTokenizer:
    """A tokenizer that fits the shards: at most 65,536 ids, and an end-of-document id."""

    directory: Path
    files: dict[str, bytes]
    # Here or beside; what only a `Tokenizer` can do is asked of `reference`.
    by_reference: Reference
    vocab_size: int
    eos_id: int
    eos_token: str
    special_tokens: dict[str, int]
    # Special ids that some text might give; such a text is a bad document.
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
    def definition(self) -> Definition:
        """tokenizer.json."""
        tokenizer_json = self.files[TOKENIZER_JSON]
        where = str(self.directory / TOKENIZER_JSON)
        content: Definition = parse_json(tokenizer_json, where, TRAIN)
        return content

    def name_of(self, special: int) -> str:
        """The special token of an id."""
        named = {**self.special_tokens, self.eos_token: self.eos_id}
        return next(token for token, id_ in named.items() if id_ == special)

    @cached_property
    def ranges_of_no_text(self) -> list[range]:
        """Ids that no text may give, neighbours together.

        A comparison or two for each range find them all.
        """
        return neighbours(sorted(self.ids_of_no_text | {self.eos_id}))

    @cached_property
    def doubtful(self) -> Doubtful:
        """Characters that gigatoken and the reference may take for different ones."""
        return Doubtful(other_normal_forms(self.normalizer))

    @cached_property
    def token_bytes(self) -> pa.LargeBinaryArray | None:
        """What each id of a byte-level tokenizer stands for, shape (ids,); None of another one.

        An id without a token stands for a byte that no text holds.
        """
        if not isinstance(self.reference.decoder, decoders.ByteLevel):
            return None
        table = [NO_TEXT] * self.vocab_size
        vocabulary = self.reference.get_vocab(with_added_tokens=False)
        for token, id_ in vocabulary.items():
            table[id_] = bytes_of(token)
        added_tokens = self.reference.get_added_tokens_decoder()
        for id_, added in added_tokens.items():
            table[id_] = added.content.encode()
        return large_strings(table).cast(pa.large_binary())


class TokenizerFiles(NamedTuple):
    """What makes a tokenizer."""

    contents: dict[str, bytes]  # by the files' names
    eos_token: object  # that ends documents; a token if it is a string
    notes: tuple[str, ...]  # on what was left out


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
    if prefer == "gigatoken" and TOKENIZER_JSON in files:
        by_reference, backend = _load_both(directory, files, threads)
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
        raise UserError(
            f"{directory / CONFIG_JSON}: eos_token is {eos_token!r}, expected a token of the "
            "vocabulary; set it"
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


def _load_both(
    directory: Path, files: dict[str, bytes], threads: int
) -> tuple[ReferenceBeside, Backend | Exception]:
    """The reference in a process beside this one, and meanwhile gigatoken."""
    tokenizer_json = files[TOKENIZER_JSON]
    load_here = partial(_load_reference, directory, files)
    by_reference = ReferenceBeside(tokenizer_json, load_here, threads)
    ordinary = without_special_tokens(tokenizer_json, str(directory / TOKENIZER_JSON))
    return by_reference, load_gigatoken(ordinary)


def _load_reference(directory: Path, files: dict[str, bytes]) -> LocalReference:
    """The reference in this process. Raises UserError if it can't load the tokenizer."""
    with explained(Exception, f"{directory / TOKENIZER_JSON}: not a loadable tokenizer", TRAIN):
        return LocalReference(files[TOKENIZER_JSON])


def load_gigatoken(tokenizer_json: bytes) -> Backend | Exception:
    """gigatoken, or why it can't load a tokenizer.

    It keeps Python's lock meanwhile: 0.2 s for 65,536 ids.
    """
    try:
        from gigatoken.gigatoken_rs import load_hf_json

        backend: Backend = load_hf_json(tokenizer_json)
    except Exception as error:  # it may be missing, too; the reference can do the work
        return error
    return backend


def read_files(directory: Path) -> TokenizerFiles:
    """What makes a tokenizer, of what its directory holds.

    transformers supplies what they lack. Code that the directory brings along (`auto_map`) is never
    run: a tokenizer whose tokenizer.json says all does without, and any other one is refused.
    """
    files: dict[str, bytes] = {}
    for name in KNOWN_FILES:
        if (directory / name).is_file():
            files[name] = (directory / name).read_bytes()
    config: Definition = {}
    notes: tuple[str, ...] = ()
    for name in (SPECIAL_TOKENS_JSON, CONFIG_JSON):  # the second has the last word
        path = directory / name
        content = parse_json(files.get(name, b"{}"), str(path), TRAIN)
        if not isinstance(content, dict):
            kind = type(content).__name__
            raise UserError(f"{path}: a JSON {kind}, expected an object; {TRAIN}")
        if content.pop("auto_map", None):
            if TOKENIZER_JSON not in files:
                raise _code_of_its_own(path)
            files[name] = _json_file(content)
            notes += (
                f"auto_map is left out of {name}: code that a tokenizer brings along is never run",
            )
        config |= content
    eos = config.get("eos_token")
    if isinstance(eos, dict):  # an added token, with its flags
        eos = eos.get("content")
    has_both = {TOKENIZER_JSON, CONFIG_JSON} <= files.keys()
    if config.get("eos_token") and has_both:
        return TokenizerFiles(files, eos, notes)
    return _supplied(directory, files, config, notes)


def _code_of_its_own(path: Path) -> UserError:
    """The error of a tokenizer that only its own code can load."""
    problem = (
        "asks for code of its own (auto_map), which is never run here, and there is no "
        "tokenizer.json"
    )
    return UserError(f"{path}: {problem}; save it as one (save_pretrained of a fast tokenizer)")


def _supplied(
    directory: Path, files: dict[str, bytes], config: Definition, notes: tuple[str, ...]
) -> TokenizerFiles:
    """The files of a tokenizer that lacks some, with those that transformers makes of the rest.

    transformers is imported here: it takes seconds.
    """
    has_json = any(directory.glob("*.json"))
    has_model = any(directory.glob("*.model"))
    if not has_json and not has_model:
        problem = "No such file or directory; a tokenizer directory needs it"
        raise UserError(f"{directory / TOKENIZER_JSON}: {problem}; {TRAIN}")
    from transformers import AutoTokenizer

    with explained(Exception, f"{directory}: AutoTokenizer can't load it", TRAIN):
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        files.setdefault(TOKENIZER_JSON, tokenizer.backend_tokenizer.to_str().encode())
    eos_token = tokenizer.eos_token
    of_transformers = {"eos_token": eos_token, "tokenizer_class": "PreTrainedTokenizerFast"}
    files[CONFIG_JSON] = _json_file(config | of_transformers)
    in_order = {name: files[name] for name in KNOWN_FILES if name in files}
    return TokenizerFiles(in_order, eos_token, notes)


def _json_file(content: Definition) -> bytes:
    """A file as transformers writes it."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


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
            behind_colon = after[colon.end() :]
            # Not final: the piece may end within a character.
            beginning, _ = codecs.utf_8_decode(behind_colon[:ADDED_TOKENS_BYTES], "strict", False)
            added, length = json.JSONDecoder().raw_decode(beginning)
            if "added_tokens" in json.loads(before + name + b": null}"):
                written_bytes = len(beginning[:length].encode())
                kept = json.dumps(_not_special(added))
                return before + name + b": " + kept.encode() + behind_colon[written_bytes:]
    model = parse_json(tokenizer_json, where, TRAIN)
    model["added_tokens"] = _not_special(model.get("added_tokens"))
    return json.dumps(model).encode()


def _not_special(added_tokens: list[Definition] | None) -> list[Definition]:
    """Those of a tokenizer.json's added tokens that are not special."""
    if added_tokens is None:
        return []
    return [token for token in added_tokens if not token["special"]]


def for_gigatoken(tokenizer: LoadedTokenizer) -> bytes:
    """tokenizer.json as gigatoken is to load it.

    That is without special tokens, and without what encodes at random.
    """
    content = tokenizer.files[TOKENIZER_JSON]
    if tokenizer.is_random:
        model = dict(tokenizer.definition["model"])
        for name in RANDOM:
            model.pop(name, None)
        definition = {**tokenizer.definition, "model": model}
        content = json.dumps(definition).encode()
    return without_special_tokens(content, str(tokenizer.directory / TOKENIZER_JSON))

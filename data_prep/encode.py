"""Load a tokenizer, encode texts fast, and prove it: gigatoken does the work, `tokenizers` is the reference.

Used by `build_shards`. A tokenizer is a directory with `tokenizer.json` and `tokenizer_config.json`. Both
encoders give the same ids; where gigatoken is missing or can't load a tokenizer, `tokenizers` takes its
place, and that is said. Strings that spell a special token are ordinary text to both.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tokenizers import Tokenizer

from data_prep.errors import UserError
from data_prep.shards import MAX_VOCAB_SIZE, tokenizer_sha256

TRAIN = "train one with python -m data_prep.train_tokenizer"
SLOW_BATCH_DOCUMENTS = 256

Ids = npt.NDArray[np.uint32]
Offsets = npt.NDArray[np.int64]
Encode = Callable[[pa.LargeStringArray], tuple[Ids, Offsets]]


@dataclass(frozen=True, kw_only=True)
class LoadedTokenizer:
    """A tokenizer that fits the shards: at most 65,536 ids, and an end-of-document id."""

    directory: Path
    reference: Tokenizer
    vocab_size: int
    eos_id: int
    eos_token: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Texts to ids: flat ids, and offsets of each text's ids (texts + 1)."""

    name: str  # with its version
    encode: Encode
    is_reference: bool
    fallback_reason: str | None = None


def load_tokenizer(directory: Path) -> LoadedTokenizer:
    """Load and check a tokenizer directory. Raises UserError if the shards can't be made with it."""
    try:
        config = json.loads(_read(directory, "tokenizer_config.json"))
    except ValueError as error:
        raise UserError(f"{directory / 'tokenizer_config.json'}: not valid JSON ({error}); {TRAIN}") from None
    try:
        reference = Tokenizer.from_buffer(_read(directory, "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{directory / 'tokenizer.json'}: not a loadable tokenizer ({error}); {TRAIN}") from None
    reference.encode_special_tokens = True
    reference.no_truncation()
    reference.no_padding()
    vocab_size = max(reference.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if vocab_size > MAX_VOCAB_SIZE:
        raise UserError(f"{directory}: {vocab_size:,} ids, but shards hold at most {MAX_VOCAB_SIZE:,}; {TRAIN}")
    eos = config.get("eos_token") if isinstance(config, dict) else None
    eos_token = eos.get("content") if isinstance(eos, dict) else eos
    eos_id = reference.token_to_id(eos_token) if isinstance(eos_token, str) else None
    if not isinstance(eos_token, str) or eos_id is None:
        where = directory / "tokenizer_config.json"
        raise UserError(f"{where}: eos_token is {eos_token!r}, expected a token of the vocabulary; set it")
    return LoadedTokenizer(
        directory=directory, reference=reference, vocab_size=vocab_size, eos_id=eos_id, eos_token=eos_token,
        sha256=tokenizer_sha256(directory),
    )  # fmt: skip


def new_encoder(tokenizer: LoadedTokenizer, *, prefer: str, parallel: bool) -> Encoder:
    """gigatoken if it is preferred, installed and able; else the reference, with the reason."""
    reason = None
    if prefer == "gigatoken":
        try:
            encode = _gigatoken_encode(tokenizer, parallel)
            return Encoder(name=f"gigatoken {version('gigatoken')}", encode=encode, is_reference=False)
        except ImportError:
            reason = "gigatoken is not installed"
        except Exception as error:  # whatever its loader raises, the reference can do the work
            reason = f"gigatoken can't load {tokenizer.directory} ({error})"
    encode = _reference_encode(tokenizer.reference)
    name = f"tokenizers {version('tokenizers')}"
    return Encoder(name=name, encode=encode, is_reference=True, fallback_reason=reason)


def reference_ids(tokenizer: LoadedTokenizer, text: str) -> Ids:
    """What the shards must hold for a text, end-of-document aside."""
    return np.array(tokenizer.reference.encode(text, add_special_tokens=False).ids, np.uint32)


def _read(directory: Path, name: str) -> bytes:
    try:
        return (directory / name).read_bytes()
    except OSError as error:
        raise UserError(f"{directory / name}: {error.strerror}; a tokenizer directory needs it; {TRAIN}") from None


def _gigatoken_encode(tokenizer: LoadedTokenizer, parallel: bool) -> Encode:
    """Arrow buffers in, flat ids out, no Python object per document."""
    import awkward as ak
    from gigatoken.gigatoken_rs import load_hf_json

    model = json.loads(_read(tokenizer.directory, "tokenizer.json"))
    # gigatoken always parses special tokens in text, so it must not know them
    model["added_tokens"] = [token for token in model.get("added_tokens") or [] if not token["special"]]
    backend = load_hf_json(json.dumps(model))

    def encode(texts: pa.LargeStringArray) -> tuple[Ids, Offsets]:
        _, offsets, data = texts.buffers()
        bounds = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
        characters = ak.contents.NumpyArray(np.frombuffer(data, np.uint8), parameters={"__array__": "char"})
        strings = ak.contents.ListOffsetArray(ak.index.Index64(bounds), characters, parameters={"__array__": "string"})
        rows = backend.encode_batch(ak.Array(strings), parallel=parallel).layout
        return rows.content.data, rows.offsets.data

    return encode


def _reference_encode(reference: Tokenizer) -> Encode:
    """The same through `tokenizers`."""

    def encode(texts: pa.LargeStringArray) -> tuple[Ids, Offsets]:
        ids, lengths = [], [0]
        for start in range(0, len(texts), SLOW_BATCH_DOCUMENTS):
            batch = texts.slice(start, SLOW_BATCH_DOCUMENTS).to_pylist()
            for encoding in reference.encode_batch_fast(batch, add_special_tokens=False):
                ids.append(np.array(encoding.ids, np.uint32))
                lengths.append(len(ids[-1]))
        return np.concatenate(ids), np.cumsum(lengths)

    return encode

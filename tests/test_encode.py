"""Both encoders give the same ids, lossless, and special strings stay ordinary text."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_helpers import VOCAB_SIZE
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep.encode import Encoder, load_tokenizer, new_encoder, reference_ids, tokenizer_sha256
from data_prep.errors import UserError

pytest_plugins = ("prep_fixtures",)

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["<|endoftext|>", " <|endoftext|>\n"])


def encode(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    ids, offsets = encoder.encode(pa.array(texts, pa.large_string()))
    assert ids.dtype == np.uint32
    return [ids[start:stop].tolist() for start, stop in itertools.pairwise(offsets)]


@pytest.fixture(scope="module")
def encoders(tokenizer_dir: Path) -> tuple[Encoder, Encoder]:
    tokenizer = load_tokenizer(tokenizer_dir)
    fast = new_encoder(tokenizer, prefer="gigatoken", parallel=True)
    assert fast.name.startswith("gigatoken")
    return fast, new_encoder(tokenizer, prefer="tokenizers", parallel=True)


def test_the_facts_of_a_tokenizer(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.eos_token) == (VOCAB_SIZE, 0, "<|endoftext|>")
    assert tokenizer.sha256 == tokenizer_sha256(tokenizer_dir)


def test_encoders_agree_on_real_and_nasty_text(encoders: tuple[Encoder, Encoder], texts: list[str]) -> None:
    fast, reference = encoders
    assert encode(fast, texts) == encode(reference, texts)


@settings(deadline=None)
@given(documents=st.lists(ANY_TEXT, min_size=1, max_size=5))
def test_encoders_agree_and_decode_gives_the_text_back(
    encoders: tuple[Encoder, Encoder], tokenizer_dir: Path, documents: list[str]
) -> None:
    fast, reference = encoders
    rows = encode(fast, documents)
    assert rows == encode(reference, documents)
    decoder = load_tokenizer(tokenizer_dir).reference
    assert [decoder.decode(row, skip_special_tokens=False) for row in rows] == documents
    assert all(0 not in row for row in rows)


def test_slices_of_an_arrow_array(encoders: tuple[Encoder, Encoder], texts: list[str]) -> None:
    array = pa.array(texts, pa.large_string()).slice(3, 4)
    for encoder in encoders:
        ids, offsets = encoder.encode(array)
        assert offsets[0] == 0
        assert ids.tolist() == [i for row in encode(encoder, texts[3:7]) for i in row]


def test_added_tokens_that_are_not_special_still_count(tmp_path: Path, tokenizer_dir: Path) -> None:
    directory = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, directory)
    extended = Tokenizer.from_file(str(directory / "tokenizer.json"))
    extended.add_tokens(["Congress"])
    extended.save(str(directory / "tokenizer.json"))
    tokenizer = load_tokenizer(directory)
    text = "to Congress, <|endoftext|>"
    encoder = new_encoder(tokenizer, prefer="gigatoken", parallel=False)
    assert encode(encoder, [text]) == [reference_ids(tokenizer, text).tolist()]
    assert VOCAB_SIZE in reference_ids(tokenizer, text)


def test_what_gigatoken_cannot_load_falls_back(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_word_tokenizer(tmp_path, 5))
    encoder = new_encoder(tokenizer, prefer="gigatoken", parallel=True)
    assert encoder.is_reference
    assert encoder.fallback_reason is not None
    assert "can't load" in encoder.fallback_reason
    assert encode(encoder, ["w1 w3", "w4"]) == [[1, 3], [4]]


def write_word_tokenizer(directory: Path, vocab_size: int) -> Path:
    """Words w0, w1, ... are their own ids; w2 ends documents."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "w2"}}))
    return directory


def test_bad_tokenizers(tmp_path: Path) -> None:
    def error() -> str:
        with pytest.raises(UserError) as caught:
            load_tokenizer(tmp_path)
        return str(caught.value)

    assert "tokenizer_config.json: No such file" in error()
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json: not valid JSON" in error()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert "tokenizer.json: No such file" in error()
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: not a loadable tokenizer" in error()
    write_word_tokenizer(tmp_path, 65_537)
    assert "65,537 ids, but shards hold at most 65,536" in error()
    write_word_tokenizer(tmp_path, 10)
    for eos in (None, "nowhere"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert f"eos_token is {eos!r}, expected a token of the vocabulary" in error()

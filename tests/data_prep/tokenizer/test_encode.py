"""Both encoders give the same ids, lossless, and special strings stay ordinary text."""

import itertools
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.prep_helpers import (
    NASTY_TEXTS,
    VOCAB_SIZE,
    build,
    decoded,
    source,
    write_mixture,
    write_parquet,
)
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep.errors import UserError
from data_prep.shards import tokenizer_sha256
from data_prep.tokenizer.encode import Encoder, new_encoder, reference_ids
from data_prep.tokenizer.load import load_tokenizer, without_special_tokens
from data_prep.tokenizer.reference import size_of_vocabulary

pytest_plugins = ("support.prep_fixtures",)

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["<|endoftext|>", " <|endoftext|>\n"]
)


def encode(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    ids, offsets = encoder.encode(pa.array(texts, pa.large_string()))
    assert ids.dtype == np.uint32
    return [ids[start:stop].tolist() for start, stop in itertools.pairwise(offsets)]


@pytest.fixture(scope="module")
def encoders(tokenizer_dir: Path) -> tuple[Encoder, Encoder]:
    tokenizer = load_tokenizer(tokenizer_dir)
    fast = new_encoder(tokenizer, prefer="gigatoken")
    assert fast.name.startswith("gigatoken")
    return fast, new_encoder(tokenizer, prefer="tokenizers")


def test_the_facts_of_a_tokenizer(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.eos_token) == (
        VOCAB_SIZE,
        0,
        "<|endoftext|>",
    )
    assert tokenizer.special_tokens == {"<|endoftext|>": 0, "<pad>": 511}
    assert tokenizer.sha256 == tokenizer_sha256(tokenizer_dir)


def test_encoders_agree_on_real_and_nasty_text(
    encoders: tuple[Encoder, Encoder], texts: list[str]
) -> None:
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
    encoder = new_encoder(tokenizer, prefer="gigatoken")
    assert encode(encoder, [text]) == [reference_ids(tokenizer, text).tolist()]
    assert VOCAB_SIZE in reference_ids(tokenizer, text)


def test_what_gigatoken_cannot_load_falls_back(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_word_tokenizer(tmp_path, 5))
    encoder = new_encoder(tokenizer, prefer="gigatoken")
    assert encoder.is_reference
    assert encoder.fallback_reason is not None
    assert "can't load" in encoder.fallback_reason
    assert "\n" not in encoder.fallback_reason
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

    assert (
        "tokenizer.json: No such file or directory; a tokenizer directory needs it; train one with"
        in error()
    )
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json: not valid JSON" in error()
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert "tokenizer_config.json: a JSON list, expected an object" in error()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert f"{tmp_path}: AutoTokenizer can't load it (" in error()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "w2"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: not a loadable tokenizer" in error()
    write_word_tokenizer(tmp_path, 65_537)
    assert "65,537 ids, but shards hold at most 65,536" in error()
    write_word_tokenizer(tmp_path, 10)
    for eos in (None, "nowhere"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert f"eos_token is {eos!r}, expected a token of the vocabulary" in error()


def write_gpt2(directory: Path, tokenizer_dir: Path) -> None:
    """The same tokenizer in the form in which GPT-2 was published; what ends documents, only its
    class knows.
    """
    model = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]
    directory.mkdir()
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    (directory / "config.json").write_text('{"model_type": "gpt2"}')


MORE_FILES: dict[str, dict[str, object]] = {
    "vocab and merges": {},
    "a configuration without eos": {"tokenizer_config.json": {"model_max_length": 1024}},
    "tokenizer.json too": {"tokenizer.json": None},
    "tokenizer.json and a configuration": {"tokenizer.json": None, "tokenizer_config.json": {}},
    "special_tokens_map.json": {
        "tokenizer.json": None,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "special_tokens_map.json": {"eos_token": {"content": "<|endoftext|>", "special": True}},
    },
    "another eos": {"tokenizer_config.json": {"eos_token": "<|im_end|>"}},
}


@pytest.mark.parametrize("more", MORE_FILES)
def test_a_directory_that_auto_tokenizer_loads(
    tmp_path: Path, tokenizer_dir: Path, texts: list[str], more: str
) -> None:
    """A data set built with it holds AutoTokenizer's ids, and a tokenizer that needs no GPT-2."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    directory = tmp_path / "tokenizer"
    write_gpt2(directory, tokenizer_dir)
    for name, content in MORE_FILES[more].items():
        (directory / name).write_text(json.dumps(content))
        if content is None:
            shutil.copy(tokenizer_dir / name, directory)
    theirs = AutoTokenizer.from_pretrained(directory)
    write_parquet(tmp_path / "a.parquet", texts)
    manifest = build(
        write_mixture(tmp_path, directory, [source("a", "a.parquet")]), tmp_path / "out"
    )
    eos = "<|im_end|>" if more == "another eos" else "<|endoftext|>"
    assert (manifest.eos_token, manifest.eos_id) == (
        eos,
        VOCAB_SIZE if more == "another eos" else 0,
    )
    assert (theirs.eos_token, theirs.eos_token_id) == (manifest.eos_token, manifest.eos_id)
    assert decoded(tmp_path / "out") == {("a.parquet", row): text for row, text in enumerate(texts)}
    for class_ in (AutoTokenizer, PreTrainedTokenizerFast):
        ours = class_.from_pretrained(tmp_path / "out" / "tokenizer")
        assert (ours.eos_token, ours.eos_token_id) == (manifest.eos_token, manifest.eos_id)
        for text in texts:
            ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert ours.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
            assert reference_ids(load_tokenizer(directory), text).tolist() == ids
    assert tokenizer_sha256(tmp_path / "out" / "tokenizer") == load_tokenizer(directory).sha256


def test_code_of_a_tokenizer_directory_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto_map = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(auto_map))
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(
        UserError, match=r"asks for code of its own \(auto_map\), which is never run here"
    ):
        load_tokenizer(tmp_path)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(ANY_TEXT.filter(bool), max_size=30))
def test_any_text_comes_back_out_of_the_shards(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, documents: list[str]
) -> None:
    """Through parquet, the fast encoder, units and shards, byte for byte."""
    base = tmp_path_factory.mktemp("round-trip")
    documents = [*documents, *NASTY_TEXTS]  # these fall on both sides
    write_parquet(base / "a.parquet", documents)
    mixture = write_mixture(
        base, tokenizer_dir, [source("a", "a.parquet")], validation_fraction=0.5
    )
    build(mixture, base / "out")
    found = decoded(base / "out")
    assert [found["a.parquet", row].encode() for row in range(len(documents))] == [
        text.encode() for text in documents
    ]


def test_threads_share_an_encoder(encoders: tuple[Encoder, Encoder], texts: list[str]) -> None:
    """More threads than cores at once, with batches small enough for one of its threads and
    large enough for all.
    """
    fast, reference = encoders
    large = "".join(texts)
    large *= (5 << 19) // len(large)  # 2.5 MB: it is cut at places where no token can lie across
    batches = [texts[start:] for start in range(7)] + [[large, *texts]]
    with ThreadPoolExecutor(len(batches)) as pool:
        found = list(pool.map(lambda batch: encode(fast, batch), batches))
    assert found == [encode(reference, batch) for batch in batches]


@pytest.mark.parametrize(
    "dump", [json.dumps, lambda model: json.dumps(model, ensure_ascii=False, indent=2)]
)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"added_tokens": []},
        {"added_tokens": None},
        {
            "a first key": {"added_tokens": [1]},
            "added_tokens": [{"content": '"added_tokens": [', "special": False}],
        },
        {"normalizer": {"added_tokens": [{"special": True}]}},
        {"normalizer": "added_tokens"},
    ],
)
def test_special_tokens_are_taken_out_of_the_text_of_tokenizer_json(
    tokenizer_dir: Path, change: dict[str, Any], dump: Callable[[Any], str]
) -> None:
    """All else stays, wherever the list stands and whatever else bears its name."""
    model = json.loads((tokenizer_dir / "tokenizer.json").read_bytes())
    kept = {"content": "kept", "special": False}
    model = {**change, **model, "added_tokens": [*model["added_tokens"], kept], **change}
    expected = [token for token in model["added_tokens"] or [] if not token["special"]]
    for of_order in (model, dict(reversed(model.items()))):
        got = json.loads(without_special_tokens(dump(of_order).encode(), "tokenizer.json"))
        assert got == {**model, "added_tokens": expected}


def test_a_tokenizer_without_added_tokens_has_none_to_take_out() -> None:
    """Old files may leave the list out."""
    assert json.loads(without_special_tokens(b'{"model": {}}', "tokenizer.json")) == {
        "model": {},
        "added_tokens": [],
    }


def test_the_size_of_a_vocabulary_with_gaps() -> None:
    """It is one more than the largest id, of added tokens too, however many there are."""
    assert size_of_vocabulary(Tokenizer(models.WordLevel({}))) == 0
    dense = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    assert size_of_vocabulary(dense) == 2
    dense.add_special_tokens(["<s>"])
    assert size_of_vocabulary(dense) == 3
    assert size_of_vocabulary(Tokenizer(models.WordLevel({"a": 0, "b": 7}))) == 8

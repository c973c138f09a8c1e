"""The character n-gram tokenizer: every character its own id, lossless, the same everywhere, in
every encoder.
"""

import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.prep_helpers import (
    NASTY_TEXTS,
    build,
    decoded,
    speeches,
    write_jsonl,
    write_mixture,
    write_parquet,
)
from support.prep_helpers import source as mixture_source
from support.runs import REPOSITORY
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_prep import train_tokenizer
from data_prep.errors import UserError
from data_prep.tokenizer import char_ngram
from data_prep.tokenizer.encode import Encoder, new_encoder, reference_ids
from data_prep.tokenizer.load import LoadedTokenizer, load_tokenizer

SPELLINGS = (
    "<pad>", "<s>", "</s>", "<unk>", "<0x41>", "<0x80>", "<unused_E004>", "<unused_FFFF>",
    "a<pad>b <s></s>",
)  # fmt: skip
ODD_TEXTS = (
    "\ue000\uf8ff\ufffe\uffff\U0001fffe",
    "\U0001f469\u200d\U0001f467 e\u0301\u200d",
    "Ã¤ Ġthe ▁the",
    "the theory\n\n",
)
TEXTS = (*SPELLINGS, *ODD_TEXTS, *NASTY_TEXTS)
NEVER_IN_TEXT = {*char_ngram.SPECIAL_IDS, *char_ngram.PREFIX_IDS, 65_535}
# what one stage or another treats in its own way, beside all of Unicode
ODD_CHARACTERS = "<>/_ spadunk0x8\x00\xad\ud7ff\ue000\uf900\uffff"
CHARACTERS = st.characters(exclude_categories=["Cs"]) | st.sampled_from(ODD_CHARACTERS)

PLANES = st.integers(0, 16).flatmap(
    lambda plane: st.characters(
        min_codepoint=plane << 16, max_codepoint=(plane << 16) + 0xFFFF, exclude_categories=["Cs"]
    )
)
PIECES = (
    CHARACTERS
    | PLANES
    | st.characters(categories=["Mn", "Mc", "Me"])
    | st.sampled_from([*TEXTS, "\n", "\x00"])
)
DOCUMENTS = st.lists(PIECES, max_size=30).map("".join)


def train(output_dir: Path, *flags: str) -> Path:
    arguments = [
        "--algorithm",
        "char_ngram",
        "--vocab-size",
        "65536",
        "--output-dir",
        str(output_dir),
        *flags,
    ]
    train_tokenizer.main(arguments)
    return output_dir


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(
        tmp_path_factory.mktemp("source") / "s.jsonl", [*speeches(150), *NASTY_TEXTS]
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    return train(tmp_path_factory.mktemp("char_ngram") / "tokenizer", "--source", str(source))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> LoadedTokenizer:
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def encoder(tokenizer: LoadedTokenizer) -> Encoder:
    encoder = new_encoder(tokenizer, prefer="gigatoken")
    assert not encoder.is_reference, encoder.fallback_reason
    return encoder


@pytest.fixture(scope="module")
def auto(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(directory))


def test_layout_of_the_ids(tokenizer: LoadedTokenizer, auto: PreTrainedTokenizerBase) -> None:
    vocab = tokenizer.reference.get_vocab()
    assert sorted(vocab.values()) == list(range(65_536))
    assert [vocab[token] for token in ("<pad>", "<s>", "</s>", "<unk>")] == [
        57344,
        57345,
        57346,
        57347,
    ]
    assert (auto.pad_token_id, auto.bos_token_id, auto.eos_token_id, auto.unk_token_id) == (
        57344,
        57345,
        57346,
        57347,
    )
    assert (len(auto), tokenizer.vocab_size, tokenizer.eos_id) == (65_536, 65_536, 57346)
    assert (vocab["<unused_FFFF>"], tokenizer.special_tokens["<unused_FFFF>"]) == (65_535, 65_535)


def test_every_character_has_its_code_unit_as_id(
    tokenizer: LoadedTokenizer, encoder: Encoder
) -> None:
    codes = [*range(0xD800), *range(0xF900, 0x10000)]
    ids, offsets = encoder.encode(pa.array([chr(code) for code in codes], pa.large_string()))
    # U+FFFF leaves its own to an id that no text gives
    assert ids.tolist() == [*codes[:-1], 0xE07F]
    assert len(offsets) == len(codes) + 1
    assert all(tokenizer.reference.encode(chr(code)).ids == [code] for code in codes[:-1:7])


def test_other_characters_are_spelled_in_bytes(tokenizer: LoadedTokenizer) -> None:
    assert reference_ids(tokenizer, "\ue000").tolist() == [0xE0EE, 0xE080, 0xE080]
    assert reference_ids(tokenizer, "🙂").tolist() == [0xE0F0, 0xE09F, 0xE099, 0xE082]


@settings(deadline=None, max_examples=300)
@given(text=st.text(CHARACTERS, max_size=50) | st.lists(st.sampled_from(TEXTS)).map("".join))
@example(text="".join(TEXTS))
def test_any_text_comes_back(
    tokenizer: LoadedTokenizer, encoder: Encoder, auto: PreTrainedTokenizerBase, text: str
) -> None:
    ids = reference_ids(tokenizer, text).tolist()
    assert not NEVER_IN_TEXT & set(ids)
    assert tokenizer.reference.decode(ids, skip_special_tokens=False) == text
    assert encoder.encode(pa.array([text], pa.large_string()))[0].tolist() == ids
    assert auto.encode(text) == ids
    assert auto.decode(ids) == auto.decode(ids, skip_special_tokens=True) == text


@settings(max_examples=5, suppress_health_check=list(HealthCheck))
@given(documents=st.lists(DOCUMENTS, min_size=30, max_size=150))
@example(documents=[*TEXTS, "".join(TEXTS), "\x00", "\n", "\r", "</s>" * 100])
def test_any_documents_come_back_out_of_shards(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, documents: list[str]
) -> None:
    """Which also means that the end-of-document id never comes out of a text, not even out of
    `</s>`.
    """
    base = tmp_path_factory.mktemp("shards")
    documents = [f"either split gets {i}" for i in range(20)] + documents
    write_parquet(base / "a.parquet", documents)
    entry = mixture_source("a", "a.parquet")
    manifest = build(write_mixture(base, directory, [entry], validation_fraction=0.5), base / "out")
    expected = {("a.parquet", row): text for row, text in enumerate(documents) if text}
    assert decoded(base / "out") == expected
    assert sum(shard.text_bytes for shard in manifest.shards) == sum(
        len(text.encode()) for text in documents
    )


def test_real_text_is_the_same_in_both_encoders(
    tokenizer: LoadedTokenizer, encoder: Encoder
) -> None:
    texts = speeches(249)[150:]
    ids, offsets = encoder.encode(pa.array(texts, pa.large_string()))
    for i, text in enumerate(texts):
        assert ids[offsets[i] : offsets[i + 1]].tolist() == reference_ids(tokenizer, text).tolist()
    assert 2.2 < sum(map(len, texts)) / len(ids) < 3
    lengths = {
        len(tokenizer.reference.decode([id_]))
        for id_ in ids.tolist()
        if id_ in char_ngram.TRIGRAM_IDS
    }
    assert lengths == {3}


def test_words_fall_apart_in_threes_from_their_start(tokenizer: LoadedTokenizer) -> None:
    found = tokenizer.reference.encode("the people of the United States").tokens
    assert found == [
        "the", "Ġpe", "opl", "e", "Ġof", "Ġth", "e", "ĠUn", "ite", "d", "ĠSt", "ate", "s",
    ]  # fmt: skip


def test_counts_of_a_word() -> None:
    anywhere, aligned = char_ngram.count_grams(["abcab"])
    assert anywhere == {"abc": 1, "bca": 1, "cab": 1, "ab": 1, "b": 1}
    assert aligned == {"abc": 1, "ab": 1}
    assert char_ngram.choose_grams(anywhere, aligned) == (["ab", "bc"], ["abc"])


def test_rare_grams_are_forgotten_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(char_ngram, "MAX_GRAMS", 4)
    monkeypatch.setattr(char_ngram, "PORTION_CHARACTERS", 1)
    anywhere, aligned = char_ngram.count_grams(["abc abc", "abc", "xyz xyz uvw"])
    assert len(anywhere) <= 4
    assert aligned.keys() <= anywhere.keys()


def test_the_same_files_whatever_the_hash_seed_and_the_threads(
    tmp_path: Path, source: Path, directory: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "data_prep.train_tokenizer",
        "--algorithm",
        "char_ngram",
        "--vocab-size",
        "65536",
    ]
    again = tmp_path / "again"
    environment = os.environ | {
        "PYTHONHASHSEED": "7",
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command += ["--source", str(source), "--output-dir", str(again)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert digest(again / name) == digest(directory / name)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_learns_from_part_of_the_text_if_told_so(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "t", "--source", str(source), "--max-characters", "1000")
    printed = capsys.readouterr()
    assert (
        "learning from 1,000 characters, evenly over the sources; --max-characters takes more"
        in printed.err
    )
    assert "trained on 1,000 characters" in printed.out
    assert "ids stay unused" in printed.err
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.vocab_size == 65_536
    assert (
        tokenizer.reference.decode(reference_ids(tokenizer, "<unused_D9FF>").tolist())
        == "<unused_D9FF>"
    )


def test_bad_arguments(tmp_path: Path, source: Path) -> None:
    with pytest.raises(
        UserError, match="--vocab-size 32000: expected 65536, the one size of char_ngram"
    ):
        train(tmp_path / "t", "--source", str(source), "--vocab-size", "32000")
    with pytest.raises(
        UserError, match="--max-characters: 0: expected a whole number of 1 or more"
    ):
        train(tmp_path / "t", "--source", str(source), "--max-characters", "0")
    assert not (tmp_path / "t").exists()


def test_configuration(directory: Path) -> None:
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["split_special_tokens"] is True
    assert config.keys() >= {"pad_token", "bos_token", "eos_token", "unk_token"}
    assert "model_type" not in config


def test_the_benchmark_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "tests" / "benchmarks")
    importlib.import_module("characters_per_token").main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    names = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines[2:]]
    ours = [(text, name) for text in ("prose", "code") for name in ("`byte_bpe`", "`char_ngram`")]
    assert names == [*ours, ("the paper's data", "the paper's, as stated")]

"""The byte-level BPE tokenizer: exact size, lossless, the same every time, at home in transformers."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prep_helpers import NASTY_TEXTS, VOCAB_SIZE, speeches, write_jsonl, write_parquet
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data_prep import train_tokenizer
from data_prep.errors import UserError

pytest_plugins = ("prep_fixtures",)


def train(output_dir: Path, vocab_size: int, *sources: Path) -> Path:
    names = [str(source) for source in sources]
    train_tokenizer.main(["--vocab-size", str(vocab_size), "--source", *names, "--output-dir", str(output_dir)])
    return output_dir


def train_error(output_dir: Path, vocab_size: int, *sources: Path) -> str:
    with pytest.raises(UserError) as caught:
        train(output_dir, vocab_size, *sources)
    return str(caught.value)


def test_layout_of_the_ids(tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert tokenizer.id_to_token(0) == "<|endoftext|>"
    assert all(len(tokenizer.id_to_token(i)) == 1 for i in range(1, 257))
    assert all(len(tokenizer.id_to_token(i)) > 1 for i in range(257, VOCAB_SIZE))


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(NASTY_TEXTS))
def test_any_text_comes_back(tokenizer_dir: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text).ids
    assert 0 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_auto_tokenizer(tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0
    for text in (*NASTY_TEXTS, *speeches(3)):
        ids = tokenizer.encode(text)
        assert 0 not in ids
        assert tokenizer.decode(ids) == text
    assert json.loads((tokenizer_dir / "tokenizer_config.json").read_text())["split_special_tokens"] is True


def test_the_same_bytes_from_every_format(tmp_path: Path, tokenizer_dir: Path) -> None:
    sources = [write_parquet(tmp_path / "s.parquet", speeches(10)), write_jsonl(tmp_path / "s.jsonl.gz", speeches(10))]
    digests = {digests_of(train(tmp_path / f"{i}", VOCAB_SIZE, source)) for i, source in enumerate(sources)}
    assert digests == {digests_of(tokenizer_dir)}


def digests_of(directory: Path) -> tuple[tuple[str, str], ...]:
    return tuple((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(directory.iterdir()))


def test_the_merges_are_those_that_tokenizers_learns(tmp_path: Path) -> None:
    text = tmp_path / "text"
    texts = training_texts(tmp_path)
    text.write_text("".join(f"{document}\n" for document in texts), encoding="utf-8", newline="")
    assert texts.characters == sum(map(len, [*speeches(40), *NASTY_TEXTS]))
    fast = train_tokenizer.learn_merges([text], 3000)
    reference = reference_merges(text, 3000)
    assert train_tokenizer.build_vocab(fast, 3000) == train_tokenizer.build_vocab(reference, 3000)
    assert len(reference) > 2000


def reference_merges(text: Path, vocab_size: int) -> train_tokenizer.Merges:
    """The merges as `tokenizers` learns them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|endoftext|>"], **options)
    tokenizer.train([str(text)], trainer)
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def training_texts(base: Path, max_characters: int = 10**9, files: int = 1) -> train_tokenizer.TrainingTexts:
    paths = [write_jsonl(base / f"{i}.jsonl", [*speeches(40), *NASTY_TEXTS]) for i in range(files)]
    flags = ["--vocab-size", "300", "--output-dir", "unused", "--source", *map(str, paths)]
    units = train_tokenizer.source_units(train_tokenizer.parse_arguments(flags))
    return train_tokenizer.TrainingTexts(units=units, max_characters=max_characters)


def test_too_much_text_is_cut_evenly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = training_texts(tmp_path, 10_000, files=2)
    assert [len(text) for text in texts] == [4000, 1000, 4000, 1000]
    assert texts.characters == 10_000
    assert "note: learning from 10,000 characters, evenly over the sources" in capsys.readouterr().err


def test_a_small_text_is_filled_up_with_other_spellings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", ["Four fellow citizens"])
    tokenizer = Tokenizer.from_file(str(train(tmp_path / "t", 300, path) / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 300
    assert "the text's words fill 274 ids; other spellings of them fill the rest" in capsys.readouterr().err
    message = train_error(tmp_path / "u", 60_000, path)
    assert "--vocab-size 60,000: this text supports 300 ids" in message
    assert not (tmp_path / "u").exists()


def test_written_whole_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", speeches(10))
    output_dir = train(tmp_path / "t", VOCAB_SIZE, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.jsonl", "t"]
    train(output_dir, VOCAB_SIZE, path)
    assert "already there, identical" in capsys.readouterr().out
    before = digests_of(output_dir)
    assert "holds something else" in train_error(output_dir, 300, path)
    assert digests_of(output_dir) == before


def test_bad_arguments(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", speeches(1))
    for vocab_size in (256, 65_537):
        assert f"--vocab-size {vocab_size}: expected 257 to 65,536" in train_error(tmp_path / "t", vocab_size, path)
    assert "no file matches" in train_error(tmp_path / "t", 300, tmp_path / "nowhere.jsonl")
    path.with_name("s.data").write_text("x")
    assert "is not known from its name" in train_error(tmp_path / "t", 300, path.with_name("s.data"))
    assert "no text in the sources" in train_error(tmp_path / "t", 300, write_jsonl(tmp_path / "e.jsonl", [""]))
    assert not (tmp_path / "t").exists()


def test_only_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc")
    tokenizer = Tokenizer.from_file(str(train(tmp_path / "t", 257, path) / "tokenizer.json"))
    assert len(tokenizer.encode("abc ü").ids) == 6

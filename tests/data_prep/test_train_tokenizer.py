"""The byte-level BPE tokenizer: exact size, lossless, the same every time, at home in
transformers.
"""

import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.prep_helpers import (
    NASTY_TEXTS,
    VOCAB_SIZE,
    build,
    decoded,
    source,
    speeches,
    write_jsonl,
    write_mixture,
    write_parquet,
)
from support.runs import REPOSITORY
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data_prep import train_tokenizer
from data_prep.building.mixture import load_mixture
from data_prep.errors import UserError
from data_prep.shards import tokenizer_sha256
from data_prep.tokenizer import byte_bpe
from data_prep.tokenizer.training_texts import TrainingTexts, texts_of_files, texts_of_mixture

pytest_plugins = ("support.prep_fixtures",)


def train(output_dir: Path, vocab_size: int, *sources: Path) -> Path:
    names = [str(source) for source in sources]
    train_tokenizer.main(
        ["--vocab-size", str(vocab_size), "--source", *names, "--output-dir", str(output_dir)]
    )
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
    assert all(len(tokenizer.id_to_token(i)) > 1 for i in range(257, VOCAB_SIZE - 1))
    assert tokenizer.id_to_token(VOCAB_SIZE - 1) == "<pad>"
    assert tokenizer.get_added_tokens_decoder().keys() == {0, VOCAB_SIZE - 1}


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(NASTY_TEXTS))
def test_any_text_comes_back(tokenizer_dir: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text).ids
    assert not {0, VOCAB_SIZE - 1} & {*ids}
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_auto_tokenizer(tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert tokenizer.pad_token_id == VOCAB_SIZE - 1
    for text in (*NASTY_TEXTS, *speeches(3)):
        ids = tokenizer.encode(text)
        assert 0 not in ids
        assert tokenizer.decode(ids) == text
    assert (
        json.loads((tokenizer_dir / "tokenizer_config.json").read_text())["split_special_tokens"]
        is True
    )


def test_the_same_bytes_from_every_format(tmp_path: Path, tokenizer_dir: Path) -> None:
    sources = [
        write_parquet(tmp_path / "s.parquet", speeches(10)),
        write_jsonl(tmp_path / "s.jsonl.gz", speeches(10)),
    ]
    digests = {
        digests_of(train(tmp_path / f"{i}", VOCAB_SIZE, source)) for i, source in enumerate(sources)
    }
    assert digests == {digests_of(tokenizer_dir)}
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": speeches(10)}).save_to_disk(str(saved))
    flags = ["--vocab-size", str(VOCAB_SIZE), "--format", "save_to_disk", "--source", str(saved)]
    train_tokenizer.main([*flags, "--output-dir", str(tmp_path / "of_saved")])
    assert digests_of(tmp_path / "of_saved") == digests_of(tokenizer_dir)


def digests_of(directory: Path) -> tuple[tuple[str, str], ...]:
    """Of what makes the tokenizer; training.json names files and command."""
    files = (directory / name for name in ("tokenizer.json", "tokenizer_config.json"))
    return tuple((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files)


PADDED_TEXTS = ["<pad> <pad>text<pad>\n" * 50, "<|endoftext|>" * 50]
CODE_TEXTS = [
    path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "tests").rglob("test_t*.py"))
]


def test_the_merges_are_those_that_tokenizers_learns_from_whole_documents(tmp_path: Path) -> None:
    texts = [
        *training_texts(tmp_path),
        *CODE_TEXTS,
        *PADDED_TEXTS,
        "a\r\n\r\n  b\x0c\n\n c\u2028\n\nd \n\n",
    ]
    byte_bpe.write_documents(tmp_path / "documents", texts)
    fast = byte_bpe.learn_merges([tmp_path / "documents"], 3000)
    reference = reference_merges([text.rstrip() for text in texts], 3000)
    assert byte_bpe.build_vocab(fast, 3000) == byte_bpe.build_vocab(reference, 3000)
    assert len(reference) > 2000
    across_lines = [left + right for left, right in reference if "Ċ" in left + right]
    assert {"ĊĊ", "ĊĠĠĠ"} <= {*across_lines}


def test_documents_are_learned_whole_and_apart(tmp_path: Path) -> None:
    """What is learned within a document, line ends too, is not learned where one ends and the
    next begins.
    """
    inside = write_jsonl(tmp_path / "inside.jsonl", ["x\n\n\n\ny"] * 20)
    across = write_jsonl(tmp_path / "across.jsonl", ["\n\nx\n\n", "\x0b\x0by\x0b\x0b"] * 20)
    sizes = []
    for path in (inside, across):
        byte_bpe.write_documents(tmp_path / "t", texts_of_files([str(path)], None, "text", 10**6))
        sizes.append(
            sorted(left + right for left, right in byte_bpe.learn_merges([tmp_path / "t"], 400))
        )
    assert sizes == [["ĊĊ", "ĊĊĊ"], []]


def reference_merges(texts: list[str], vocab_size: int) -> byte_bpe.Merges:
    """The merges as `tokenizers` learns them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], **options
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def training_texts(base: Path, max_characters: int = 10**9, files: int = 1) -> TrainingTexts:
    paths = [write_jsonl(base / f"{i}.jsonl", [*speeches(40), *NASTY_TEXTS]) for i in range(files)]
    return texts_of_files([*map(str, paths)], None, "text", max_characters)


def test_too_much_text_is_cut_evenly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = training_texts(tmp_path, 10_000, files=2)
    assert [len(text) for text in texts] == [4000, 1000, 4000, 1000]
    assert texts.characters == 10_000
    assert (
        "note: learning from 10,000 characters, evenly over the sources" in capsys.readouterr().err
    )


def test_a_small_text_is_filled_up_with_other_spellings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", ["Four fellow citizens"])
    tokenizer = Tokenizer.from_file(str(train(tmp_path / "t", 300, path) / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 300
    assert (
        "the text's words fill 275 ids; other spellings of them fill the rest"
        in capsys.readouterr().err
    )
    message = train_error(tmp_path / "u", 60_000, path)
    assert "--vocab-size 60,000: this text supports 301 ids" in message
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
    for vocab_size in (257, 65_537):
        assert f"--vocab-size {vocab_size}: expected 258 to 65,536" in train_error(
            tmp_path / "t", vocab_size, path
        )
    assert "no file matches" in train_error(tmp_path / "t", 300, tmp_path / "nowhere.jsonl")
    path.with_name("s.data").write_text("x")
    assert "is not known from its name" in train_error(
        tmp_path / "t", 300, path.with_name("s.data")
    )
    assert "no text to learn from in it" in train_error(
        tmp_path / "t", 300, write_jsonl(tmp_path / "e.jsonl", [""])
    )
    assert not (tmp_path / "t").exists()


def test_only_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc")
    tokenizer = Tokenizer.from_file(str(train(tmp_path / "t", 258, path) / "tokenizer.json"))
    assert len(tokenizer.encode("abc ü").ids) == 6


# A mixture


def mixture_of(base: Path, sources: list[dict[str, Any]], **more: Any) -> Path:
    return write_mixture(base, base / "none yet", sources, **more)


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of two formats, each with a text field of its own; weights that neither source's
    size has.
    """
    base = tmp_path_factory.mktemp("mixture")
    write_jsonl(
        base / "small.jsonl", [f"small {text[:400]}" for text in speeches(40)], field="body"
    )
    write_parquet(base / "large.parquet", [f"large {text}" for text in speeches(40)])
    sources = [
        source("small", "small.jsonl", format="jsonl", weight=3, text_field="body"),
        source("large", "large.parquet", weight=1),
    ]
    return mixture_of(base, sources)


def words_of(mixture: Path, max_characters: int) -> tuple[TrainingTexts, list[str]]:
    texts = texts_of_mixture(load_mixture(mixture, Path("any")), max_characters)
    return texts, list(texts)


@pytest.mark.parametrize("max_characters", [1_000, 30_000, 10**9])
def test_weights_are_shares_of_the_characters(
    two_sources: Path, max_characters: int, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, read = words_of(two_sources, max_characters)
    counts = [
        sum(len(text) for text in read if text.startswith(name[:2])) for name in ("small", "large")
    ]
    assert [source.characters for source in texts.sources] == counts
    assert counts[0] / sum(counts) == pytest.approx(0.75, abs=0.001)
    assert sum(counts) <= max_characters
    said = capsys.readouterr().err
    assert ("learning from" in said) == (max_characters < 10**9)
    # the small source holds some 11,000
    assert ("characters) was read" in said) == (max_characters > 1_000)


def test_validation_documents_are_left_out(
    two_sources: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    _, read = words_of(two_sources, 10**9)
    build(two_sources, tmp_path / "data", "--tokenizer", str(tokenizer_dir))
    whole = decoded(tmp_path / "data")
    held_out = {(path.name, row) for path, row in validation_rows(tmp_path / "data")}
    assert held_out
    expected = {text for place, text in whole.items() if place not in held_out}
    assert expected <= {*read}
    cut = {*read} - expected  # the last of the small source, which is read again and again
    assert len(cut) <= 1
    assert all(any(text.startswith(beginning) for text in expected) for beginning in cut)


def validation_rows(data_dir: Path) -> list[tuple[Path, int]]:
    from data_prep.shards import ShardReader

    reader = ShardReader(data_dir)
    shards = reader.manifest.shards_of("validation")
    found = [shard.origin(int(row)) for shard in shards for row in reader.documents(shard)[:, 1]]
    return [(Path(name), row) for name, row in found]


@pytest.mark.parametrize(("algorithm", "size"), [("byte_bpe", "400"), ("char_ngram", "65536")])
def test_a_tokenizer_of_a_mixture_builds_that_mixture(
    algorithm: str, size: str, two_sources: Path, tmp_path: Path
) -> None:
    flags = ["--algorithm", algorithm, "--vocab-size", size, "--mixture", str(two_sources)]
    train_tokenizer.main([*flags, "--output-dir", str(tmp_path / "t")])
    assert build(
        two_sources, tmp_path / "data", "--tokenizer", str(tmp_path / "t")
    ).vocab_size == int(size)


@pytest.mark.parametrize(
    ("sources", "flags", "says"),
    [
        (
            [source("a", "s.jsonl", format="jsonl")],
            ["--text-field", "x"],
            "--text-field: the mixture says it for each",
        ),
        (
            [source("a", "s.jsonl", format="jsonl")],
            ["--source", "s.jsonl"],
            "not allowed with argument",
        ),
        (
            [source("a", "i.bin", format="uint16")],
            [],
            "source 'a': holds ids of a tokenizer, no text",
        ),
        ([source("a", "e.jsonl", format="jsonl")], [], "source 'a': no text to learn from in it"),
        (
            [source("a", "s.jsonl", format="jsonl"), source("b", "*.jsonl", format="jsonl")],
            [],
            "source 'b': s.jsonl is named twice",
        ),
    ],
)
def test_a_mixture_that_can_not_be_learned_from(
    sources: list[dict[str, Any]], flags: list[str], says: str, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "s.jsonl", ["some text"])
    write_jsonl(tmp_path / "e.jsonl", [""])
    (tmp_path / "i.bin").write_bytes(bytes(100))
    mixture = mixture_of(tmp_path, sources, validation_fraction=1e-9)
    arguments = [
        "--vocab-size",
        "300",
        "--mixture",
        str(mixture),
        "--output-dir",
        str(tmp_path / "t"),
        *flags,
    ]
    with pytest.raises(UserError) as caught:
        train_tokenizer.main(arguments)
    assert says in str(caught.value)
    assert not (tmp_path / "t").exists()


def test_a_bad_document_of_a_mixture_is_left_out_if_the_mixture_says_so(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text('{"text": "some text"}\nno json\n')
    sources = [source("a", "s.jsonl", format="jsonl")]
    with pytest.raises(UserError, match="line 2"):
        words_of(mixture_of(tmp_path, sources, validation_fraction=1e-9), 100)
    more = {"on_bad_document": "skip", "validation_fraction": 1e-9}
    assert words_of(mixture_of(tmp_path, sources, max_bad_fraction=1, **more), 100)[1] == [
        "some text"
    ]


def test_a_mixture_of_too_many_bad_documents_teaches_nothing(tmp_path: Path) -> None:
    """By rows, by bytes, or a file of them alone beside a good one: as when the mixture is
    built.
    """
    lines = '{"text": "some text"}\n' * 300
    sources = [source("a", "*.jsonl", format="jsonl")]

    def error(content: str, **more: Any) -> str:
        (tmp_path / "s.jsonl").write_text(content)
        mixture = mixture_of(
            tmp_path, sources, validation_fraction=1e-9, on_bad_document="skip", **more
        )
        with pytest.raises(UserError) as caught:
            words_of(mixture, 1_000_000)
        return str(caught.value)

    assert (
        "'a': 4 of 304 rows are bad (1.32%, max_bad_fraction: 0.01), the first: "
        f"{tmp_path}/s.jsonl: line 301: " in (error(lines + "no json\n" * 4))
    )
    assert "'a': 1 of 301 rows are bad, and hold 9,000 of 15,601 bytes (57.69%" in error(
        lines + "x" * 9000 + "\n"
    )
    (tmp_path / "good.jsonl").write_text(lines)
    assert f"{tmp_path}/s.jsonl: not one good row in it, bad: 1, the" in error(
        "no json\n", max_bad_fraction=1
    )


# What made it


def test_training_json_says_what_made_the_tokenizer(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", speeches(3)) for i in range(2)]
    flags = [
        "--vocab-size",
        "300",
        "--source",
        *map(str, paths),
        "--output-dir",
        str(tmp_path / "t"),
    ]
    train_tokenizer.main([*flags, "--max-characters", "9000"])
    content = (tmp_path / "t" / "training.json").read_bytes()
    record = json.loads(content)
    (sources,) = record["sources"]
    assert sources["files"] == [{"name": str(path), "size": path.stat().st_size} for path in paths]
    assert (record["characters"], record["max_characters"], record["vocab_size"]) == (
        9000,
        9000,
        300,
    )
    assert record["command"].startswith(
        "python -m data_prep.train_tokenizer --vocab-size 300 --source "
    )
    assert record["versions"]["gigabpe"] == importlib.metadata.version("gigabpe")
    shutil.rmtree(tmp_path / "t")
    train_tokenizer.main([*flags, "--max-characters", "9000"])
    assert (tmp_path / "t" / "training.json").read_bytes() == content


def test_training_json_is_no_part_of_the_tokenizer(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tokenizer_dir, copy)
    (copy / "training.json").unlink()
    assert tokenizer_sha256(copy) == tokenizer_sha256(tokenizer_dir)
    train(copy, VOCAB_SIZE, write_jsonl(tmp_path / "other name.jsonl", speeches(10)))
    assert "already there, identical" in capsys.readouterr().out
    assert not (copy / "training.json").exists()


def test_a_file_named_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", speeches(1))
    (tmp_path / "link.jsonl").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for again in (
        path,
        Path("s.jsonl"),
        Path("./s.jsonl"),
        tmp_path / "link.jsonl",
        Path("*.jsonl"),
    ):
        assert "is named twice; name each file once" in train_error(
            tmp_path / "t", 300, path, again
        )

"""A data set that holds both ids of constant code says so when it is built and shown; others say
nothing.
"""

from pathlib import Path

import pytest
from support.prep_helpers import build, source, speeches, write_jsonl, write_mixture

from data_prep import show, train_tokenizer
from data_prep.tokenizer import byte_bpe

pytest_plugins = ("support.prep_fixtures",)


def tokenizer_without_padding(directory: Path, vocab_size: int) -> Path:
    """As byte_bpe made them before its last id was padding: the last merge has that id."""
    byte_bpe.write_documents(directory.with_name("documents"), speeches(10))
    merges = byte_bpe.learn_merges([directory.with_name("documents")], vocab_size + 1)
    vocab, used = byte_bpe.build_vocab(merges, vocab_size + 1)
    del vocab[byte_bpe.PAD_TOKEN]
    tokenizer = train_tokenizer.new_tokenizer(vocab, used, [byte_bpe.EOS_TOKEN])
    train_tokenizer.save(tokenizer, directory, {"eos_token": byte_bpe.EOS_TOKEN}, {})
    return directory


def said(
    tokenizer: Path, texts: list[str], home: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[str, str]:
    """What the build says on stderr, and what show prints."""
    write_jsonl(home / "s.jsonl", texts)
    build(write_mixture(home, tokenizer, [source("s", "s.jsonl", format="jsonl")]), home / "data")
    built = capsys.readouterr().err
    show.main([str(home / "data")])
    return built, capsys.readouterr().out


def test_both_ids_are_named_with_their_counts_and_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tokenizer_without_padding(tmp_path / "t", 512)
    built, shown = said(tokenizer, speeches(20), tmp_path, capsys)
    line = next(
        line
        for line in built.splitlines()
        if line.startswith("warning: ids 0 ('<|endoftext|>') and 511 ('")
    )
    assert "they occur 20 and " in line
    assert (
        "model.code_bits at the next divisor of model.d_model above 9, such as 16 at width 1,024"
        in line
    )
    assert line.removeprefix("warning: ") in shown


@pytest.mark.parametrize("case", ["ours", "an odd size", "the last id does not occur"])
def test_nothing_is_said_where_there_is_nothing_to_tell_apart(
    case: str, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = (
        ["0123456789 " * 9] * 9 + [f"{i}" for i in range(99)]
        if case.startswith("the last")
        else speeches(20)
    )
    tokenizer = (
        tokenizer_dir
        if case == "ours"
        else tokenizer_without_padding(tmp_path / "t", 511 + ("odd" not in case))
    )
    built, shown = said(tokenizer, texts, tmp_path, capsys)
    assert "one input" not in built + shown

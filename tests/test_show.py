"""`show` gives figures that can be recounted, and leads from a token back to its document."""

from pathlib import Path

import numpy as np
import pytest
from prep_helpers import decoded

from data_prep import show
from data_prep.errors import UserError
from data_prep.shards import ShardReader

pytest_plugins = ("prep_fixtures",)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    show.main(list(arguments))
    return capsys.readouterr().out


def test_the_table(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, str(dataset), "--samples", "0")
    manifest = ShardReader(dataset).manifest
    assert f"fingerprint  {manifest.fingerprint}" in out
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in out.splitlines() if line.startswith(("train", "val"))}
    for split, source, share in (
        ("train", "speeches", "75.00%"),
        ("train", "more", "25.00%"),
        ("validation", "more", ""),
    ):
        shards = manifest.shards_of(split, source)
        documents, tokens = sum(s.documents for s in shards), sum(s.tokens for s in shards)
        per_token = [sum(s.text_characters for s in shards), sum(s.text_bytes for s in shards)]
        expected = [f"{documents:,}", f"{tokens:,}", *(f"{n / (tokens - documents):.2f}" for n in per_token)]
        assert rows[split, source] == [*expected, share][: len(rows[split, source])]
        assert rows[split, source][4:] == [share] * bool(share)


def test_a_source_may_have_no_validation_documents() -> None:
    assert show.figures(()) == ("0", "0", "-", "-")


def test_columns_are_aligned() -> None:
    assert show.table([("a", "b", "n"), ("long", "x", "10"), ("z", "y", "5")]).splitlines() == [
        "a     b   n",
        "----  -  --",
        "long  x  10",
        "z     y   5",
    ]


def test_samples_are_the_beginnings_of_documents(
    dataset: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(capsys, str(dataset), "--samples", "3")
    lines = [line.removeprefix("  ").removesuffix("…") for line in out.splitlines() if line.startswith("  ")]
    assert len(lines) == 6
    beginnings = {show.one_line(text)[: show.SAMPLE_CHARACTERS] for text in texts}
    assert set(lines) <= beginnings | {text.rstrip() for text in beginnings}


def test_trace_names_the_document_of_every_token(dataset: Path) -> None:
    reader, documents = ShardReader(dataset), decoded(dataset)
    tokenizer = show.load_tokenizer(dataset / "tokenizer").reference
    for shard in reader.manifest.shards:
        index = reader.documents(shard)
        for document, offset in enumerate(index[:, 0].tolist()):
            out = show.trace(reader, tokenizer, f"{shard.path}:{offset}")
            row = int(index[document, 1])
            assert f"input      {shard.input}, row {row}\n" in out
            assert f"document   {document:,} of {shard.documents:,}" in out
            assert "its token 0 of" in out
            text = show.one_line(documents[shard.input, row])
            around = out.split("text       ⟦", 1)[1].replace("⟧", "", 1)
            assert text.startswith(around) or not text.isascii()  # a token may hold a part of a character


def test_trace_of_a_last_token(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = ShardReader(dataset).manifest.shards[0]
    out = shown(capsys, str(dataset), "--trace", f"{shard.path}:{shard.tokens - 1}")
    assert "'<|endoftext|>', id 0" in out
    assert out.rstrip().endswith("⟦<|endoftext|>⟧")
    short = f"{shard.split}/{shard.source}/{Path(shard.path).stem}"
    assert shown(capsys, str(dataset), "--trace", f"{short}:5") == shown(
        capsys, str(dataset), "--trace", f"{shard.path}:5"
    )


def test_bad_places(dataset: Path) -> None:
    shard = ShardReader(dataset).manifest.shards[0]
    for place, expected in (
        ("nowhere:0", "no such shard; expected SHARD:OFFSET, such as shards/train"),
        ("5", "no such shard"),
        (f"{shard.path}:{shard.tokens}", f"expected 0 to {shard.tokens - 1}"),
        (f"{shard.path}:-1", "offset '-1'"),
        (".npy:0", "shards end so; name one"),
    ):
        with pytest.raises(UserError, match=expected):
            show.main([str(dataset), "--trace", place])


def test_spread_is_even() -> None:
    class Fake:
        def __init__(self, documents: int) -> None:
            self.documents = documents

    shards = [Fake(2), Fake(0), Fake(2)]
    places = [(shards.index(shard), document) for shard, document in show.spread(shards, 4)]  # type: ignore[arg-type]
    assert places == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert list(show.spread([], 3)) == []
    assert len(list(show.spread(shards, 99))) == 4  # type: ignore[arg-type]


def test_ids_are_uint16(dataset: Path) -> None:
    reader = ShardReader(dataset)
    assert all(reader.tokens(shard).dtype == np.dtype("<u2") for shard in reader.manifest.shards)

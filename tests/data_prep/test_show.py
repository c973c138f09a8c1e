"""`show` gives figures that can be recounted, and leads from a token back to its document."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.prep_helpers import build, decoded, write_jsonl, write_mixture
from support.prep_helpers import source as mixture_source
from support.runs import REPOSITORY
from tokenizers import Tokenizer, decoders, models

from data_prep import show
from data_prep.errors import UserError
from data_prep.shards import ShardReader
from data_prep.view import columns, source_statistics, source_text, summary

pytest_plugins = ("support.prep_fixtures",)


def one_line(text: str) -> str:
    """Line ends as `show` writes them."""
    return text.replace("\r", "␍").replace("\n", "⏎")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    show.main(list(arguments))
    return capsys.readouterr().out


def test_the_table(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, str(dataset), "--samples", "0")
    manifest = ShardReader(dataset).manifest
    assert f"fingerprint  {manifest.fingerprint}" in out
    rows = {
        tuple(line.split()[:2]): line.split()[2:]
        for line in out.splitlines()
        if line.startswith(("train", "val"))
    }
    for split, source, share in (
        ("train", "speeches", "75.00%"),
        ("train", "more", "25.00%"),
        ("validation", "more", ""),
    ):
        shards = manifest.shards_of(split, source)
        documents, tokens = sum(s.documents for s in shards), sum(s.tokens for s in shards)
        per_token = [sum(s.text_characters for s in shards), sum(s.text_bytes for s in shards)]
        expected = [
            f"{documents:,}",
            f"{tokens:,}",
            *(f"{n / (tokens - documents):.2f}" for n in per_token),
        ]
        assert rows[split, source] == [*expected, share][: len(rows[split, source])]
        assert rows[split, source][4:] == [share] * bool(share)


def test_a_source_may_have_no_validation_documents() -> None:
    none = summary.total(())
    assert (none.documents, none.tokens) == (0, 0)
    assert (none.characters_per_token, none.bytes_per_token) == (0.0, 0.0)


def test_columns_are_aligned() -> None:
    assert columns.table([("a", "b", "n"), ("long", "x", "10"), ("z", "y", "5")]).splitlines() == [
        "a     b   n",
        "----  -  --",
        "long  x  10",
        "z     y   5",
    ]


def block(out: str, source: str) -> dict[str, list[str]]:
    """What is said of a source: the lines of each fact, by name."""
    facts: dict[str, list[str]] = {}
    for line in out.split(f"\n\n{source}\n")[1].split("\n\n")[0].splitlines():
        name, value = line[2:13].strip(), line[13:]
        facts.setdefault(name or list(facts)[-1], []).append(value)
    return facts


def ids_of(reader: ShardReader, source: str) -> tuple[list[int], list[int]]:
    """The length of every document, and every id, of a source in both splits: counted one by
    one.
    """
    ids = [
        i
        for shard in reader.manifest.shards
        if shard.source == source
        for i in reader.tokens(shard).tolist()
    ]
    lengths, length = [], 0
    for i in ids:
        length += 1
        if i == reader.manifest.eos_id:
            lengths.append(length - 1)
            length = 0
    return lengths, ids


@pytest.mark.parametrize("name", ["speeches", "more"])
def test_figures_of_a_source_can_be_recounted(
    dataset: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = ShardReader(dataset)
    (lengths, ids), tokenizer = ids_of(reader, name), show.load_tokenizer(dataset / "tokenizer")
    facts = block(shown(capsys, str(dataset)), name)
    assert facts["lengths"][0].startswith(
        f"median {np.median(lengths):,.0f} tokens, longest {max(lengths):,} ("
    )
    bins = Counter(length.bit_length() for length in lengths)
    rows = [
        re.fullmatch(r" *([\d,-]+) +([\d,]+) +([\d.]+)%(?:  ([█▏▎▍▌▋▊▉]+))?", line)
        for line in facts["lengths"][1:]
    ]
    spans = [
        f"{1 << power >> 1:,}-{(1 << power) - 1:,}" for power in range(min(bins), max(bins) + 1)
    ]
    assert [row and row[1] for row in rows] == [span.removeprefix("1-") for span in spans]
    assert [row and int(row[2].replace(",", "")) for row in rows] == [
        bins[i] for i in range(min(bins), max(bins) + 1)
    ]
    assert max(len(row[4] or "") for row in rows if row) == source_text.BAR_CHARACTERS
    counts, unseen = Counter(ids), 512 - len(set(ids))
    assert facts["never seen"] == [f"{unseen:,} of 512 ids ({unseen / 512:.1%})"]
    assert tokenizer.token_bytes
    in_bytes = sum(
        len(token) == 1 and token[0] >= 0x80
        for token in tokenizer.token_bytes.take(ids).to_pylist()
    )
    assert in_bytes > 0 or name == "more"
    assert facts["raw bytes"][0].startswith(f"{in_bytes / len(ids):.3%} of tokens")
    cells = [
        cell
        for line in facts["commonest"]
        for cell in re.findall(r" *(\d+) (.{14}) +([\d.]+%)", line)
    ]
    assert len(cells) == 20
    assert [share for _, _, share in cells] == [
        f"{n / len(ids):.2%}" for _, n in counts.most_common(20)
    ]
    for i, text, share in cells:
        assert share == f"{counts[int(i)] / len(ids):.2%}"
        assert (
            text.strip(" …")
            in repr(tokenizer.reference.decode([int(i)], skip_special_tokens=False))
            or text[0] == "<"
        )
    assert facts["left out"] == ["0 empty documents, 0 bad ones"]
    assert "counted" not in facts


def test_a_part_of_a_large_source_is_counted_and_that_is_said(
    dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_statistics, "PIECE_TOKENS", 100)
    whole = block(shown(capsys, str(dataset)), "speeches")
    monkeypatch.setattr(source_statistics, "COUNTED_TOKENS", 6_000)
    part = block(shown(capsys, str(dataset)), "speeches")
    tokens = len(ids_of(ShardReader(dataset), "speeches")[1])
    match = re.match(f"([\\d,]+) of {tokens:,} tokens, evenly spread; ", part["counted"][0])
    assert match
    assert 5_000 < int(match[1].replace(",", "")) <= 6_100
    assert part["lengths"] == whole["lengths"]
    assert part["commonest"][0].split()[:2] == whole["commonest"][0].split()[:2]
    reader = ShardReader(dataset)
    shards = [shard for shard in reader.manifest.shards if shard.source == "speeches"]
    each = [int(source_statistics.count_ids(reader, [shard]).sum()) for shard in shards]
    assert min(each) > 2_000  # every shard has its part


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=50))
def test_the_histogram_holds_every_document_once(lengths: list[int]) -> None:
    lines = list(source_text.histogram(np.array(lengths)))
    total = 0
    for line in lines:
        span, number = line.replace(",", "").split()[:2]
        first, last = int(span.split("-")[0]), int(span.split("-")[-1])
        assert int(number) == sum(first <= length <= last for length in lengths)
        total += int(number)
    assert total == len(lengths)
    assert "█" in lines[0] + lines[-1] or len(lines) > 2
    assert all(len(line) <= 100 for line in lines)


def test_raw_bytes_of_a_byte_fallback_tokenizer() -> None:
    vocab = {
        "<unk>": 0,
        "<0x41>": 1,
        "<0x80>": 2,
        "<0xFF>": 3,
        "é": 4,
        "Ģ": 5,
        "\ufffd": 6,
        "<0x800>": 7,
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert sorted(source_statistics.raw_bytes(tokenizer)) == [2, 3]


def test_raw_bytes_of_a_byte_level_tokenizer(tokenizer_dir: Path) -> None:
    tokenizer = show.load_tokenizer(tokenizer_dir).reference
    text = "".join(map(chr, range(0x80, 0x800)))  # two bytes each
    raw = set(source_statistics.raw_bytes(tokenizer))
    assert len(raw) == 128
    assert raw >= {i for i in tokenizer.encode(text).ids if len(tokenizer.id_to_token(i)) == 1}
    assert not raw & set(tokenizer.encode("".join(map(chr, range(0x80)))).ids)


def test_what_was_left_out_and_the_tokenizer_s_special_tokens(
    tokenizer_dir: Path, tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [*texts, "", ""])
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b"no JSON\n" * 5)
    sources = [mixture_source("a", "a.jsonl", format="jsonl")]
    manifest = build(
        write_mixture(tmp_path, tokenizer_dir, sources, on_bad_document="skip", max_bad_fraction=1),
        tmp_path / "dataset",
    )
    out = shown(capsys, str(tmp_path / "dataset"))
    left_out = block(out, "a")["left out"]
    assert left_out[0] == "2 empty documents, 5 bad ones"
    rows = [
        f"a.jsonl, row {len(texts) + 2 + i}: {manifest.bad_documents[i].reason}" for i in range(3)
    ]
    assert left_out[1:] == [columns.cut(row, columns.LINE_CHARACTERS) for row in rows]
    assert "\nspecial      <pad> = 511, <|endoftext|> = 0\n" in out
    assert "\nseparator    eos after every document: <|endoftext|> = 0\n" in out


def test_epochs_and_a_warning_of_many(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = ShardReader(dataset).manifest
    train_tokens = 4 * manifest.tokens("train", "speeches")
    out = shown(capsys, str(dataset), "--train-tokens", f"{train_tokens:e}")
    lines = [line for line in out.splitlines() if line.startswith("epochs")]
    assert len(lines) == 2
    assert (
        f"speeches: {manifest.epochs(train_tokens)['speeches']:.2f} over {train_tokens:,}"
        in lines[0]
    )
    assert ["above 4" in line for line in lines] == [
        n > 4 for n in manifest.epochs(train_tokens).values()
    ]
    assert "epochs" not in shown(capsys, str(dataset))
    for bad in ("nan", "inf", "0", "-5", "1e400", "many"):
        with pytest.raises(
            UserError, match=f"--train-tokens: {bad}: expected a whole number of 1 or more"
        ):
            show.main([str(dataset), f"--train-tokens={bad}"])


def test_lines_fit_100_columns_but_for_samples_and_advice(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(capsys, str(dataset), "--samples", "0").replace(str(dataset), "")
    assert max(map(len, out.splitlines())) <= 100


def test_samples_are_the_beginnings_of_documents(
    dataset: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(capsys, str(dataset), "--samples", "3")
    samples = [
        block.splitlines()
        for block in out.split("\n\n")
        if re.match("(train|validation) · ", block)
    ]
    lines = [text.removeprefix("  ").removesuffix("…") for _, text in samples]
    assert len(lines) == 6
    beginnings = {one_line(text)[: show.SAMPLE_CHARACTERS] for text in texts}
    assert set(lines) <= beginnings | {text.rstrip() for text in beginnings}


def test_trace_names_the_document_of_every_token(dataset: Path) -> None:
    reader, documents = ShardReader(dataset), decoded(dataset)
    tokenizer = show.load_tokenizer(dataset / "tokenizer").reference
    for shard in reader.manifest.shards:
        index = reader.documents(shard)
        for document, offset in enumerate(index[:, 0].tolist()):
            out = show.trace(reader, tokenizer, f"{shard.path}:{offset}")
            origin, row = shard.origin(int(index[document, 1]))
            assert f"\ninput        {origin}, row {row}\n" in out
            assert f"\ndocument     {document:,} of {shard.documents:,}" in out
            assert "its token 0 of" in out
            text = one_line(documents[origin, row])
            around = out.split("text         ⟦", 1)[1].replace("⟧", "", 1)
            # a token may hold a part of a character
            assert text.startswith(around) or not text.isascii()


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


def test_the_readme_s_commands_and_what_they_print(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (REPOSITORY / "data_prep" / "README.md").read_text(encoding="utf-8")
    commands = {
        command
        for _, command in re.findall(
            r"(^|`|\$ )python -m data_prep\.show dataset([^`\n]*)", readme, re.MULTILINE
        )
    }
    assert len(commands) == 4
    outputs = {command: shown(capsys, str(dataset), *command.split()) for command in commands}
    blocks = re.findall(r"```\n(?:\$ [^\n]*\n)?((?:token  |speeches\n).*?)```", readme, re.DOTALL)
    assert len(blocks) == 2
    for example in blocks:
        names = [line[:13] for line in example.splitlines() if line[2:3].isalpha()]
        assert len(names) > 4
        assert any(all(f"\n{name}" in f"\n{out}" for name in names) for out in outputs.values())

"""A tokenizer gives the ids that we say: where encoders differ, where text gives special ids,
where text is lost.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.prep_helpers import (
    build,
    build_command,
    build_error,
    contents,
    decoded,
    needs_mpi,
    run,
    source,
    speeches,
    write_mixture,
    write_parquet,
)
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from data_prep import show
from data_prep.building import unit_records
from data_prep.building.unit_shards import ended
from data_prep.errors import UserError
from data_prep.manifest import Manifest, TokenizerLoss, load_manifest
from data_prep.shards import ShardReader
from data_prep.tokenizer.doubtful_characters import (
    Doubtful,
    is_newer_than_python,
    normalized_otherwise,
)
from data_prep.tokenizer.encode import new_encoder, reference_ids
from data_prep.tokenizer.load import load_tokenizer
from data_prep.tokenizer.traits import why_not_gigatoken

pytest_plugins = ("support.prep_fixtures",)

NEWER = "\u20c1"  # of Unicode 17
NEWER_LETTERS = "\U000323b0\U0001e6c0\ua7ce\u0c5c"  # of Unicode 17 too: letters to whom knows them
# of classes that older tables lack
NEW_MARKS = "a\u0301\u1acf\u0316 b\u0898\u0316 \u0d4b\u0d3b\u09fe\u0316"


def byte_level(**more: Any) -> Tokenizer:
    """A byte-level BPE of a few hundred ids; keyword arguments set its parts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*speeches(3), "foo_bar foo_bare"], trainer)
    for name, value in more.items():
        setattr(tokenizer, name, value)
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path, **config: Any) -> Path:
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **config}))
    return directory


def agree(directory: Path, texts: list[str]) -> bool:
    """Whether what a build encodes with gives the reference's ids."""
    tokenizer = load_tokenizer(directory)
    ids, offsets = new_encoder(tokenizer, prefer="gigatoken").encode(
        pa.array(texts, pa.large_string())
    )
    rows = [ids[offsets[i] : offsets[i + 1]].tolist() for i in range(len(texts))]
    return rows == [reference_ids(tokenizer, text).tolist() for text in texts]


ADDED = {
    "single_word": AddedToken("foo_bar", single_word=True, special=False),
    "lstrip": AddedToken("foo_bar", lstrip=True, special=False),
    "rstrip": AddedToken("foo_bar", rstrip=True, special=False),
}
TEXTS = [
    "foo_bare foo_bar xfoo_bar",
    " \n foo_bar \t foo_bar",
    "e\u0301 foo_bar\u0301 foo\u0301_bar",
    "Congress",
]


@pytest.mark.parametrize("kind", ADDED)
def test_added_tokens_that_gigatoken_reads_otherwise_mean_fallback(
    kind: str, tmp_path: Path
) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([ADDED[kind]])
    directory = save(tokenizer, tmp_path / "t")
    reason = new_encoder(load_tokenizer(directory), prefer="gigatoken").fallback_reason
    assert reason
    assert f"({kind} of the added token 'foo_bar')" in reason
    assert agree(directory, TEXTS)


@pytest.mark.parametrize("content", ["foo_bar", "foo", "  ", "\n\n"])
def test_added_tokens_beside_a_normalizer(content: str, tmp_path: Path) -> None:
    tokenizer = byte_level(normalizer=normalizers.NFC())
    tokenizer.add_tokens([content])
    directory = save(tokenizer, tmp_path / "t")
    assert new_encoder(load_tokenizer(directory), prefer="gigatoken").is_reference == (
        not content.isspace()
    )
    assert agree(directory, TEXTS)


def test_merges_that_spell_a_byte_mean_fallback(tmp_path: Path) -> None:
    parts = ["<", "0", "x", "A", ">", "<0", "<0x", "<0x0", "<0x0A", "<0x0A>", "</s>", "a"]
    merges = [("<", "0"), ("<0", "x"), ("<0x", "0"), ("<0x0", "A"), ("<0x0A", ">")]
    vocab = {token: number for number, token in enumerate(parts)}
    model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True)
    directory = save(Tokenizer(model), tmp_path / "t")
    assert "merges that spell" in str(
        new_encoder(load_tokenizer(directory), prefer="gigatoken").fallback_reason
    )
    assert agree(directory, ["<0x0A>", "a\na", "<0x0A"])
    without = {"model": {"type": "BPE", "merges": ["< 0", "a b"], "byte_fallback": True}}
    assert why_not_gigatoken(Tokenizer(model), lambda: without) is None


@pytest.mark.parametrize("name", ["dropout"])
def test_dropout_is_not_used_and_that_is_said(name: str, tmp_path: Path) -> None:
    tokenizer = byte_level()
    plain = save(tokenizer, tmp_path / "plain")
    tokenizer.model.dropout = 0.9
    directory = save(tokenizer, tmp_path / "t")
    assert [note for note in load_tokenizer(directory).notes if f"its {name}" in note]
    assert agree(directory, speeches(2))
    rows = [
        reference_ids(load_tokenizer(path), speeches(1)[0]).tolist() for path in (directory, plain)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
def test_characters_newer_than_the_tables_get_the_reference_s_ids(
    normalizer: Any, tmp_path: Path
) -> None:
    """Of all documents, not of the sample: so the build's ids are those of `--encoder
    tokenizers`.
    """
    tokenizer = byte_level(**({"normalizer": normalizer} if normalizer else {}))
    directory = save(tokenizer, tmp_path / "t")
    words = [f"a{c}1{c}b {c}" for c in NEWER + NEWER_LETTERS]
    texts = [*speeches(5), *words, NEW_MARKS, "plain", *(c + " x" for c in NEW_MARKS.split())]
    loaded = load_tokenizer(directory)
    assert agree(directory, texts)
    found = set(loaded.doubtful.find(pa.array(texts, pa.large_string())).tolist())
    assert found >= {texts.index(word) for word in words}
    assert not found & {*range(5), texts.index("plain")}
    write_parquet(tmp_path / "a.parquet", texts)
    mixture = write_mixture(tmp_path, directory, [source("a", "a.parquet")])
    assert build(mixture, tmp_path / "fast") == build(
        mixture, tmp_path / "slow", "--encoder", "tokenizers"
    )


@settings(max_examples=200)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=6
    )
)
def test_doubtful_characters_are_found_in_every_text(texts: list[str]) -> None:
    for others in (frozenset(), normalized_otherwise("NFC")):
        array = pa.array(["\u20c1", *texts], pa.large_string()).slice(1)
        held = [
            any(ord(c) in others or is_newer_than_python(ord(c)) for c in text) for text in texts
        ]
        assert Doubtful(others).find(array).tolist() == [
            i for i, is_held in enumerate(held) if is_held
        ]


def test_common_text_holds_nothing_doubtful() -> None:
    texts = [
        "It\u2019s \u201cfine\u201d \u2014 \u20ac5 \u00e9 \U0001f600",
        "日本語の文章。",
        "한국어 텍스트",
        "Привет",
    ]
    assert not len(Doubtful(frozenset()).find(pa.array(texts, pa.large_string())))


def unigram(*pieces: str) -> Tokenizer:
    letters = sorted({c for text in speeches(3) for c in text} | {"/", "<", ">", "s"})
    vocab = [
        ("<unk>", 0.0),
        *((piece, -1.0) for piece in pieces),
        *((letter, -5.0) for letter in letters),
    ]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def word_level() -> Tokenizer:
    words = sorted(
        {word for text in speeches(3) for word in text.split()} | {"end", "</s>", "[unk]"}
    )
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[unk]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def ignoring_merges() -> Tokenizer:
    tokenizer = byte_level(
        pre_tokenizer=pre_tokenizers.Sequence(
            [
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    )
    tokenizer.model.ignore_merges = True
    return tokenizer


GIVING_SPECIAL = {
    "unigram": lambda: unigram("</s>"),
    "word level": word_level,
    "ignored merges": ignoring_merges,
}


@pytest.mark.parametrize("kind", GIVING_SPECIAL)
def test_a_text_that_gives_a_special_id_is_a_bad_document(kind: str, tmp_path: Path) -> None:
    directory = save(GIVING_SPECIAL[kind](), tmp_path / "t")
    assert load_tokenizer(directory).ids_of_no_text
    texts = [" ".join(text.split()) for text in speeches(30, 600)]
    texts[11] = "an end </s> within"
    texts[23] = "</s> </s>"
    write_parquet(tmp_path / "a.parquet", texts)
    sources = [source("a", "a.parquet")]
    allowed = {"allow_lossy_tokenizer": True}
    error = build_error(write_mixture(tmp_path, directory, sources, **allowed), tmp_path / "out")
    assert "a.parquet: row 11: its text gives the special token '</s>' (id " in error
    assert "on_bad_document: skip" in error
    more = {"on_bad_document": "skip", "max_bad_fraction": 0.1}
    mixture = write_mixture(tmp_path, directory, sources, **more, **allowed)
    manifest = build(mixture, tmp_path / "out")
    assert [bad.row for bad in manifest.bad_documents] == [11, 23]
    assert manifest.sources[0].bad_documents == 2
    assert {row for _, row in decoded(tmp_path / "out")} == set(range(30)) - {11, 23}


def test_special_tokens_that_no_text_gives_cost_nothing(tokenizer_dir: Path) -> None:
    assert not load_tokenizer(tokenizer_dir).ids_of_no_text


def test_what_keeps_all_text_is_known(tokenizer_dir: Path, tmp_path: Path) -> None:
    assert load_tokenizer(tokenizer_dir).keeps_all_text
    prefix = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for number, other in enumerate(
        (
            unigram(),
            word_level(),
            ignoring_merges(),
            byte_level(normalizer=normalizers.NFC()),
            byte_level(pre_tokenizer=prefix),
            byte_level(pre_tokenizer=pre_tokenizers.Sequence([prefix])),
        )
    ):
        assert not load_tokenizer(save(other, tmp_path / str(number))).keeps_all_text


def lossy_mixture(base: Path, **more: Any) -> Path:
    """One source whose text a tokenizer of the words of three speeches loses in part."""
    if not (base / "t").exists():
        save(word_level(), base / "t")
        write_parquet(base / "a.parquet", speeches(40, 800))
        write_parquet(base / "b.parquet", speeches(20, 500))
    return write_mixture(
        base, base / "t", [source("a", "a.parquet"), source("b", "b.parquet")], **more
    )


def test_a_lossy_tokenizer_is_refused_unless_it_is_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = build_error(lossy_mixture(tmp_path), tmp_path / "out")
    assert "of tokens are unk; " in error
    assert "sampled documents do not decode to their text; at most 1% may be" in error
    assert "set allow_lossy_tokenizer: true in" in error
    before = {path: path.stat().st_ino for path in (tmp_path / "out" / "shards").rglob("*.npy")}
    manifest = build(lossy_mixture(tmp_path, allow_lossy_tokenizer=True), tmp_path / "out")
    assert before == {
        path: path.stat().st_ino for path in (tmp_path / "out" / "shards").rglob("*.npy")
    }
    loss = manifest.loss
    assert loss
    assert loss.unknown_share > 0.01
    assert loss.changed_documents == loss.documents >= 2
    said = f"lossy        {loss}"
    assert said in capsys.readouterr().out
    show.main([str(tmp_path / "out"), "--samples", "0"])
    out = capsys.readouterr().out
    assert said in out
    assert f"  lossy      {manifest.sources[0].loss}" in out
    assert load_manifest(tmp_path / "out") == manifest


def test_the_loss_can_be_recounted(tmp_path: Path) -> None:
    manifest = build(lossy_mixture(tmp_path, allow_lossy_tokenizer=True), tmp_path / "out")
    units = [json.loads(path.read_bytes()) for path in (tmp_path / "out" / "units").rglob("*.json")]
    for name in ("documents", "tokens", "unknown_tokens", "changed_documents"):
        assert vars(manifest.loss)[name] == sum(unit["loss"][name] for unit in units)
    assert manifest.loss
    reader = ShardReader(tmp_path / "out")
    unknown = load_tokenizer(tmp_path / "t").unknown_id
    assert manifest.loss.unknown_tokens == sum(
        int((reader.tokens(s) == unknown).sum()) for s in manifest.shards
    )
    assert manifest.loss.tokens == sum(shard.tokens - shard.documents for shard in manifest.shards)
    # few enough for all
    assert manifest.loss.documents == sum(shard.documents for shard in manifest.shards) == 60


@pytest.mark.parametrize("bad_rows", [[], [150], [3, 40, 77, 120, 199]])
def test_unk_in_any_document_counts(bad_rows: list[int], tmp_path: Path) -> None:
    """Whether the sample holds it or not; the second case is just below what is refused."""
    save(word_level(), tmp_path / "t")
    known = " ".join(speeches(1)[0].split()[:50])
    texts = [
        f"{known} {known.split()[i % 50]}{' nowhere' * (100 if i in bad_rows else 0)}"
        for i in range(200)
    ]
    write_parquet(tmp_path / "a.parquet", texts)
    mixture = write_mixture(tmp_path, tmp_path / "t", [source("a", "a.parquet")])
    share = 100 * len(bad_rows) / (51 * 200 + 100 * len(bad_rows))
    if share > 0.01:
        assert f"{share:.1%} of tokens are unk; " in build_error(mixture, tmp_path / "out")
        return
    loss = build(mixture, tmp_path / "out").loss
    assert (loss.unknown_tokens if loss else 0) == 100 * len(bad_rows)
    assert loss is None or 64 <= loss.documents < 100


def test_records_with_a_loss_of_few_documents_are_made_again(tmp_path: Path) -> None:
    save(word_level(), tmp_path / "t")
    write_parquet(tmp_path / "a.parquet", speeches(40, 800))
    mixture = write_mixture(
        tmp_path, tmp_path / "t", [source("a", "a.parquet")], allow_lossy_tokenizer=True
    )
    manifest = build(mixture, tmp_path / "out")
    (record,) = (tmp_path / "out" / "units" / "a").glob("*.json")
    whole = record.read_bytes()
    of_one = {"documents": 1, "tokens": 9, "unknown_tokens": 0, "changed_documents": 1}
    content = {name: value for name, value in json.loads(whole).items() if name != "seal"} | {
        "loss": of_one
    }
    seal = unit_records._seal(signature_of(mixture), content)
    record.write_text(json.dumps({"seal": seal, **content}, indent=1) + "\n")
    (tmp_path / "out" / "manifest.json").unlink()
    assert build(mixture, tmp_path / "out") == manifest
    assert record.read_bytes() == whole


@needs_mpi
def test_the_loss_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    mixture = lossy_mixture(tmp_path, allow_lossy_tokenizer=True)
    for ranks in (1, 2):
        result = run(
            build_command(mixture, tmp_path / f"out-{ranks}", ranks=ranks, unit_bytes=4000)
        )
        assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "out-1") == contents(tmp_path / "out-2")


def test_a_tokenizer_that_loses_nothing_leaves_the_manifest_as_it_was(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    assert manifest.loss is None
    assert b'"loss"' not in (dataset / "manifest.json").read_bytes()


def test_records_of_earlier_versions_still_count(
    tmp_path: Path, tokenizer_dir: Path, texts: list[str]
) -> None:
    write_parquet(tmp_path / "a.parquet", texts)
    mixture = write_mixture(tmp_path, tokenizer_dir, [source("a", "a.parquet")])
    manifest = build(mixture, tmp_path / "out")
    (record,) = (tmp_path / "out" / "units" / "a").glob("*.json")
    content = json.loads(record.read_bytes())
    signature = signature_of(mixture)
    assert content.pop("seal") == unit_records._seal(signature, content)
    del content["loss"]
    record.write_text(
        json.dumps({"seal": unit_records._seal(signature, content), **content}, indent=1) + "\n"
    )
    before = record.stat().st_ino
    (tmp_path / "out" / "manifest.json").unlink()
    assert build(mixture, tmp_path / "out") == manifest
    assert record.stat().st_ino == before


def signature_of(mixture: Path) -> str:
    from data_prep.building.build_plan import make_plan
    from data_prep.building.mixture import load_mixture
    from data_prep.building.unit_records import unit_signature

    loaded = load_mixture(mixture)
    tokenizer = load_tokenizer(loaded.tokenizer_dir)
    (unit,) = make_plan(loaded, tokenizer).units
    return unit_signature(unit, tokenizer.sha256, loaded.validation_fraction)


@pytest.mark.parametrize("length", [0, 3, 2000])
def test_every_document_is_ended_whatever_its_length(length: int) -> None:
    documents = [list(range(1, size + 1)) for size in (length, 0, length + 1, length)]
    offsets = np.cumsum([0, *map(len, documents)])
    ids = np.array([i for document in documents for i in document], np.uint32)
    tokens = ended(ids, offsets, 7)
    assert tokens.dtype == np.dtype("<u2")
    assert tokens.tolist() == [i for document in documents for i in [*document, 7]]


def test_losses_add_up() -> None:
    one = TokenizerLoss(documents=1, tokens=10, unknown_tokens=1, changed_documents=1)
    assert (
        str(one + one)
        == "10.0% of tokens are unk; 2 of 2 sampled documents do not decode to their text"
    )
    assert isinstance(one, TokenizerLoss)
    assert Manifest.loss


def test_code_that_a_tokenizer_brings_along_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    auto_map = {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}
    directory = save(byte_level(), tmp_path / "t", auto_map=auto_map)
    (directory / "mine.py").write_text("raise SystemExit('it ran')\n")
    write_parquet(tmp_path / "a.parquet", speeches(20))
    build(write_mixture(tmp_path, directory, [source("a", "a.parquet")]), tmp_path / "out")
    assert "note: " in (err := capsys.readouterr().err)
    assert "auto_map is left out of tokenizer_config.json" in err
    copy = tmp_path / "out" / "tokenizer"
    assert sorted(path.name for path in copy.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert b"auto_map" not in (copy / "tokenizer_config.json").read_bytes()
    ShardReader(tmp_path / "out").check_files()
    (directory / "tokenizer.json").unlink()
    with pytest.raises(
        UserError, match=r"asks for code of its own \(auto_map\), which is never run"
    ):
        load_tokenizer(directory)


def test_a_tokenizer_that_is_a_link_keeps_what_it_leads_to(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    write_parquet(tmp_path / "a.parquet", speeches(20))
    mixture = write_mixture(tmp_path, tokenizer_dir, [source("a", "a.parquet")])
    build(mixture, tmp_path / "out")
    other = tmp_path / "other"
    (tmp_path / "out" / "tokenizer").rename(other)
    (other / "precious").write_text("mine")
    (tmp_path / "out" / "tokenizer").symlink_to(other)
    (tmp_path / "out" / "manifest.json").unlink()
    build(mixture, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer").is_symlink()
    assert (other / "precious").read_text() == "mine"
    ShardReader(tmp_path / "out").check_files()

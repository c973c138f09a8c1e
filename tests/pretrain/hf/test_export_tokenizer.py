"""With the tokenizer of an export, AutoTokenizer gives a text exactly the ids that the shards
hold for it.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from support.kinds_of_tokenizers import IDS_NAME, KINDS, Kind, differences, write_tokenizer
from support.prep_helpers import NASTY_TEXTS, build, source, speeches, write_mixture, write_parquet
from support.untrained_runs import save_untrained_run
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_prep.errors import UserError
from data_prep.manifest import Manifest, Source, TokenizerLoss
from data_prep.shards import ShardReader, read_tokenizer
from data_prep.tokenizer.load import load_tokenizer
from pretrain.checkpoint.find import load_for_reading
from pretrain.data.staging import staged
from pretrain.export_hf import main
from pretrain.hf.export import special_token_ids
from pretrain.hf.ids import (
    HARD_TEXTS,
    OF_A_SOURCE,
    SAMPLED_TOKENS,
    check_ids,
    hard_texts,
    texts_of_every_source,
)
from pretrain.hf.tokenizer import ExportedTokenizer, as_exported
from pretrain.run.saving import about_data
from pretrain.view.templates import render

pytest_plugins = ("support.prep_fixtures",)

CONFIGS = {  # of which AutoTokenizer takes the class into account
    "gpt_neox": {"model_type": "gpt_neox"},
    "tablefree": {
        "model_type": "tablefree",
        "auto_map": {"AutoConfig": "modeling_tablefree.TableFreeConfig"},
    },
}


def copy_tokenizer(
    source: Path, export: Path, seq_len: int, *, names_unknown: bool = False
) -> ExportedTokenizer:
    exported = as_exported(read_tokenizer(source), source, seq_len, names_unknown=names_unknown)
    exported.write_to(export)
    return exported


SPELLED = "<s> begin and </s> end"


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_gives_the_ids_of_the_data(kind: str, tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "tokenizer", KINDS[kind], speeches(3))
    in_the_data = load_tokenizer(source)
    for form, config in CONFIGS.items():
        export = tmp_path / form
        export.mkdir()
        (export / "config.json").write_text(json.dumps(config))
        exported = copy_tokenizer(source, export, 32, names_unknown=form == "gpt_neox")
        asked = [*hard_texts(exported.reference), *speeches(4)[3:], *NASTY_TEXTS, SPELLED]
        ids = [
            [text, in_the_data.reference.encode(text, add_special_tokens=False).ids]
            for text in asked
        ]
        about = {"ids": ids, "roles": exported.roles, "size": in_the_data.vocab_size}
        (export / IDS_NAME).write_text(json.dumps(about))
        assert differences(export) == []
        assert exported.roles["eos_token"] == in_the_data.eos_id
        # as engines other than transformers read it
        plain = Tokenizer.from_file(str(export / "tokenizer.json"))
        plain.encode_special_tokens = True
        assert all(plain.encode(text).ids == expected for text, expected in ids)
        assert "auto_map" not in (export / "tokenizer_config.json").read_text()
        assert AutoTokenizer.from_pretrained(export, trust_remote_code=False).model_max_length == 32


def test_an_export_gives_the_ids_that_the_shards_hold(tmp_path: Path, texts: list[str]) -> None:
    source_dir = write_tokenizer(tmp_path / "tokenizer", KINDS["digits of gpt2"], speeches(3))
    documents = [*texts, SPELLED]
    write_parquet(tmp_path / "a.parquet", documents)
    build(write_mixture(tmp_path, source_dir, [source("a", "a.parquet")]), tmp_path / "dataset")
    (tmp_path / "export").mkdir()
    copy_tokenizer(tmp_path / "dataset" / "tokenizer", tmp_path / "export", 32)
    exported = AutoTokenizer.from_pretrained(tmp_path / "export", trust_remote_code=False)
    reader, seen = ShardReader(tmp_path / "dataset"), 0
    for shard in reader.manifest.shards:
        for number in range(shard.documents):
            place, (_, row) = reader.document(shard, number)
            ids = reader.tokens(shard)[place.start : place.stop - 1].tolist()
            assert exported.encode(documents[row], split_special_tokens=True) == ids
            seen += 1
    assert seen == len(documents)


def test_special_tokens_are_special_in_an_export(tokenizer_dir: Path, tmp_path: Path) -> None:
    copy_tokenizer(tokenizer_dir, tmp_path, 32)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    # as trl marks the end of each text
    ids = exported(f"Fellow citizens{exported.eos_token}")["input_ids"]
    assert ids == [*exported("Fellow citizens")["input_ids"], exported.eos_token_id]


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_comes_along_and_keeps_its_special_tokens(
    place: str, tmp_path: Path, texts: list[str]
) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    in_config = place == "tokenizer_config.json"
    kind = Kind(
        change=KINDS["template"].change,
        config={"chat_template": template} if in_config else {},
        files={} if in_config else {place: template},
    )
    tokenizer = write_tokenizer(tmp_path / "tokenizer", kind, speeches(3))
    write_parquet(tmp_path / "a.parquet", texts)
    build(write_mixture(tmp_path, tokenizer, [source("a", "a.parquet")]), tmp_path / "dataset")
    (tmp_path / "export").mkdir()
    copy_tokenizer(tmp_path / "dataset" / "tokenizer", tmp_path / "export", 32)
    exported = AutoTokenizer.from_pretrained(tmp_path / "export", trust_remote_code=False)
    ids = exported.apply_chat_template([{"role": "user", "content": "Congress"}], return_dict=False)
    assert ids == [1, *exported.encode("Congress"), 2]


def test_of_our_own_tokenizer_only_the_configuration_changes(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    exported = copy_tokenizer(tokenizer_dir, tmp_path, 32)
    assert exported.left_out == ()
    assert (tmp_path / "tokenizer.json").read_bytes() == (
        tokenizer_dir / "tokenizer.json"
    ).read_bytes()
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_bytes())
    assert config.pop("split_special_tokens") is True
    new = {"model_max_length": 32, "model_input_names": ["input_ids", "attention_mask"]}
    assert json.loads((tmp_path / "tokenizer_config.json").read_bytes()) == config | new


def test_what_is_exported_is_exported_the_same_again(tmp_path: Path) -> None:
    for kind in KINDS:
        tokenizer = write_tokenizer(tmp_path / kind, KINDS[kind], speeches(2))
        once = as_exported(read_tokenizer(tokenizer), tokenizer, 32, names_unknown=True)
        again = as_exported(once.files, tokenizer, 32, names_unknown=True)
        assert (again.files, again.left_out) == (once.files, ())


def test_the_end_token_is_named_as_unknown_where_asked_and_none_is_named(tmp_path: Path) -> None:
    for kind, unknown in (("plain", "</s>"), ("unknown is a word", "\u0120the")):
        tokenizer = write_tokenizer(tmp_path / kind, KINDS[kind], speeches(2))
        files = read_tokenizer(tokenizer)
        assert as_exported(files, tokenizer, 32, names_unknown=True).roles[
            "unk_token"
        ] == Tokenizer.from_file(str(tokenizer / "tokenizer.json")).token_to_id(unknown)
    assert "unk_token" not in as_exported(read_tokenizer(tmp_path / "plain"), tmp_path, 32).roles


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("padding that is no token", "pad_token '<pad>' is no token of tokenizer.json"),
        ("more special, not added", "special token '<none>' is no added token of tokenizer.json"),
        ("bert", "do_lower_case is not carried over"),
    ],
)
def test_what_is_left_out_is_said(kind: str, said: str, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", KINDS[kind], speeches(2))
    assert said in as_exported(read_tokenizer(tokenizer), tokenizer, 32).left_out


def test_padding_told_elsewhere_is_the_model_s_padding(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(
        tmp_path / "tokenizer", KINDS["padding told elsewhere"], speeches(2)
    )
    roles = as_exported(read_tokenizer(tokenizer), tokenizer, 32).roles
    assert special_token_ids(roles, 2) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": roles["pad_token"],
    }
    assert roles["pad_token"] > 2
    assert special_token_ids({"eos_token": 9}, 9) == {
        "bos_token_id": 9,
        "eos_token_id": 9,
        "pad_token_id": 9,
    }


@pytest.fixture
def digits(tmp_path: Path) -> tuple[Path, Tokenizer]:
    """An export's tokenizer and configuration, and the tokenizer as the data has it: it splits
    digits.
    """
    tokenizer = write_tokenizer(tmp_path / "tokenizer", KINDS["digits of gpt2"], speeches(3))
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text(json.dumps(CONFIGS["gpt_neox"]))
    return export, copy_tokenizer(tokenizer, export, 32).reference


def test_other_ids_are_found(digits: tuple[Path, Tokenizer]) -> None:
    export, expected = digits
    assert check_ids(export, expected, HARD_TEXTS, Path("mine")) == len(HARD_TEXTS)
    definition = json.loads((export / "tokenizer.json").read_bytes())
    (export / "tokenizer.json").write_text(
        json.dumps(definition | {"normalizer": {"type": "Lowercase"}})
    )
    with pytest.raises(
        UserError, match=r"mine: transformers .* would give other ids .* than the data set holds"
    ):
        check_ids(export, expected, HARD_TEXTS, Path("mine"))
    (export / "tokenizer.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"mine: transformers .* can't load or use the exported tokenizer"
    ):
        check_ids(export, expected, HARD_TEXTS, Path("mine"))


@pytest.mark.skipif(
    transformers.__version__.startswith("4."),
    reason="classes build their own from transformers 5 on",
)
def test_a_class_that_builds_its_own_pre_tokenizer_is_found_out(
    digits: tuple[Path, Tokenizer],
) -> None:
    export, expected = digits
    config = export / "tokenizer_config.json"  # as early versions exported it
    config.write_text(config.read_text().replace("PreTrainedTokenizerFast", "GPT2Tokenizer"))
    with pytest.raises(UserError, match="would give other ids"):
        check_ids(export, expected, HARD_TEXTS, export)


def test_documents_of_every_source_are_compared(dataset: Path) -> None:
    reader = ShardReader(dataset)
    tokenizer = load_tokenizer(dataset / "tokenizer").reference
    texts = list(texts_of_every_source(reader, tokenizer))
    assert len(texts) == 2 * OF_A_SOURCE  # of two sources
    held = {tokenizer.decode(ids, skip_special_tokens=False) for ids in documents_of(reader)}
    assert set(texts) <= held
    assert len(set(texts)) > OF_A_SOURCE


def documents_of(reader: ShardReader) -> list[list[int]]:
    """The ids of all documents, of long ones as many as are compared."""
    found = []
    for shard in reader.manifest.shards:
        for number in range(shard.documents):
            place, _ = reader.document(shard, number)
            ids = reader.tokens(shard)[place.start : place.stop - 1].tolist()
            found.append(ids[:SAMPLED_TOKENS])
    return found


@pytest.fixture
def crowded(tmp_path: Path, texts: list[str], tokenizer_dir: Path) -> Path:
    """A data set in whose tokenizer somebody put more files."""
    write_parquet(tmp_path / "a.parquet", texts)
    build(write_mixture(tmp_path, tokenizer_dir, [source("a", "a.parquet")]), tmp_path / "dataset")
    (tmp_path / "dataset" / "tokenizer" / "notes.txt").write_text("not ours")
    (tmp_path / "dataset" / "tokenizer" / "more").mkdir()
    (tmp_path / "elsewhere.txt").write_text("private")
    (tmp_path / "dataset" / "tokenizer" / "linked.txt").symlink_to(tmp_path / "elsewhere.txt")
    return tmp_path / "dataset"


def test_only_known_files_go_on_into_copies(crowded: Path, tmp_path: Path) -> None:
    known = {"tokenizer.json", "tokenizer_config.json"}
    assert read_tokenizer(crowded / "tokenizer").keys() == known
    copy = staged(ShardReader(crowded), tmp_path / "stage").data_dir
    assert {path.name for path in (copy / "tokenizer").iterdir()} == known
    (tmp_path / "export").mkdir()
    copy_tokenizer(crowded / "tokenizer", tmp_path / "export", 32)
    assert {path.name for path in (tmp_path / "export").iterdir()} == known


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", ""]
)
def test_links_out_of_a_data_set_are_refused_wherever_its_tokenizer_is_read(
    crowded: Path, tmp_path: Path, name: str
) -> None:
    link = crowded / "tokenizer" / name if name else crowded / "tokenizer"
    target = tmp_path / "target"
    if link.exists():
        os.rename(link, target)
    else:
        target.write_text("{}")
    link.symlink_to(target)
    reader = ShardReader(crowded)
    (tmp_path / "export").mkdir()
    for read in (
        reader.check_files,
        lambda: staged(reader, tmp_path / "stage"),
        lambda: copy_tokenizer(crowded / "tokenizer", tmp_path / "export", 32),
    ):
        with pytest.raises(UserError, match=r"a link to .*, outside of"):
            read()
    assert not list((tmp_path / "export").iterdir())
    inside = crowded / "units" / "own"
    os.rename(target, inside)
    link.unlink()
    link.symlink_to(inside)  # which leads nowhere else
    reader.check_files()


def test_the_card_tells_what_the_tokenizer_loses(tokenizer_dir: Path, tmp_path: Path) -> None:
    save_untrained_run(tmp_path / "run", tokenizer_dir, "binary_code")
    manifest = load_for_reading(tmp_path / "run").manifest
    figures = dict.fromkeys(("targets", "loss", "perplexity", "bits_per_byte"), 1.0)
    values = {
        "architecture": "gpt_neox",
        "dtype": "float32",
        "trained_parameters": 1,
        "trained_tokens": 1,
        "figures": figures,
        "one_input": {},
        "starts": [],
        "engines": [],
        "proof": None,
        "gguf_name": "",
        "end_token": "",
        "stages": [],
    }
    plain = render("model_card.md.jinja", manifest=manifest, **values)
    assert "loses text" not in plain
    loss = TokenizerLoss(documents=400, tokens=1000, unknown_tokens=21, changed_documents=34)
    source = Source(
        name="a",
        share=4096,
        weight=1,
        origin="a",
        format="txt",
        text_field=None,
        revision=None,
        loss=loss,
    )
    data = Manifest(
        vocab_size=512,
        eos_id=0,
        eos_token="e",
        tokenizer_sha256="",
        validation_fraction=0.1,
        sources=(source,),
        shards=(),
    )
    card = render(
        "model_card.md.jinja", manifest=replace(manifest, data=about_data(data)), **values
    )
    said = "2.1% of tokens are unk; 34 of 400 sampled documents do not decode to their text"
    assert f"The tokenizer loses text: {said}." in card
    assert "between tokenizers that keep all text" in card


def test_the_export_says_of_what_the_ids_were_seen(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--run-dir", str(text_run), "--output-dir", str(tmp_path / "a")])
    said = capsys.readouterr().out
    assert (
        f"gives the data's ids for hard texts and {OF_A_SOURCE} documents, some of every source"
        in said
    )
    # whose data set is nowhere
    save_untrained_run(tmp_path / "alone", text_run / "tokenizer", "learned")
    main(["--run-dir", str(tmp_path / "alone"), "--output-dir", str(tmp_path / "b")])
    assert "ids for hard texts; no documents were compared" in capsys.readouterr().out

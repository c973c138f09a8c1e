"""With the tokenizer of an export, AutoTokenizer gives a text exactly the ids that the shards hold for it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prep_helpers import build, source, speeches, write_mixture, write_parquet
from test_export_hf import save_untrained_run
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from data_prep.errors import UserError
from data_prep.shards import Manifest, ShardReader, Source, TokenizerLoss, read_tokenizer
from pretrain.checkpoint import load_for_reading
from pretrain.export_tokenizer import copy_tokenizer
from pretrain.staging import staged
from pretrain.templates import render
from pretrain.train import about_data

pytest_plugins = ("prep_fixtures",)

Change = Callable[[Tokenizer], None]


def add_template(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )


def add_sequence(tokenizer: Tokenizer) -> None:
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])


def add_roberta(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))


def add_limits(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=64, pad_id=2, pad_token="</s>")


def add_dropout(tokenizer: Tokenizer) -> None:
    tokenizer.model.dropout = 0.5


def change_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.post_processor is None


KINDS: dict[str, tuple[Change, dict[str, Any]]] = {
    "template": (add_template, {}),
    "a template within a sequence": (add_sequence, {}),
    "roberta": (add_roberta, {}),
    "truncation and padding": (add_limits, {}),
    "dropout": (add_dropout, {}),
    "flags of a class": (change_nothing, {"tokenizer_class": "LlamaTokenizerFast", "add_eos_token": True}),
    "flags of a plain class": (change_nothing, {"add_bos_token": True, "add_eos_token": True}),
    "a class that builds its own": (change_nothing, {"tokenizer_class": "GPTNeoXTokenizerFast"}),
    "code of its own": (change_nothing, {"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}),
}


def write_tokenizer(directory: Path, change: Change, config: dict[str, Any]) -> Path:
    """A byte-level BPE as others publish it, with begin and end tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special: list[Any] = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(speeches(3), trainer)
    change(tokenizer)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names | config))
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_gives_the_ids_of_the_shards(kind: str, tmp_path: Path, texts: list[str]) -> None:
    change, config = KINDS[kind]
    tokenizer = write_tokenizer(tmp_path / "tokenizer", change, config)
    write_parquet(tmp_path / "a.parquet", [*texts, "<s> begin and </s> end"])
    build(write_mixture(tmp_path, tokenizer, [source("a", "a.parquet")]), tmp_path / "dataset")
    (tmp_path / "export").mkdir()
    copy_tokenizer(tmp_path / "dataset" / "tokenizer", tmp_path / "export", 32)
    exported = AutoTokenizer.from_pretrained(tmp_path / "export", trust_remote_code=False)
    assert exported.model_max_length == 32
    plain = Tokenizer.from_file(str(tmp_path / "export" / "tokenizer.json"))
    plain.encode_special_tokens = True
    reader, seen = ShardReader(tmp_path / "dataset"), 0
    for shard in reader.manifest.shards:
        for number in range(shard.documents):
            place, (_, row) = reader.document(shard, number)
            ids = reader.tokens(shard)[place.start : place.stop - 1].tolist()
            text = [*texts, "<s> begin and </s> end"][row]
            assert exported.encode(text) == ids
            assert plain.encode(text).ids == ids
            seen += 1
    assert seen == len(texts) + 1
    assert "auto_map" not in (tmp_path / "export" / "tokenizer_config.json").read_text()


def test_a_chat_template_comes_along_and_keeps_its_special_tokens(tmp_path: Path, texts: list[str]) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", add_template, {})
    (tokenizer / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    write_parquet(tmp_path / "a.parquet", texts)
    build(write_mixture(tmp_path, tokenizer, [source("a", "a.parquet")]), tmp_path / "dataset")
    (tmp_path / "export").mkdir()
    copy_tokenizer(tmp_path / "dataset" / "tokenizer", tmp_path / "export", 32)
    exported = AutoTokenizer.from_pretrained(tmp_path / "export", trust_remote_code=False)
    ids = exported.apply_chat_template([{"role": "user", "content": "Congress"}], return_dict=False)
    assert ids == [1, *exported.encode("Congress"), 2]


def test_a_plain_tokenizer_is_exported_as_it_is(tokenizer_dir: Path, tmp_path: Path) -> None:
    copy_tokenizer(tokenizer_dir, tmp_path, 32)
    assert (tmp_path / "tokenizer.json").read_bytes() == (tokenizer_dir / "tokenizer.json").read_bytes()
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_bytes())
    assert json.loads((tmp_path / "tokenizer_config.json").read_bytes()) == config | {"model_max_length": 32}


def test_a_tokenizer_that_transformers_reads_otherwise_is_not_exported(tmp_path: Path) -> None:
    def add_word(tokenizer: Tokenizer) -> None:
        tokenizer.normalizer = normalizers.Replace("citizens", "people")

    tokenizer = write_tokenizer(tmp_path / "tokenizer", add_word, {})
    config = json.loads((tokenizer / "tokenizer_config.json").read_bytes())
    word = vars(AddedToken("Fellow")) if hasattr(AddedToken("Fellow"), "__dict__") else {"content": "Fellow"}
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
    config["added_tokens_decoder"] = {"400": word | {"content": "Fellow"} | flags}  # not in tokenizer.json
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "export").mkdir()
    with pytest.raises(UserError, match="would give other ids"):
        copy_tokenizer(tokenizer, tmp_path / "export", 32)


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


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", ""])
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
        "figures": figures,
        "one_input": {},
        "starts": [],
    }
    plain = render("model_card.md.jinja", manifest=manifest, **values)
    assert "loses text" not in plain
    loss = TokenizerLoss(documents=400, tokens=1000, unknown_tokens=21, changed_documents=34)
    source = Source(
        name="a", share=4096, weight=1, origin="a", format="txt", text_field=None, revision=None, loss=loss
    )  # fmt: skip
    data = Manifest(
        vocab_size=512, eos_id=0, eos_token="e", tokenizer_sha256="", validation_fraction=0.1, sources=(source,),
        shards=(),
    )  # fmt: skip
    card = render("model_card.md.jinja", manifest=manifest | {"data": about_data(data)}, **values)
    said = "2.1% of tokens are unk; 34 of 400 sampled documents do not decode to their text"
    assert f"The tokenizer loses text: {said}." in card
    assert "between tokenizers that keep all text" in card

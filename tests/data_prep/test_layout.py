"""Paths of a data set are those that its layout gives, whatever a manifest says; what is
somebody's own stays.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.prep_helpers import build, flip_byte, stamps

from data_prep import layout, show, verify
from data_prep.building.output_dir import write_tokenizer
from data_prep.building.unit_records import _seal, read_record
from data_prep.errors import UserError
from data_prep.files import replace_directory, write_durably
from data_prep.manifest import load_manifest
from data_prep.shards import ShardReader, ShardWriter
from data_prep.tokenizer.load import load_tokenizer
from pretrain.data.staging import staged

pytest_plugins = ("support.prep_fixtures",)


@pytest.fixture
def copy(tmp_path: Path, dataset: Path) -> Path:
    """A data set to change."""
    shutil.copytree(dataset, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(data_dir: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's JSON, and keep its form."""
    path = data_dir / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(
        json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def of_first(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["shards"][0].update({name: value})


ELSEWHERE = {
    "up": "shards/train/speeches/../../../../elsewhere/a.npy",
    "up in a name": "shards/train/speeches/..npy",
    "up at first": "../elsewhere/a.npy",
    "absolute": "/elsewhere/a.npy",
    "another split": "shards/validation/speeches/a.npy",
    "another source": "shards/train/more/a.npy",
    "another folder": "elsewhere/train/speeches/a.npy",
    "deeper": "shards/train/speeches/deep/a.npy",
    "doubled": "shards/train//speeches/a.npy",
    "dotted": "shards/train/./speeches/a.npy",
    "a hidden file": "shards/train/speeches/.a.npy",
    "another ending": "shards/train/speeches/a.txt",
    "the manifest": "manifest.json",
    "an index": "shards/train/speeches/a.documents.npy",
    "a line end": "shards/train/speeches/a\n.npy",
    "a NUL": "shards/train/speeches/a\0.npy",
    "nothing": "",
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_shard_lies_where_the_layout_puts_it_or_is_refused_by_every_reader(
    copy: Path, kind: str
) -> None:
    elsewhere = copy.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.npy").write_bytes(b"another's")
    rewrite(copy, of_first("path", ELSEWHERE[kind]))
    before = stamps(copy.parent)
    for reads in (
        lambda: verify.main([str(copy), "--repair"]),
        lambda: show.main([str(copy)]),
        lambda: staged(ShardReader(copy), copy.parent / "stage"),
    ):
        with pytest.raises(UserError) as caught:
            reads()
        expected = (
            f"{copy / 'manifest.json'}: {ELSEWHERE[kind]!r} is not where a shard of split 'train' "
            "and source"
        )
        assert str(caught.value).startswith(expected)
    assert stamps(copy.parent) == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (of_first("split", ".."), "is not where a shard"),
        (of_first("source", "nobody"), "is not where a shard"),
        (
            lambda content: content["sources"][0].update(name=".."),
            "source name '..' can't name a directory",
        ),
        (
            lambda content: content["sources"][0].update(name="a/b"),
            "source name 'a/b' can't name a directory",
        ),
        (lambda content: content["shards"].append(content["shards"][0]), "two shards of one path"),
        (of_first("tokens", 2**63), "figures that no build gives"),
        (of_first("documents", 0), "figures that no build gives"),
        (of_first("text_bytes", -1), "figures that no build gives"),
        (of_first("inputs", []), "figures that no build gives"),
        (lambda content: content.update(eos_id=content["vocab_size"]), "don't fit"),
        (lambda content: content.update(vocab_size=65_537), "don't fit"),
    ],
)
def test_names_and_figures_that_no_build_gives(
    copy: Path, change: Callable[..., object], expected: str
) -> None:
    rewrite(copy, change)
    with pytest.raises(UserError, match=expected) as caught:
        load_manifest(copy)
    assert "fetch the data set again from where it was built, or remove its manifest.json" in str(
        caught.value
    )


@pytest.mark.parametrize("kind", ["a shard", "an index", "a source", "a split"])
def test_a_link_that_leads_out_is_refused(copy: Path, kind: str) -> None:
    shard = load_manifest(copy).shards[0]
    paths = {
        "a shard": shard.path,
        "an index": shard.index_path,
        "a source": Path(shard.path).parent,
    }
    linked = copy / paths.get(kind, Path(shard.path).parent.parent)
    target = copy.parent / "elsewhere"
    linked.rename(target)
    linked.symlink_to(target)
    before = stamps(copy.parent)
    with pytest.raises(UserError) as caught:
        verify.main([str(copy), "--repair"])
    assert str(caught.value).startswith(str(linked))
    assert f": leads out of the data set, to {target}" in str(caught.value)
    assert stamps(copy.parent) == before


def test_a_staged_copy_in_which_a_link_leads_out_is_refused(dataset: Path, tmp_path: Path) -> None:
    reader = ShardReader(dataset)
    home = tmp_path / "stage" / reader.manifest.fingerprint
    (tmp_path / "elsewhere").mkdir()
    (home / "shards").mkdir(parents=True)
    (home / "shards" / "train").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of the data set"):
        staged(reader, tmp_path / "stage")
    assert not any((tmp_path / "elsewhere").iterdir())


def test_links_of_a_data_set_on_larger_disks_are_followed(dataset: Path, copy: Path) -> None:
    """Its directory, `shards/` in it, and links that stay inside: read, verified and repaired
    where they lie.
    """
    larger, name = copy.parent / "larger disk", copy.parent / "by another name"
    larger.mkdir()
    (copy / "shards").rename(larger / "shards")
    (copy / "shards").symlink_to(larger / "shards")
    name.symlink_to(copy)
    shard = load_manifest(name).shards[0]
    (larger / shard.path).rename(larger / "shards" / "kept")
    (larger / shard.path).symlink_to(larger / "shards" / "kept")
    assert len(ShardReader(name).tokens(shard)) == shard.tokens
    flip_byte(larger / load_manifest(copy).shards[1].path)
    verify.main([str(name), "--repair", "--mixture", str(dataset.parent / "mixture.yaml")])
    assert (copy / "shards").is_symlink()
    assert load_manifest(name).fingerprint == load_manifest(dataset).fingerprint


def test_a_folder_linked_into_another_data_set_is_not_written_through(
    dataset: Path, copy: Path
) -> None:
    other = copy.parent / "other"
    other.mkdir()
    (other / "shards").symlink_to(copy / "shards")
    shutil.copyfile(copy / "build.json", other / "build.json")
    before = stamps(copy)
    with pytest.raises(
        UserError, match=f"shards: is a link into another data set, {copy}; remove it"
    ):
        build(dataset.parent / "mixture.yaml", other)
    assert stamps(copy) == before


def test_a_record_s_splits_are_those_there_are(copy: Path) -> None:
    path = next((copy / "units").rglob("*.json"))
    content = json.loads(path.read_bytes())
    del content["seal"]

    def write(splits: list[str]) -> None:
        shards = [{**content["shards"][0], "split": split} for split in splits]
        changed = {**content, "shards": shards}
        path.write_text(json.dumps({"seal": _seal("signature", changed), **changed}))

    for splits, is_good in (
        (["train"], True),
        (["train", "train"], False),
        (["../../elsewhere"], False),
    ):
        write(splits)
        assert (read_record(path, "signature") is not None) == is_good


@pytest.mark.parametrize(
    "told", [3, None, "", "mixture.yaml", "/nowhere\n.yaml", ["/a"], "/nowhere\0"]
)
def test_what_build_json_tells_of_a_mixture_is_a_path_or_nothing(copy: Path, told: Any) -> None:
    flip_byte(copy / load_manifest(copy).shards[0].path)
    built = json.loads((copy / "build.json").read_bytes())
    (copy / "build.json").write_text(json.dumps(built | {"mixture": told, "tokenizer": told}))
    with pytest.raises(
        UserError, match=r"its mixture file: not there, .* say where it is with --mixture FILE"
    ):
        verify.main([str(copy), "--repair"])


# What is somebody's own


def test_the_copy_of_a_tokenizer_leaves_what_it_did_not_write(
    copy: Path, tokenizer_dir: Path
) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    (copy / "tokenizer" / "notes.txt").write_text("mine")
    (copy / "tokenizer" / "special_tokens_map.json").write_text("{}")
    write_tokenizer(copy, tokenizer)
    names = {path.name for path in (copy / "tokenizer").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "notes.txt"}


def test_a_linked_tokenizer_is_replaced_and_its_target_kept(
    copy: Path, tokenizer_dir: Path
) -> None:
    target = copy.parent / "another"
    (copy / "tokenizer").rename(target)
    (target / "tokenizer.json").write_text("another's")
    (copy / "tokenizer").symlink_to(target)
    write_tokenizer(copy, load_tokenizer(tokenizer_dir))
    assert not (copy / "tokenizer").is_symlink()
    assert (target / "tokenizer.json").read_text() == "another's"


def test_nothing_is_written_through_a_link_in_a_temporary_file_s_place(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("another's")
    for name in ("a.json.tmp", "b.npy.tmp", "c.json"):
        (tmp_path / name).symlink_to(other)
    write_durably(tmp_path / "a.json", b"{}")
    write_durably(tmp_path / "c.json", b"{}")
    ShardWriter(tmp_path / "b.npy", "train").close()
    assert other.read_text() == "another's"
    assert (tmp_path / "a.json").read_text() == (tmp_path / "c.json").read_text() == "{}"
    assert not any(path.is_symlink() for path in tmp_path.iterdir())


def write_new(directory: Path) -> None:
    (directory / "new").write_text("new")


def test_a_directory_is_replaced_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "larger").mkdir()
    (tmp_path / "larger" / "old").write_text("old")
    (tmp_path / "name").symlink_to(tmp_path / "larger")
    replace_directory(tmp_path / "name", write_new)
    assert (tmp_path / "name").is_symlink()
    assert [path.name for path in (tmp_path / "larger").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["larger", "name"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_directory_that_can_t_be_replaced_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")
    rename = layout.os.rename

    def refuse_new(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise error
        rename(source, target)

    monkeypatch.setattr("os.rename", refuse_new)
    with pytest.raises(error):
        replace_directory(tmp_path / "a", write_new)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "old").read_text() == "old"


@pytest.mark.parametrize(
    "content",
    ["{}", '{"signature": "somebody\'s"}', '{"signature": "x", "state": "built"}', "[" * 9999],
)
def test_a_build_json_of_something_else_is_not_a_data_set_s(
    dataset: Path, tmp_path: Path, content: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "build.json").write_text(content)
    with pytest.raises(
        UserError, match=r"out: exists, and is not a data set of this command.*; choose another"
    ):
        build(dataset.parent / "mixture.yaml", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["build.json"]
    assert (tmp_path / "out" / "build.json").read_text() == content

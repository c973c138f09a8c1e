"""The on-disk contract: arrays, manifest, shares."""

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.files import digest_file, write_durably
from data_prep.manifest import Manifest, Shard, Source, integer_shares, load_manifest
from data_prep.shards import (
    INDEX_DTYPE,
    TOKEN_DTYPE,
    ShardReader,
    ShardWriter,
    open_array,
    write_array,
)

BORDER_IDS = [0, 32_767, 32_768, 65_535]


def write_dataset(data_dir: Path) -> Manifest:
    """One shard with two documents; id 5 ends them."""
    path = "shards/train/web/0.npy"
    tokens = np.array([*BORDER_IDS, 5, 65_535, 5], TOKEN_DTYPE)
    index = np.array([[0, 0], [5, 3]], INDEX_DTYPE)
    shard = Shard(
        split="train",
        source="web",
        path=path,
        tokens=7,
        documents=2,
        text_bytes=9,
        text_characters=8,
        inputs=("web.txt",),
        first_row=10,
        rows=4,
        xxh3_128=write_array(data_dir / path, tokens),
        index_xxh3_128=write_array(data_dir / "shards/train/web/0.documents.npy", index),
    )
    source = Source(
        name="web",
        share=4096,
        weight=1.0,
        origin="web.txt",
        format="txt",
        text_field=None,
        revision=None,
    )
    manifest = Manifest(
        vocab_size=65_536,
        eos_id=5,
        eos_token="é",
        tokenizer_sha256="",
        validation_fraction=0.1,
        sources=(source,),
        shards=(shard,),
    )
    write_durably(data_dir / "manifest.json", manifest.to_bytes())
    return manifest


def test_border_ids_survive(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    reader = ShardReader(tmp_path)
    (shard,) = reader.manifest.shards
    assert reader.tokens(shard).dtype == np.uint16
    assert reader.tokens(shard)[:4].tolist() == BORDER_IDS
    assert np.load(tmp_path / shard.path, mmap_mode="r").tolist() == [*BORDER_IDS, 5, 65_535, 5]


def test_documents_carry_the_rows_of_the_input_file(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    reader = ShardReader(tmp_path)
    assert reader.documents(reader.manifest.shards[0]).tolist() == [[0, 10], [5, 13]]


def test_documents_of_text_files_lead_back_to_their_file(tmp_path: Path) -> None:
    shard = replace(
        write_dataset(tmp_path).shards[0], inputs=("a.txt", "b.txt"), first_row=0, rows=2
    )
    assert [shard.origin(row) for row in (0, 1)] == [("a.txt", 0), ("b.txt", 0)]
    assert replace(shard, inputs=("a.parquet",)).origin(7) == ("a.parquet", 7)


def test_manifest_round_trip_and_fingerprint(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path)
    assert load_manifest(tmp_path) == manifest
    assert (
        load_manifest(tmp_path).fingerprint
        == manifest.fingerprint
        == digest_file(tmp_path / "manifest.json")
    )
    assert replace(manifest, eos_id=6).fingerprint != manifest.fingerprint


@given(st.lists(st.integers(0, 65_535), max_size=50))
def test_arrays_round_trip(tmp_path_factory: pytest.TempPathFactory, ids: list[int]) -> None:
    base = tmp_path_factory.mktemp("array")
    digest = write_array(base / "a.npy", np.array(ids, TOKEN_DTYPE))
    assert open_array(base, "a.npy", TOKEN_DTYPE, (len(ids),)).tolist() == ids
    assert digest == digest_file(base / "a.npy")
    assert [path.name for path in base.iterdir()] == ["a.npy"]


@settings(max_examples=30)
@given(
    st.lists(
        st.lists(st.lists(st.integers(0, 65_535), min_size=1, max_size=4), min_size=1, max_size=3),
        max_size=5,
    )
)
def test_a_shard_written_in_pieces_is_the_shard_written_at_once(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[list[list[int]]]
) -> None:
    base = tmp_path_factory.mktemp("shard")
    pieces = [[[0]], *pieces]
    documents = [*chain(*pieces)]
    writer = ShardWriter(base / "a.npy", "train")
    row = 0
    for piece in pieces:
        starts = np.cumsum([0, *map(len, piece)])[:-1]
        writer.add(
            np.array([*chain(*piece)], TOKEN_DTYPE),
            starts,
            np.arange(row, row + len(piece), dtype=np.uint64),
        )
        row += len(piece)
    index = np.stack([np.cumsum([0, *map(len, documents)])[:-1], np.arange(row)], axis=1).astype(
        INDEX_DTYPE
    )
    tokens = np.array([*chain(*documents)], TOKEN_DTYPE)
    facts = writer.finish()
    assert (facts.tokens, facts.documents) == (len(tokens), len(documents))
    assert facts.xxh3_128 == write_array(base / "b.npy", tokens)
    assert facts.index_xxh3_128 == write_array(base / "b.index.npy", index)
    assert sorted(path.name for path in base.iterdir()) == [
        "a.documents.npy",
        "a.npy",
        "b.index.npy",
        "b.npy",
    ]


def test_a_shard_given_up_leaves_nothing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.npy", "train")
    writer.add(np.array([1], TOKEN_DTYPE), np.array([0]), np.array([0], np.uint64))
    writer.close()
    assert not list(tmp_path.iterdir())


def test_epochs() -> None:
    def shard(source: str, tokens: int) -> Shard:
        return Shard(
            split="train",
            source=source,
            path=f"{source}.npy",
            tokens=tokens,
            documents=1,
            text_bytes=1,
            text_characters=1,
            inputs=("x",),
            first_row=0,
            rows=1,
            xxh3_128="",
            index_xxh3_128="",
        )

    sources = tuple(
        Source(
            name=name,
            share=share,
            weight=1.0,
            origin="x",
            format="txt",
            text_field=None,
            revision=None,
        )
        for name, share in (("a", 3072), ("b", 1024))
    )
    manifest = Manifest(
        vocab_size=9,
        eos_id=0,
        eos_token="e",
        tokenizer_sha256="",
        validation_fraction=0.1,
        sources=sources,
        shards=(shard("a", 100), shard("b", 10), shard("b", 10)),
    )
    assert manifest.epochs(400) == {"a": 3.0, "b": 5.0}


@given(st.lists(st.floats(1, 100), min_size=1, max_size=8))
def test_shares_are_whole_and_near_the_weights(weights: list[float]) -> None:
    shares = integer_shares(weights)
    assert sum(shares) == 4096
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - 4096 * weight / sum(weights)) < 1


def test_shares_of_the_paper_mixture() -> None:
    assert integer_shares([0.8, 0.2]) == [3277, 819]
    assert integer_shares([1, 1, 1]) == [1366, 1365, 1365]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "not valid JSON"),
        ("[]", "not a manifest"),
        ("{}", "not a manifest"),
        (
            json.dumps({"format": "tablefree-shards", "format_version": 99}),
            "format version 99, expected 2",
        ),
        (
            json.dumps({"format": "tablefree-shards", "format_version": 1}),
            "format version 1, expected 2; remove its",
        ),
        (json.dumps({"format": "tablefree-shards", "format_version": 2}), "damaged manifest"),
    ],
)
def test_bad_manifests(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=expected):
        load_manifest(tmp_path)


def test_missing_data_sets(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        load_manifest(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not complete"):
        load_manifest(tmp_path)


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path)
    path = tmp_path / manifest.shards[0].path
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"0\.npy: 140 bytes, expected 142: truncated"):
        ShardReader(tmp_path).check_files()
    with pytest.raises(UserError, match="truncated or damaged"):
        ShardReader(tmp_path).tokens(manifest.shards[0])
    np.save(path, np.arange(7, dtype=np.uint32))
    with pytest.raises(UserError, match=r"truncated or damaged \(156 bytes, expected 142\)"):
        ShardReader(tmp_path).tokens(manifest.shards[0])
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        ShardReader(tmp_path).check_files()

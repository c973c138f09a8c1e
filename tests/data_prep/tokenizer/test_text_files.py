"""Texts as ids, and bytes of ids, as a data set of the same texts has them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.shards import TOKENIZER_NAME, ShardReader
from data_prep.tokenizer.text_files import (
    TextEncoder,
    TextFile,
    shared_out,
    text_bytes_of_documents,
)


def test_a_file_gives_the_ids_and_bytes_that_a_data_set_of_it_holds(text_data: Path) -> None:
    encoder = TextEncoder(text_data / TOKENIZER_NAME)
    texts = encoder.read(TextFile(path=str(text_data.parent / "addresses.jsonl")))
    reader = ShardReader(text_data)
    held = {}
    for split in ("train", "validation"):
        sizes = text_bytes_of_documents(reader, split, encoder)
        (shard,) = reader.manifest.shards_of(split)
        ids = reader.tokens(shard)
        assert sizes.sum() == shard.text_bytes
        for number, size in enumerate(sizes.tolist()):
            place, origin = reader.document(shard, number)
            held[origin.row] = ids[place.start : place.stop].tolist(), size
    assert len(held) == len(texts.text_bytes) == 30
    for row, (ids, size) in held.items():
        start, stop = texts.bounds[row : row + 2]
        assert texts.tokens[start:stop].tolist() == ids
        assert texts.text_bytes[row] == size


def test_bytes_are_those_of_decoded_texts_for_any_other_kind_of_tokenizer(
    text_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = TextEncoder(text_data / TOKENIZER_NAME)
    texts = encoder.read(TextFile(path=str(text_data.parent / "addresses.jsonl")))
    monkeypatch.setattr("data_prep.tokenizer.text_files.PIECE_TOKENS", 3_000)
    encoder.__dict__["_bytes_of_id"] = None  # as of a tokenizer that is not byte-level
    assert encoder.byte_lengths(texts.tokens, texts.bounds).tolist() == texts.text_bytes.tolist()


@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=50).filter(sum),
    st.integers(0, 10**9),
)
def test_what_is_shared_out_adds_up_and_is_about_proportional(
    weights: list[int], total: int
) -> None:
    parts = shared_out(total, np.array(weights))
    assert parts.sum() == total
    assert (parts >= 0).all()
    exact = np.array(weights) * (total / sum(weights))
    assert np.abs(parts - exact).max() <= 1.01


def test_without_a_tokenizer_bytes_are_shared_out_by_tokens(tiny_data: Path) -> None:
    reader = ShardReader(tiny_data)
    (shard,) = reader.manifest.shards_of("validation")
    sizes = text_bytes_of_documents(reader, "validation", None)
    assert sizes.sum() == shard.text_bytes
    assert (sizes == 2 * np.diff([*reader.documents(shard)[:, 0].tolist(), shard.tokens])).all()

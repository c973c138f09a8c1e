"""How much text a token of the validation split stands for."""

from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.shards import ShardReader
from pretrain.data.text_size import bytes_per_token


def test_bytes_of_the_split_over_its_targets_where_all_are_known(text_data: Path) -> None:
    manifest = ShardReader(text_data).manifest
    shards = manifest.shards_of("validation")
    tokens = sum(shard.tokens for shard in shards)
    text = sum(shard.text_bytes for shard in shards)
    assert text > tokens  # a tokenizer of 512 ids takes more than a byte at a time
    assert bytes_per_token(manifest) == pytest.approx(text / (tokens - 1))
    others = [replace(shard, text_bytes=0) for shard in manifest.shards]
    assert bytes_per_token(replace(manifest, shards=others)) is None

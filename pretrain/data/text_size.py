"""How much text tokens stand for, as the data set's manifest tells."""

from data_prep.manifest import Manifest


def bytes_per_token(manifest: Manifest) -> float | None:
    """UTF-8 bytes of validation text a target, over the whole split.

    None where a data set of ids does not know its text.
    """
    shards = manifest.shards_of("validation")
    targets = sum(shard.tokens for shard in shards) - 1  # the first id is none
    if targets < 1 or not all(shard.text_bytes for shard in shards):
        return None
    return sum(shard.text_bytes for shard in shards) / targets

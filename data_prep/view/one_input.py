"""Two ids that the training's default code would make one input: said when a data set is built, and
when it is shown.

The code of an id is its own bits, and the decoder's LayerNorm takes away what all channels share:
so the code of zeros alone and that of ones alone are one input (see pretrain/model/token_codes.py).
These are the ids 0 and V - 1 where V is a power of two. That harms a data set in which both occur.
"""

from data_prep.manifest import Manifest
from data_prep.shards import ShardReader
from data_prep.tokenizer.reference import Reference


def first_and_last(manifest: Manifest) -> tuple[int, int] | None:
    """The two ids; None where the code of ones is no id's, or one of the two is a special one
    that no text gives.
    """
    last = manifest.vocab_size - 1
    never_given = set(manifest.special_tokens.values()) - {manifest.eos_id}
    is_power_of_two = manifest.vocab_size & last == 0
    return (0, last) if is_power_of_two and never_given.isdisjoint((0, last)) else None


def warning_of_one_input(reader: ShardReader, reference: Reference) -> str | None:
    """A line that names both and how often they occur; None where they don't both."""
    manifest = reader.manifest
    pair = first_and_last(manifest)
    if pair is None:
        return None
    counts, counted = reader.count_ids(pair)
    is_exact = counted == sum(shard.tokens for shard in manifest.shards)
    if is_exact and not all(counts):
        return None
    first, last = (f"{i} ({reference.decode([i])!r})" for i in pair)
    bits = (manifest.vocab_size - 1).bit_length()
    wider = next((width for width in range(bits + 1, 1025) if 1024 % width == 0), 1024)
    return (
        f"ids {first} and {last} would be one input to a decoder of {bits} code bits; they occur "
        f"{counts[0]:,} and {counts[1]:,} times in {counted:,} "
        f"tokens{'' if is_exact else ' counted'}; train with model.code_bits at the next divisor "
        f"of model.d_model above {bits}, such as {wider} at width 1,024"
    )

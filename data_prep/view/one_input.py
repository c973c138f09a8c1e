"""Two ids that the training's default code would make one input; said of data sets that give both.

The code of an id is its own bits, and the decoder's LayerNorm takes away what all channels share:
so the code of zeros alone and that of ones alone are one input (see pretrain/model/token_codes.py).
These are the ids 0 and V - 1 where V is a power of two. That harms a data set in which both occur.
"""

from data_prep.manifest import Manifest
from data_prep.shards import ShardReader
from data_prep.tokenizer.reference import Reference

EXAMPLE_WIDTH = 1_024  # a d_model, for the advice


def first_and_last(manifest: Manifest) -> tuple[int, int] | None:
    """The two ids.

    None where the code of ones is no id's, or one of the two is a special one that no text gives.
    """
    first = 0
    last = manifest.vocab_size - 1
    is_power_of_two = manifest.vocab_size & last == 0
    never_given = set(manifest.special_tokens.values()) - {manifest.eos_id}
    if not is_power_of_two or first in never_given or last in never_given:
        return None
    return first, last


def warning_of_one_input(reader: ShardReader, reference: Reference) -> str | None:
    """A line that names both and how often they occur; None where they don't both."""
    manifest = reader.manifest
    pair = first_and_last(manifest)
    if pair is None:
        return None
    counts, counted = reader.count_ids(pair)
    tokens = f"{counted:,} tokens"
    if counted < manifest.all_tokens:
        tokens += " counted"
    elif not all(counts):
        return None
    first, last = pair
    of_first, of_last = counts
    bits = last.bit_length()
    problem = f"would be one input to a decoder of {bits} code bits"
    times = f"{of_first:,} and {of_last:,} times in {tokens}"
    divisor = f"the next divisor of model.d_model above {bits}"
    example = f"such as {wider_than(bits)} at width {EXAMPLE_WIDTH:,}"
    return (
        f"ids {named(first, reference)} and {named(last, reference)} {problem}; "
        f"they occur {times}; "
        f"train with model.code_bits at {divisor}, {example}"
    )


def wider_than(bits: int) -> int:
    """The next width of a code that divides EXAMPLE_WIDTH."""
    for width in range(bits + 1, EXAMPLE_WIDTH):
        if EXAMPLE_WIDTH % width == 0:
            return width
    return EXAMPLE_WIDTH


def named(i: int, reference: Reference) -> str:
    """An id and its text."""
    text = reference.decode([i])
    return f"{i} ({text!r})"

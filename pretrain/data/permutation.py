"""A keyed permutation of a range, computed place by place: no index in memory or on disk."""

import numpy as np
import numpy.typing as npt
import xxhash

FEISTEL_ROUNDS = 6
ROUND_SALT = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, as SplitMix64 steps
U64 = npt.NDArray[np.uint64]


def derive_key(*parts: object) -> int:
    """A 64-bit key that depends on every part."""
    text = "\x1f".join(map(str, parts))
    return xxhash.xxh3_64_intdigest(text.encode())


def mix(values: U64) -> U64:
    """The finaliser of SplitMix64: every output bit depends on every input bit."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(ordinals: U64, size: int, keys: U64) -> U64:
    """Where a keyed permutation of range(size) sends each ordinal; one key for all or one for each.

    A balanced Feistel network permutes the next power of four; values outside the range walk on
    along their cycle until they are inside (fewer than four rounds on average).
    """
    bits = (size - 1).bit_length()
    bits_of_half = max(1, (bits + 1) // 2)
    half_bits = np.uint64(bits_of_half)
    low_mask = np.uint64(2**bits_of_half - 1)
    result = ordinals.astype(np.uint64)
    keys = np.broadcast_to(keys, result.shape)
    outside = np.arange(len(result))
    while len(outside):
        values = result[outside]
        left = values >> half_bits
        right = values & low_mask
        key = keys[outside]
        for round_number in range(1, FEISTEL_ROUNDS + 1):
            salt = np.uint64(ROUND_SALT * round_number % 2**64)
            mixed = mix(right + key + salt) & low_mask
            next_right = left ^ mixed
            left = right
            right = next_right
        result[outside] = (left << half_bits) | right
        outside = outside[result[outside] >= size]
    return result

"""A keyed permutation of a range, computed place by place: no index in memory or on disk."""

import numpy as np
import numpy.typing as npt
import xxhash

FEISTEL_ROUNDS = 6
U64 = npt.NDArray[np.uint64]


def derive_key(*parts: object) -> int:
    """A 64-bit key that depends on every part."""
    return xxhash.xxh3_64_intdigest("\x1f".join(map(str, parts)).encode())


def mix(values: U64) -> U64:
    """The finaliser of SplitMix64: every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(ordinals: U64, size: int, keys: U64) -> U64:
    """Where a keyed permutation of range(size) sends each ordinal; one key for all or one for each.

    A balanced Feistel network permutes the next power of four; values outside the range walk on
    along their cycle until they are inside (fewer than four rounds on average).
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low_mask = np.uint64((1 << int(half_bits)) - 1)
    result = ordinals.astype(np.uint64)
    keys = np.broadcast_to(keys, result.shape)
    outside = np.arange(len(result))
    while len(outside):
        left, right, key = result[outside] >> half_bits, result[outside] & low_mask, keys[outside]
        for round_number in range(FEISTEL_ROUNDS):
            salt = np.uint64((0x9E3779B97F4A7C15 * (round_number + 1)) % 2**64)
            left, right = right, left ^ (mix(right + key + salt) & low_mask)
        result[outside] = (left << half_bits) | right
        outside = outside[result[outside] >= size]
    return result

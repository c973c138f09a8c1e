"""How far a permutation of K-bit numbers is from a linear one, beside random permutations."""

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


def parities(numbers: Numbers) -> Numbers:
    """The sum of the bits of each number, modulo 2."""
    folded = numbers.copy()
    for shift in (16, 8, 4, 2, 1):
        folded ^= folded >> shift
    return folded & 1


def walsh_transform(signs: Numbers) -> Numbers:
    """For each mask, the sum over all numbers of their sign and of the mask's parity as a sign."""
    sums = signs
    width = 1
    while width < len(signs):
        pairs = sums.reshape(-1, 2, width)
        first = pairs[:, 0]
        second = pairs[:, 1]
        sums = np.stack([first + second, first - second], axis=1).reshape(-1)
        width *= 2
    return sums


def linear_bias(images: Numbers, masks: Numbers) -> float:
    """The largest bias of the best linear approximations: 1 for an affine map, 0 is out of reach.

    Of a parity of the images' bits under each of `masks`, the most that it agrees (or disagrees)
    with any parity of the numbers' own bits: twice its share, less 1.
    """
    transforms = (walsh_transform(1 - 2 * parities(images & mask)) for mask in masks)
    return max(float(np.abs(sums).max()) for sums in transforms) / len(images)


def avalanche(images: Numbers) -> npt.NDArray[np.float64]:
    """How often a bit of the image turns where one of the number does, (K, K), over all numbers."""
    bits = len(images).bit_length() - 1
    numbers = np.arange(len(images))
    turned = np.empty((bits, bits))
    for place in range(bits):
        difference = images ^ images[numbers ^ 1 << place]
        for other in range(bits):
            turned[place, other] = (difference >> other & 1).mean()
    return turned


def some_masks(bits: int, number: int = 32) -> Numbers:
    """Each bit of the image alone, and random parities of them."""
    alone = 1 << np.arange(bits)
    random = np.random.default_rng(0).integers(1, 1 << bits, number)
    return np.concatenate([alone, random])

"""How near a permuted code of so many rounds comes to random permutations.

    python tests/benchmarks/code_statistics.py

Prints, for each number of bits and of rounds, means over draws: the largest bias of linear
approximations (of each bit of the image and of random parities), and the least and the largest
share of images in which a bit turns with one of the id. `random` are permutations drawn evenly.
Takes about a minute.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.code_statistics import Numbers, avalanche, linear_bias, some_masks

from pretrain.modeling_tablefree import PERMUTATION_ROUNDS, ROUND_MASK, permuted

DRAWS = {3: 40, 4: 40, 6: 40, 8: 20, 12: 10, 16: 6}  # by bits
ROUNDS = (4, 6, PERMUTATION_ROUNDS, 12)


def drawn(bits: int, rounds: int | None, seed: int) -> Numbers:
    """The images of all numbers of so many bits; without rounds, a random permutation."""
    generator = np.random.default_rng(seed)
    if rounds is None:
        return generator.permutation(1 << bits)
    keys = generator.integers(0, ROUND_MASK, rounds, endpoint=True).tolist()
    images: Numbers = permuted(torch.arange(1 << bits), bits, keys).numpy()
    return images


def main() -> None:
    print("bits  rounds   bias   turned: least, largest")
    for bits, draws in DRAWS.items():
        for rounds in (*ROUNDS, None):
            figures = []
            for seed in range(draws):
                images = drawn(bits, rounds, seed)
                turned = avalanche(images)
                bias = linear_bias(images, some_masks(bits))
                figures.append((bias, turned.min(), turned.max()))
            bias, least, largest = np.mean(figures, axis=0)
            print(f"{bits:4}  {rounds or 'random':>6}  {bias:.4f}  {least:.3f}, {largest:.3f}")


if __name__ == "__main__":
    main()

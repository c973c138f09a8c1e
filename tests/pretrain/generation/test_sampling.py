"""How an id is chosen: as transformers' own filters do, and the same for the same seed."""

import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from pretrain.generation.sampling import (
    Sampler,
    Sampling,
    among_top_k,
    among_top_p,
    derived_seed,
)


def some_logits(seed: int, size: int = 500) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(top_p: float) -> None:
    for seed in range(5):
        logits = some_logits(seed)
        expected = TopPLogitsWarper(top_p)(torch.zeros(1, 1), logits[None])[0]
        assert torch.equal(among_top_p(logits, top_p), expected)


@pytest.mark.parametrize("top_k", [1, 7, 499, 500, 1000])
def test_top_k_keeps_what_transformers_keeps(top_k: int) -> None:
    logits = some_logits(0)
    logits[:20] = logits.max()  # as likely as one another
    expected = TopKLogitsWarper(top_k)(torch.zeros(1, 1), logits[None])[0]
    assert torch.equal(among_top_k(logits, top_k), expected)


def drawn(sampling: Sampling, count: int = 2000) -> list[int]:
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    sampler = Sampler(sampling)
    return [sampler.choose(logits) for _ in range(count)]


def test_draws_follow_the_probabilities() -> None:
    for temperature in (0.5, 1.0, 2.0):
        ids = drawn(Sampling(temperature=temperature))
        shares = (torch.tensor([0.0, 1.0, 2.0]) / temperature).softmax(dim=0)
        counted = torch.bincount(torch.tensor(ids), minlength=4) / len(ids)
        assert counted[3] == 0
        assert torch.allclose(counted[:3], shares, atol=0.04)  # 3.6 deviations of 2,000 draws


def test_temperature_0_and_one_near_it_take_the_likeliest() -> None:
    assert set(drawn(Sampling(temperature=0.0), 5)) == {2}
    assert set(drawn(Sampling(temperature=1e-300), 5)) == {2}


def test_a_seed_gives_the_same_ids_again_and_moves_no_other_generator() -> None:
    before = torch.get_rng_state()
    assert drawn(Sampling(temperature=1.0, seed=5)) == drawn(Sampling(temperature=1.0, seed=5))
    assert drawn(Sampling(temperature=1.0, seed=5)) != drawn(Sampling(temperature=1.0, seed=6))
    assert torch.equal(torch.get_rng_state(), before)


def test_each_of_several_texts_has_a_seed_of_its_own() -> None:
    assert len({derived_seed(seed, number) for seed in range(10) for number in range(10)}) == 100
    assert derived_seed(2**63 - 1, 7) < 2**63

"""From the logits of a position to the id that comes next."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an id is chosen among all: greedily, or drawn."""

    temperature: float = 0.0  # of the softmax; 0 takes the likeliest id
    top_k: int | None = None  # so many of the likeliest ids alone
    top_p: float = 1.0  # of those the fewest that have this much of the probability together
    seed: int = 0


def derived_seed(seed: int, number: int) -> int:
    """The seed of one of several texts, so that a prompt given twice has two continuations."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Sampler:
    """Chooses ids for one text: the same ones for the same seed and logits, on any device."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        # Draws come from the CPU, and from a generator of their own: nobody else's are moved on.
        self.generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits_V: Tensor) -> int:
        """The next id, by fp32 logits of all ids, (V,)."""
        sampling = self.sampling
        if sampling.temperature == 0:
            return int(logits_V.argmax())
        # Less the greatest: a temperature near 0 divides to infinity otherwise.
        from_best_V = (logits_V - logits_V.max()).cpu().double()
        kept_V = among_top_k(from_best_V / sampling.temperature, sampling.top_k)
        kept_V = among_top_p(kept_V, sampling.top_p)
        drawn = torch.multinomial(kept_V.softmax(dim=-1), 1, generator=self.generator)
        return int(drawn)


def among_top_k(logits_V: Tensor, top_k: int | None) -> Tensor:
    """The logits of the likeliest ids, and of others as likely as the last of them; the rest -inf.

    Shape (V,).
    """
    if top_k is None or top_k >= len(logits_V):
        return logits_V
    least = logits_V.topk(top_k).values[-1]
    return logits_V.masked_fill(logits_V < least, -torch.inf)


def among_top_p(logits_V: Tensor, top_p: float) -> Tensor:
    """The logits of the fewest ids with a probability of `top_p` together; the rest -inf, (V,).

    Holtzman et al. 2020, arXiv 1904.09751.
    """
    if top_p >= 1:
        return logits_V
    order = logits_V.sort(descending=True, stable=True)
    shares_V = order.values.softmax(dim=-1)
    before_V = shares_V.cumsum(dim=-1) - shares_V  # of all that are likelier
    before_V[0] = 0.0
    too_many_V = before_V >= top_p
    too_many_V[0] = False  # the likeliest is always among them
    return logits_V.masked_fill(
        torch.zeros_like(too_many_V).scatter(0, order.indices, too_many_V), -torch.inf
    )

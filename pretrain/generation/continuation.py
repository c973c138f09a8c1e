"""A prompt's continuation, id by id, with a KV cache.

What transformers' `generate` gives for the same model, greedily, but for one thing: here a text
ends where the model's context does. Beyond it are positions that training never showed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import DynamicCache

from pretrain.generation.prompts import Prompt
from pretrain.generation.sampling import Sampler, Sampling
from pretrain.generation.text_stream import TextStream
from pretrain.modeling_tablefree import CACHE_FIELD

# Why a text ended.
END_OF_DOCUMENT = "end_of_document"
MAX_NEW_TOKENS = "max_new_tokens"
CONTEXT = "context"


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A model that continues texts, and what makes texts of its ids."""

    # A decoder of transformers, in evaluation mode: that of training, or a GPT-NeoX.
    model: Any
    tokenizer: Tokenizer
    end_ids: frozenset[int]  # that end a document
    seq_len: int  # tokens that the model sees at once


class Continuation:
    """The text after a prompt: go through it for its pieces, then look at what it was.

    After the last piece, `ended` says why it was the last one. The id that ends a document is the
    last of `ids`, and no part of `text`.
    """

    def __init__(
        self, speaker: Speaker, prompt: Prompt, max_new_tokens: int, sampling: Sampling
    ) -> None:
        self.speaker = speaker
        self.prompt = prompt
        self.sampler = Sampler(sampling)
        # The last id needs no place in the context: nothing is asked after it.
        room = speaker.seq_len - len(prompt.ids) + 1
        self.most = min(max_new_tokens, room)
        self.ended = MAX_NEW_TOKENS if max_new_tokens <= room else CONTEXT
        self.ids: list[int] = []
        self.nats = 0.0  # of all ids, by the model's own probabilities, whatever the sampling
        self.text = ""

    @property
    def bits_per_byte(self) -> float | None:
        """By the text's bytes in UTF-8; None for an empty text, or what is no number."""
        text_bytes = len(self.text.encode(errors="replace"))
        if not text_bytes or not math.isfinite(self.nats):
            return None
        return self.nats / (math.log(2) * text_bytes)

    def __iter__(self) -> Iterator[str]:
        """The text, in pieces of whole characters; one may be empty, where a token is none."""
        stream = TextStream(self.speaker.tokenizer, self.prompt.ids)
        cache = DynamicCache()
        given = list(self.prompt.ids)
        for _ in range(self.most):
            given = [self._next(given, cache)]
            if given[0] in self.speaker.end_ids:
                self.ended = END_OF_DOCUMENT
                break
            piece = stream.add(given[0])
            self.text += piece
            yield piece
        rest = stream.finish()
        self.text += rest
        yield rest

    # Not in inference mode: the model keeps constants of its code, which training uses too.
    @torch.no_grad()
    def _next(self, given: list[int], cache: DynamicCache) -> int:
        """The id after all that the cache has and what is given; its nats are counted."""
        model = self.speaker.model
        ids = torch.tensor([given], device=model.device)
        # The cache under the name that this release of transformers has for it.
        named_cache: dict[str, Any] = {CACHE_FIELD: cache}
        output = model(ids, use_cache=True, logits_to_keep=1, **named_cache)
        logits_V = output.logits[0, -1].float()
        chosen = self.sampler.choose(logits_V)
        self.nats -= float(logits_V.log_softmax(dim=-1)[chosen])
        self.ids.append(chosen)
        return chosen

    def complete(self) -> "Continuation":
        """Itself, once all of the text is there."""
        for _ in self:
            pass
        return self

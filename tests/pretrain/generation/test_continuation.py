"""Continuations: transformers' own, greedily, and their ends."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.small_models import as_gpt_neox, greedy, small_model, some_ids
from tokenizers import Tokenizer, decoders, models

from pretrain.generation.continuation import CONTEXT, Continuation, Speaker
from pretrain.generation.prompts import Prompt
from pretrain.generation.sampling import Sampling
from pretrain.modeling_tablefree import INPUT_EMBEDDINGS

SEQ_LEN = 32
GREEDY = Sampling()


def words() -> Tokenizer:
    """A tokenizer whose ids are words."""
    vocabulary = {f" w{number}": number for number in range(300)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" w0"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def speaker_of(model: Any, *end_ids: int) -> Speaker:
    return Speaker(model=model, tokenizer=words(), end_ids=frozenset(end_ids), seq_len=SEQ_LEN)


def prompt_of(seed: int, tokens: int = 6) -> Prompt:
    return Prompt(text="", ids=tuple(some_ids(1, tokens, seed)[0].tolist()))


@pytest.mark.parametrize("is_stock", [False, True])
@pytest.mark.parametrize("kind", INPUT_EMBEDDINGS)
def test_greedy_ids_are_those_of_transformers(kind: str, is_stock: bool) -> None:
    model: Any = as_gpt_neox(small_model(kind)) if is_stock else small_model(kind)
    for seed in range(3):
        prompt = prompt_of(seed)
        own = Continuation(speaker_of(model), prompt, 12, GREEDY).complete()
        assert [own.ids] == greedy(model, torch.tensor([prompt.ids]), None, use_cache=True)
        assert own.ended == "max_new_tokens"


def test_the_nats_are_those_of_one_pass_over_the_whole_text() -> None:
    model = small_model()
    prompt = prompt_of(1)
    for sampling in (GREEDY, Sampling(temperature=1.7, top_p=0.9, top_k=50, seed=3)):
        own = Continuation(speaker_of(model), prompt, 20, sampling).complete()
        ids = torch.tensor([*prompt.ids, *own.ids])
        with torch.no_grad():
            logits = model(ids[None, :-1]).logits[0, len(prompt.ids) - 1 :]
        nats = F.cross_entropy(logits, torch.tensor(own.ids), reduction="sum").item()
        assert own.nats == pytest.approx(nats, rel=1e-5)
        text_bytes = len(own.text.encode())
        assert own.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
        assert own.text == words().decode(own.ids, skip_special_tokens=False)


def test_a_text_ends_with_its_document() -> None:
    prompt = prompt_of(2)
    ids = Continuation(speaker_of(small_model()), prompt, 12, GREEDY).complete().ids
    end = next(new_id for new_id in ids[1:] if new_id != ids[0])
    own = Continuation(speaker_of(small_model(), end), prompt, 12, GREEDY).complete()
    assert own.ended == "end_of_document"
    assert own.ids == ids[: ids.index(end) + 1]
    assert own.text == words().decode(own.ids[:-1])


def test_an_empty_text_has_no_bits_per_byte() -> None:
    prompt = prompt_of(2)
    first = Continuation(speaker_of(small_model()), prompt, 1, GREEDY).complete().ids[0]
    own = Continuation(speaker_of(small_model(), first), prompt, 9, GREEDY).complete()
    assert (own.text, own.bits_per_byte, own.ids) == ("", None, [first])


@pytest.mark.parametrize("tokens", [SEQ_LEN - 3, SEQ_LEN])
def test_a_text_ends_where_the_context_does(tokens: int) -> None:
    own = Continuation(speaker_of(small_model()), prompt_of(3, tokens), 100, GREEDY).complete()
    # The model never sees more than its context: of the last id it is asked nothing.
    assert len(own.ids) == SEQ_LEN - tokens + 1
    assert own.ended == CONTEXT


def test_it_leaves_the_model_and_all_random_numbers_as_they_were() -> None:
    model = small_model()
    state = torch.get_rng_state()
    Continuation(speaker_of(model), prompt_of(4), 5, Sampling(temperature=1.0)).complete()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    # Constants of the code are no tensors of inference mode, which training could not use.
    loss = model(some_ids(1, 8), labels=some_ids(1, 8)).loss
    loss.backward()
    model.zero_grad()

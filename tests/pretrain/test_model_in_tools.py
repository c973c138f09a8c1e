"""What tools of this field ask of a decoder: they find it, or get one sentence; nothing is
ignored in silence.
"""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support.runs import REPOSITORY
from support.small_models import as_gpt_neox, greedy, small_config, small_model, some_ids
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    StaticCache,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pretrain.export_hf import main
from pretrain.modeling_tablefree import (
    INPUT_EMBEDDINGS,
    MODELING_VERSION,
    TableFreeConfig,
    TableFreeForCausalLM,
    TokenCode,
    name_in_checkpoints,
    refuse_other_ids,
)

CUTS = [5, 1, 3, 1, 2]  # a prompt, a token, several at once, ...
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def a_model(input_embedding: str = "binary_code") -> TableFreeForCausalLM:
    """One that a test may change."""
    return copy.deepcopy(small_model(input_embedding))


@pytest.fixture(scope="module")
def export(text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained run as remote code."""
    output = tmp_path_factory.mktemp("export") / "tablefree"
    main(["--run-dir", str(text_run), "--output-dir", str(output)])
    return output


def load(export: Path, auto: Any = AutoModelForCausalLM) -> Any:
    return auto.from_pretrained(export, trust_remote_code=True).eval()


# KV caches


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@torch.no_grad()
def test_a_cache_is_used_under_either_of_its_names(name: str) -> None:
    model, ids = small_model(), some_ids(2, sum(CUTS))
    cache = DynamicCache()
    pieces = [model(piece, **{name: cache}).logits for piece in ids.split(CUTS, dim=1)]
    assert cache.get_seq_length() == sum(CUTS)
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, **CLOSE)


@torch.no_grad()
def test_a_cache_comes_back_unless_it_is_not_wanted() -> None:
    model, ids = small_model(), some_ids(1, 6)
    assert model(ids).past_key_values.get_seq_length() == 6
    assert model(ids, use_cache=False).past_key_values is None
    assert a_model().train()(ids).past_key_values is None


@torch.no_grad()
def test_a_static_cache_gives_the_logits_of_the_whole_padded_or_not() -> None:
    model, ids = small_model(), some_ids(2, sum(CUTS))
    whole, mask = torch.ones_like(ids), torch.ones_like(ids)
    mask[0, :3] = 0
    for visible in (whole, mask):
        positions = (visible.cumsum(1) - 1).clamp(min=0)
        expected = model(ids, attention_mask=visible, position_ids=positions).logits
        cache, pieces, seen = StaticCache(config=model.config, max_cache_len=20), [], 0
        for piece in ids.split(CUTS, dim=1):
            seen += piece.shape[1]
            where = positions[:, seen - piece.shape[1] : seen]
            output = model(
                piece, attention_mask=visible[:, :seen], position_ids=where, past_key_values=cache
            )
            pieces.append(output.logits)
        torch.testing.assert_close(torch.cat(pieces, 1)[:, 3:], expected[:, 3:], **CLOSE)
    unmasked = StaticCache(config=model.config, max_cache_len=20)
    pieces = [model(piece, past_key_values=unmasked).logits for piece in ids.split(CUTS, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, **CLOSE)


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}],
)
def test_every_way_to_generate_gives_the_text_of_stock_gpt_neox(options: dict[str, Any]) -> None:
    ids = some_ids(1, 7)
    common = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 299}
    texts = [
        model.generate(ids, **common, **options)
        for model in (small_model(), as_gpt_neox(small_model()))
    ]
    assert torch.equal(*texts)


def test_the_attention_mask_must_cover_what_is_in_the_cache() -> None:
    model, ids, cache = small_model(), some_ids(1, 6), DynamicCache()
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask is of 6 tokens, where 12 are to be seen"):
        model(ids, past_key_values=cache, attention_mask=torch.ones_like(ids))


# What is not known is refused


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"state_of_another": torch.ones(1)},
            "got state_of_another, which this modeling_tablefree.py does not know",
        ),
        ({"cache_params": DynamicCache()}, "got cache_params, which"),
        ({"is_causal": False}, "got is_causal, which"),
        ({"output_router_logits": True}, "got output_router_logits, which"),
        (
            {"cu_seq_lens_q": torch.ones(1)},
            "got cu_seq_lens_q, which attn_implementation 'sdpa' does not take",
        ),
        ({"past_key_values": DynamicCache(), "cache": DynamicCache()}, "two KV caches"),
        ({"past_key_values": ((torch.ones(1), torch.ones(1)),)}, "a KV cache of type tuple"),
        ({"output_attentions": True}, r"needs model\.set_attn_implementation\('eager'\)"),
        ({"inputs_embeds": torch.ones(1, 6, 48)}, "input_ids or inputs_embeds, one of the two"),
        (
            {"labels": some_ids(1, 6), "logits_to_keep": 2},
            "labels need the logits of all positions",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        small_model()(some_ids(1, 6), **arguments)


@pytest.mark.parametrize("input_embedding", INPUT_EMBEDDINGS)
@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (
            [5, 300, 7],
            "got the id 300, outside 0 to 299, of vocab_size 300; resize_token_embeddings makes "
            "room",
        ),
        ([5, 4096 + 9, 7], "got the id 4105, outside"),  # the bits of id 9
        ([5, 2**40 + 9, 7], "got the id 1099511627785, outside"),
        ([-1, 299], "got the id -1, outside"),
        ([5, -100], "got the id -100, outside"),
        (
            [5.0, 7.0],
            r"takes input_ids as whole numbers, not torch\.float32; embeddings go as inputs_embeds",
        ),
        ([True, False], r"whole numbers, not torch\.bool"),
    ],
)
def test_ids_that_the_model_lacks_are_refused(
    input_embedding: str, ids: list[float], says: str
) -> None:
    model = small_model(input_embedding)
    for one in (model, model.base_model):
        with pytest.raises(ValueError, match=says) as caught:
            one(torch.tensor([ids]))
        assert "\n" not in str(caught.value)
    assert model(torch.tensor([[0, 299]])).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@torch.no_grad()
def test_ids_of_any_whole_numbers_are_taken(dtype: torch.dtype) -> None:
    ids = some_ids(1, 9) % 128
    assert torch.equal(small_model()(ids.to(dtype)).logits, small_model()(ids).logits)


@torch.no_grad()
def test_ids_without_values_are_taken() -> None:
    """Under vmap each row is an id tensor whose values can't be read."""
    model, ids = small_model(), some_ids(2, 9)
    each = torch.func.vmap(lambda row: model(row[None], use_cache=False).logits)(ids)
    torch.testing.assert_close(each[:, 0], model(ids).logits, **CLOSE)
    assert a_model().to("meta")(ids.to("meta"), use_cache=False).logits.shape == (2, 9, 300)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_ids_are_looked_at_without_waiting_for_it() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        refuse_other_ids(some_ids(2, 9).pin_memory().to("cuda", non_blocking=True), 300)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    program = (
        "import torch; from pretrain.modeling_tablefree import refuse_other_ids; "
        "refuse_other_ids(torch.tensor([[300]], device='cuda'), 300); torch.cuda.synchronize()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ended.returncode != 0
    assert "assert" in ended.stderr


def test_what_asks_for_nothing_is_taken() -> None:
    model, ids = small_model(), some_ids(1, 6)
    nothing = {"state_of_another": None, "output_router_logits": False, "output_attentions": False}
    assert torch.equal(model(ids, **nothing).logits, model(ids).logits)


# The backbone and its head


@pytest.mark.parametrize("input_embedding", INPUT_EMBEDDINGS)
@torch.no_grad()
def test_the_base_model_s_hidden_states_through_the_head_are_the_logits(
    input_embedding: str,
) -> None:
    model, ids = small_model(input_embedding), some_ids(2, 9)
    hidden = model.base_model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
    ).last_hidden_state
    assert torch.equal(F.linear(hidden, model.lm_head.weight), model(ids).logits)
    assert model.get_output_embeddings() is model.lm_head
    assert torch.equal(model.base_model(ids, return_dict=False)[0], hidden)


@torch.no_grad()
def test_auto_model_gives_the_backbone(export: Path) -> None:
    whole, backbone, ids = load(export), load(export, AutoModel), some_ids(2, 9)
    assert type(backbone).__name__ == "TableFreeModel"
    assert torch.equal(backbone(ids).last_hidden_state, whole.base_model(ids).last_hidden_state)


@torch.no_grad()
def test_outputs_as_a_tuple_begin_with_the_loss_if_there_is_one() -> None:
    model, ids = small_model(), some_ids(2, 9)
    expected = model(ids, labels=ids, use_cache=False)
    loss, logits = model(ids, labels=ids, use_cache=False, return_dict=False)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)


@pytest.mark.parametrize("input_embedding", INPUT_EMBEDDINGS)
@torch.no_grad()
def test_embeddings_of_the_ids_are_taken_for_the_ids(input_embedding: str) -> None:
    model, ids = small_model(input_embedding), some_ids(2, 9)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)
    # servers have no batch dimension
    assert torch.equal(model.get_input_embeddings()(ids[0]), embedded[0])
    assert torch.equal(a_model(input_embedding).bfloat16()(inputs_embeds=embedded).logits,
                       a_model(input_embedding).bfloat16()(ids).logits)  # fmt: skip


@torch.no_grad()
def test_a_tensor_says_which_logits_to_keep() -> None:
    model, ids = small_model(), some_ids(2, 9)
    keep = torch.tensor([1, 4])
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, model(ids).logits[:, keep])


@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_stock_gpt_neox() -> None:
    model, stock, ids = a_model(), as_gpt_neox(small_model()), some_ids(2, 9)
    for one in (model, stock):
        one.set_attn_implementation("eager")
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for visible in (None, mask):
        mine, theirs = (
            one(ids, attention_mask=visible, output_hidden_states=True, output_attentions=True)
            for one in (model, stock)
        )
        assert len(mine.hidden_states) == len(theirs.hidden_states) == 4
        assert len(mine.attentions) == len(theirs.attentions) == 3
        for ours, stocks in zip(mine.hidden_states, theirs.hidden_states, strict=True):
            torch.testing.assert_close(ours[:, 3:], stocks[:, 3:], **CLOSE)
        for ours, stocks in zip(mine.attentions, theirs.attentions, strict=True):
            torch.testing.assert_close(ours[:, :, 3:], stocks[:, :, 3:], **CLOSE)


# Attention


@pytest.mark.parametrize(
    "implementation", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_every_way_to_attend_gives_the_same_logits(implementation: str) -> None:
    model, ids = a_model(), some_ids(2, 16)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = [model(ids).logits, model(ids, attention_mask=mask).logits[:, 5:]]
    model.set_attn_implementation(implementation)
    assert model.model.layers[0].attention.config._attn_implementation == implementation
    for got, wanted in zip(
        [model(ids).logits, model(ids, attention_mask=mask).logits[:, 5:]], expected, strict=True
    ):
        torch.testing.assert_close(got, wanted, **CLOSE)
    if implementation == "eager":
        assert greedy(model, ids, mask, use_cache=True) == greedy(
            small_model(), ids, mask, use_cache=True
        )


@torch.no_grad()
def test_a_server_s_attention_function_finds_what_it_needs() -> None:
    seen: list[int] = []

    def serve(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        scaling: float,
        **more: Any,
    ) -> Any:
        seen.append(module.layer_idx)
        assert mask is None
        assert more["attention_instances"][module.layer_idx] == "its cache"
        assert module.is_causal
        attended = F.scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=True)
        return attended.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("of a server", serve)
    model, ids = a_model(), some_ids(1, 9)
    model.config._attn_implementation = "of a server"
    output = model.base_model(
        inputs_embeds=model.get_input_embeddings()(ids[0])[None],
        position_ids=torch.arange(9)[None],
        use_cache=False,
        attention_instances=dict.fromkeys(range(3), "its cache"),
        return_dict=False,
    )
    assert seen == [0, 1, 2]
    torch.testing.assert_close(output[0], small_model().base_model(ids).last_hidden_state, **CLOSE)


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_positions_that_start_anew_keep_documents_apart(use_cache: bool) -> None:
    model, ids = small_model(), some_ids(2, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    logits = model(ids, position_ids=positions, use_cache=use_cache).logits
    alone = [model(part).logits for part in ids.split([5, 7], dim=1)]
    torch.testing.assert_close(logits, torch.cat(alone, dim=1), **CLOSE)


# What trl's collator gives with packing, beside positions.
PACKED: dict[str, Any] = {
    "cu_seq_lens_q": torch.tensor([0, 5, 12], dtype=torch.int32), "max_length_q": 7,
    "cu_seq_lens_k": torch.tensor([0, 5, 12], dtype=torch.int32), "max_length_k": 7,
    "seq_idx": torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32),
}  # fmt: skip
POSITIONS = torch.cat([torch.arange(5), torch.arange(7)])[None]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_where_documents_begin_may_be_said_beside_positions_that_say_the_same(
    implementation: str,
) -> None:
    model, ids = a_model(), some_ids(1, 12)
    model.set_attn_implementation(implementation)
    expected = torch.cat([model(part).logits for part in ids.split([5, 7], dim=1)], dim=1)
    for use_cache in (True, False):
        logits = model(ids, position_ids=POSITIONS, use_cache=use_cache, **PACKED).logits
        torch.testing.assert_close(logits, expected, **CLOSE)
    documents = [{"input_ids": part[0].tolist()} for part in ids.split([5, 7], dim=1)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(
        documents
    )
    assert PACKED.keys() <= batch.keys()
    torch.testing.assert_close(model(**batch).logits, expected, **CLOSE)


@pytest.mark.parametrize("name", PACKED)
def test_where_documents_begin_is_refused_if_positions_do_not_say_so(name: str) -> None:
    model, ids, filled = small_model(), some_ids(1, 12), DynamicCache()
    model(ids, past_key_values=filled)
    told = {name: PACKED[name]}
    says = (
        f"got {name}, which attn_implementation 'sdpa' does not take except beside position_ids "
        "that start anew"
    )
    beside: list[dict[str, Any]] = [
        {}, {"position_ids": POSITIONS, "attention_mask": torch.ones_like(ids)},
        {"position_ids": POSITIONS, "past_key_values": filled},
    ]  # fmt: skip
    if not name.startswith("max_length"):  # which says of no place that a document begins there
        beside.append({"position_ids": torch.arange(12)[None]})
    for more in beside:
        with pytest.raises(ValueError, match=says):
            model(ids, **told, **more)


# Training by others


def gradients(model: TableFreeForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False, None])
def test_gradient_checkpointing_gives_the_gradients_of_keeping_everything(
    reentrant: bool | None,
) -> None:
    model, ids = a_model().train(), some_ids(2, 9)
    kept = gradients(model, ids)
    options = None if reentrant is None else {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    calls: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    recomputed = gradients(model, ids)
    assert sorted(calls) == [0, 0, 1, 1, 2, 2]
    assert recomputed.keys() == kept.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(recomputed[name], kept[name]) for name in kept)


def test_gradient_checkpointing_with_a_cache_has_none() -> None:
    model, ids = a_model().train(), some_ids(1, 6)
    model.gradient_checkpointing_enable()
    cache = DynamicCache()
    assert model(ids, use_cache=True, past_key_values=cache).past_key_values is None
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(ids, past_key_values=cache)  # nothing is recomputed here
    with pytest.raises(ValueError, match="it takes no KV cache"):
        model(ids, past_key_values=cache)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_that_trains_with_gradient_checkpointing_generates_what_it_does_otherwise(
    reentrant: bool,
) -> None:
    model, ids = a_model().train(), some_ids(2, 5)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert greedy(model, ids, None, use_cache=True) == greedy(
        small_model(), ids, None, use_cache=True
    )


def test_inputs_can_be_made_to_require_gradients() -> None:
    model, ids = a_model().train(), some_ids(1, 6)
    model.requires_grad_(requires_grad=False)
    model.enable_input_require_grads()
    assert model(ids).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(ids).logits.requires_grad


@torch.no_grad()
def test_the_loss_of_any_split_is_that_of_stock_gpt_neox() -> None:
    model, stock, ids = small_model(), as_gpt_neox(small_model()), some_ids(3, 20)
    labels = ids.clone()
    labels[0, 8:] = -100
    whole = model(ids, labels=labels).loss
    targets = int((labels[:, 1:] != -100).sum())
    for sizes in ([1, 1, 1], [2, 1], [3]):
        parts = list(zip(ids.split(sizes), labels.split(sizes), strict=True))
        mine, theirs = (
            sum(
                one(i, labels=own, num_items_in_batch=torch.tensor(targets)).loss
                for i, own in parts
            )
            for one in (model, stock)
        )
        torch.testing.assert_close(mine, theirs, **CLOSE)
        torch.testing.assert_close(mine, whole, **CLOSE)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, whole, **CLOSE)


# The vocabulary


@pytest.mark.parametrize("input_embedding", INPUT_EMBEDDINGS)
def test_the_vocabulary_grows_and_shrinks_as_far_as_the_code_goes(
    input_embedding: str, tmp_path: Path
) -> None:
    model, ids = a_model(input_embedding), some_ids(2, 9)
    with torch.no_grad():
        before = model(ids).logits
        assert model.resize_token_embeddings(310) is model.get_input_embeddings()
        assert model.config.vocab_size == model.lm_head.out_features == 310
        torch.testing.assert_close(model(ids).logits[..., :300], before, **CLOSE)
        assert model(torch.tensor([[309]])).logits.isfinite().all()
        model.resize_token_embeddings(pad_to_multiple_of=64)
        assert model.config.vocab_size == 320
        model.resize_token_embeddings(256)
        torch.testing.assert_close(
            model(ids % 256).logits, small_model(input_embedding)(ids % 256).logits[..., :256]
        )
    model.save_pretrained(tmp_path)
    assert TableFreeForCausalLM.from_pretrained(tmp_path).config.vocab_size == 256
    if input_embedding != "learned":
        with pytest.raises(
            ValueError, match="4097 ids are more than 12 bits tell apart: 4096 at most"
        ):
            model.resize_token_embeddings(4097)
        assert model.config.vocab_size == model.lm_head.out_features == 256


@pytest.mark.parametrize("input_embedding", INPUT_EMBEDDINGS)
@pytest.mark.parametrize(
    ("size", "says"),
    [
        ({"new_num_tokens": -3}, "got new_num_tokens -3, which is no positive"),
        ({"new_num_tokens": 0}, "got new_num_tokens 0, which"),
        ({"pad_to_multiple_of": -8}, "got pad_to_multiple_of -8, which"),
    ],
)
def test_a_vocabulary_has_a_positive_size(
    input_embedding: str, size: dict[str, int], says: str
) -> None:
    model = small_model(input_embedding)
    for one in (model, model.base_model):
        with pytest.raises(ValueError, match=says):
            one.resize_token_embeddings(**size)
    assert model.config.vocab_size == model.lm_head.out_features == 300


def test_the_backbone_of_a_code_has_nothing_to_resize() -> None:
    backbone = small_model().base_model
    with pytest.raises(
        ValueError, match=r"no table and no head to resize; TableFreeForCausalLM\.resize_token_emb"
    ):
        backbone.resize_token_embeddings(310)
    assert backbone.resize_token_embeddings() is backbone.get_input_embeddings()
    assert a_model("learned").base_model.resize_token_embeddings(310).weight.shape == (310, 48)


def test_growing_to_the_code_of_ones_says_which_two_ids_are_one_input(
    caplog: pytest.LogCaptureFixture,
) -> None:
    import transformers

    model = a_model()
    transformers.utils.logging.enable_propagation()
    try:
        model.resize_token_embeddings(4095)
        assert "one input" not in caplog.text
        model.resize_token_embeddings(4096)
        assert "Ids 0 and 4095 are one input to this model now" in caplog.text
    finally:
        transformers.utils.logging.disable_propagation()


def test_who_asks_the_code_for_a_table_is_told_that_there_is_none() -> None:
    model = a_model()
    code = model.get_input_embeddings()
    for name in ("weight", "num_embeddings", "embedding_dim"):
        assert not hasattr(code, name)
        with pytest.raises(
            AttributeError,
            match=f"a fixed code of the token ids, without a table: there is no {name}",
        ):
            getattr(code, name)
    model.set_input_embeddings(torch.nn.Embedding(300, 48))
    assert model.get_input_embeddings() is code
    # where peft's prompt tuning looks
    assert model.get_submodule("embeddings.word_embeddings") is code
    learned, table = a_model("learned"), torch.nn.Embedding(300, 48)
    learned.set_input_embeddings(table)
    assert learned.get_input_embeddings() is table


# Exports of before


def as_before(export: Path, output: Path) -> Path:
    """The export as it was made before MODELING_VERSION 2, but for its modelling file."""
    shutil.copytree(export, output)
    weights = load_file(export / "model.safetensors")
    renamed = {name_in_checkpoints(name): values for name, values in weights.items()}
    assert {
        "layers.0.mlp.up.weight",
        "final_norm.bias",
        "output_projection.weight",
    } <= renamed.keys()
    save_file(renamed, output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((export / "config.json").read_text())
    del config["modeling_version"], config["auto_map"]["AutoModel"]
    (output / "config.json").write_text(json.dumps(config))
    return output


@torch.no_grad()
def test_weights_under_their_names_of_before_load_and_are_saved_under_today_s(
    export: Path, tmp_path: Path
) -> None:
    old = as_before(export, tmp_path / "old")
    model, info = AutoModelForCausalLM.from_pretrained(
        old, trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = some_ids(2, 9)
    assert torch.equal(model(ids).logits, load(export)(ids).logits)
    model.save_pretrained(tmp_path / "again")
    names = load_file(tmp_path / "again" / "model.safetensors").keys()
    assert names == load_file(export / "model.safetensors").keys()
    assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)


# Configurations


def change(export: Path, output: Path, **keys: Any) -> Path:
    shutil.copytree(export, output)
    config = json.loads((export / "config.json").read_text()) | keys
    (output / "config.json").write_text(json.dumps(config))
    return output


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"modeling_version": MODELING_VERSION + 1},
            r"modeling_version 3 is newer than this modeling_tablefree\.py",
        ),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "rope_scaling is unknown to this modeling_tablefree.py",
        ),
        ({"num_key_value_heads": 2}, "num_key_value_heads is unknown"),
        ({"attention_bias": False}, "attention_bias is unknown"),
        (
            {"add_cross_attention": True},
            "add_cross_attention True asks for what this decoder does not have",
        ),
        ({"cross_attention_hidden_size": 48}, "cross_attention_hidden_size 48 asks for"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads {'0': .1.} asks for"),
        ({"tie_encoder_decoder": True}, "tie_encoder_decoder True asks for"),
        (
            {"num_attention_heads": 8},
            "num_heads 4 and num_attention_heads 8 are two names of one key with two values",
        ),
        (
            {"hidden_size": 96},
            "d_model 48 and hidden_size 96 are two names|hidden_size 96 and d_model 48 are two "
            "names",
        ),
        ({"modeling_version": "new"}, "modeling_version new is newer"),
        ({"d_model": "48"}, "d_model '48' is no positive whole number"),
        ({"num_layers": 0}, "num_layers 0 is no positive whole number"),
        ({"code_bits": 8}, "code_bits 8 tell fewer than vocab_size 512 ids apart"),
        ({"code_bits": 10}, "a code of code_bits 10 does not fill d_model 48 evenly"),
        ({"num_heads": 5}, "d_model 48 is no even number of channels for each of 5 heads"),
        ({"input_embedding": "hashed"}, "input_embedding 'hashed' is none of binary_code"),
        (
            {"input_embedding": "affine_code"},
            "affine_rows and affine_offset are no invertible code of 16 bits",
        ),
        (
            {"input_embedding": "affine_code", "affine_rows": [1] * 16, "affine_offset": 0},
            "no invertible code",
        ),
        (
            {"input_embedding": "permuted_code"},
            "permutation_keys and permutation_offset are no 8 numbers up to 2147483647 and one of "
            "16 bits",
        ),
        (
            {
                "input_embedding": "permuted_code",
                "permutation_keys": [1] * 7,
                "permutation_offset": 0,
            },
            "are no 8 numbers",
        ),
        (
            {
                "input_embedding": "permuted_code",
                "permutation_keys": [1] * 8,
                "permutation_offset": 65536,
            },
            "and one of 16 bits",
        ),
    ],
)
def test_a_config_that_means_another_model_is_refused_in_a_sentence(
    keys: dict[str, Any], says: str, export: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        load(change(export, tmp_path / "changed", **keys))
    assert "\n" not in str(caught.value)


def test_what_tools_note_in_a_config_is_carried_along(export: Path, tmp_path: Path) -> None:
    noted = {
        "made_with": "a tool",
        "trust_remote_code": True,
        "base_model": "x",
        "rope_scaling": None,
        "problem_type": "x",
        "task_specific_params": {"a": 1},
    }
    model = load(change(export, tmp_path / "noted", **noted))
    assert model.config.made_with == "a tool"
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["made_with"] == "a tool"


def test_names_of_transformers_are_ours_in_a_config() -> None:
    config = TableFreeConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=8
    )
    assert (config.d_model, config.num_layers, config.num_heads, config.seq_len) == (48, 2, 4, 8)


def test_one_value_may_have_both_names(tmp_path: Path) -> None:
    config = TableFreeConfig(
        d_model=48, hidden_size=48, num_heads=4, num_attention_heads=None, code_bits=16
    )
    assert (config.d_model, config.num_heads) == (48, 4)
    config.save_pretrained(tmp_path)
    # asked for on top
    assert TableFreeConfig.from_pretrained(tmp_path, num_attention_heads=6).num_heads == 6


@torch.no_grad()
def test_a_full_config_of_transformers_4_loads(export: Path, tmp_path: Path) -> None:
    """The keys that `to_json_file(path, use_diff=False)` of 4.57.3 writes for any model."""
    of_any_model = {
        "add_cross_attention": False,
        "bad_words_ids": None,
        "begin_suppress_tokens": None,
        "chunk_size_feed_forward": 0,
        "cross_attention_hidden_size": None,
        "decoder_start_token_id": None,
        "diversity_penalty": 0.0,
        "do_sample": False,
        "early_stopping": False,
        "encoder_no_repeat_ngram_size": 0,
        "exponential_decay_length_penalty": None,
        "finetuning_task": None,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "is_decoder": False,
        "is_encoder_decoder": False,
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "length_penalty": 1.0,
        "max_length": 20,
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "num_beam_groups": 1,
        "num_beams": 1,
        "num_return_sequences": 1,
        "output_attentions": False,
        "output_hidden_states": False,
        "output_scores": False,
        "prefix": None,
        "problem_type": None,
        "pruned_heads": {},
        "remove_invalid_values": False,
        "repetition_penalty": 1.0,
        "return_dict": True,
        "return_dict_in_generate": False,
        "sep_token_id": None,
        "suppress_tokens": None,
        "task_specific_params": None,
        "temperature": 1.0,
        "tf_legacy_loss": False,
        "tie_encoder_decoder": False,
        "tokenizer_class": None,
        "top_k": 50,
        "top_p": 1.0,
        "torchscript": False,
        "typical_p": 1.0,
        "use_bfloat16": False,
    }
    model, ids = load(change(export, tmp_path / "full", **of_any_model)), some_ids(2, 9)
    assert torch.equal(model(ids).logits, load(export)(ids).logits)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)


# Programs made of the model


@pytest.mark.parametrize("input_embedding", INPUT_EMBEDDINGS)
def test_the_model_is_exported_with_any_batch_and_length(input_embedding: str) -> None:
    model = a_model(input_embedding)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.model(ids, attention_mask=mask, use_cache=False).logits

    mask = torch.ones(2, 12, dtype=torch.long)
    sizes = {
        0: torch.export.Dim("batch", min=2, max=64),
        1: torch.export.Dim("tokens", min=2, max=1000),
    }
    program = torch.export.export(
        Logits().eval(), (some_ids(2, 12), mask), dynamic_shapes=(sizes, sizes)
    )
    used = {str(node.target) for node in program.graph.nodes}
    # for which ONNX has no function on int64
    assert not [name for name in used if "__rshift__" in name]
    other, padded = some_ids(3, 7), torch.ones(3, 7, dtype=torch.long)
    padded[1, :2] = 0
    with torch.no_grad():
        expected = model(other, attention_mask=padded).logits  # no constant of the trace was kept
        torch.testing.assert_close(program.module()(other, padded), expected, **CLOSE)


def test_the_whole_forward_pass_is_one_graph() -> None:
    model, ids = a_model(), some_ids(2, 9)
    torch._dynamo.reset()
    compiled: Callable[..., Any] = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(ids, use_cache=False).logits, model(ids).logits, **CLOSE
        )


def test_the_code_is_of_the_config_alone() -> None:
    assert not list(TokenCode(small_config()).state_dict())

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.code_statistics import avalanche, linear_bias, some_masks
from support.small_models import as_gpt_neox, greedy, small_config, small_model, some_ids
from torch import Tensor

from pretrain.config.recipe import ModelRecipe
from pretrain.model.build import model_config
from pretrain.modeling_tablefree import (
    INPUT_EMBEDDINGS,
    PERMUTATION_ROUNDS,
    ROUND_MASK,
    TableFreeForCausalLM,
    TokenCode,
    agrees_with_an_affine_map,
    bits_needed,
    checkpoint_parameters,
    draw_affine_code,
    draw_permuted_code,
    gf2_rank,
    initialise_parameters,
    permuted,
)

ALL_IDS = torch.arange(65_536)[None]
Floats = npt.NDArray[np.float64]


# Token codes


def token_code(input_embedding: str, d_model: int, code_bits: int, code_seed: int = 0) -> TokenCode:
    recipe = ModelRecipe(
        vocab_size=65_536, d_model=d_model, num_layers=1, num_heads=1, seq_len=1,
        input_embedding=input_embedding, code_bits=code_bits, code_seed=code_seed,
    )  # fmt: skip
    return TokenCode(model_config(recipe))


def bits_of(ids: npt.NDArray[np.int64], code_bits: int) -> npt.NDArray[np.uint8]:
    """The bits as NumPy unpacks them from eight little-endian bytes."""
    as_bytes = ids.astype("<u8")[:, None].view(np.uint8)
    return np.unpackbits(as_bytes, axis=1, bitorder="little")[:, :code_bits]


def test_binary_codes_are_the_bits_of_all_65536_ids() -> None:
    codes = token_code("binary_code", 64, 16).code(ALL_IDS)[0]
    assert codes.shape == (65_536, 16)
    np.testing.assert_array_equal(codes, bits_of(np.arange(65_536), 16))


@pytest.mark.parametrize(
    ("token", "code"),
    [
        (0, [0] * 16),
        (1, [1] + [0] * 15),
        (32_767, [1] * 15 + [0]),
        (32_768, [0] * 15 + [1]),
        (65_535, [1] * 16),
    ],
)
def test_binary_code_of_the_ids_where_integers_turn_over(token: int, code: list[int]) -> None:
    tokens = torch.tensor([[token]])
    embedded = token_code("binary_code", 48, 16)(tokens, torch.float32)
    # least significant bit first, the whole code repeated d_model / K times
    assert embedded.tolist() == [[code * 3]]


def test_a_code_wider_than_needed_is_zero_above_and_still_injective() -> None:
    codes = token_code("binary_code", 48, 24).code(ALL_IDS)[0]
    np.testing.assert_array_equal(codes[:, :16], bits_of(np.arange(65_536), 16))
    assert not codes[:, 16:].any()
    for drawn in ("affine_code", "permuted_code"):
        codes = token_code(drawn, 48, 24).code(ALL_IDS)[0]
        assert len(np.unique(np.packbits(codes, axis=1), axis=0)) == 65_536


@pytest.mark.parametrize("code_seed", [0, 1, 2])
def test_affine_code_is_a_bijection_of_all_65536_ids_and_equals_a_bits_xor_b(
    code_seed: int,
) -> None:
    codes = token_code("affine_code", 16, 16, code_seed).code(ALL_IDS)[0].numpy()
    as_numbers = codes @ (1 << np.arange(16))
    assert sorted(as_numbers) == list(range(65_536))

    rows, offset = draw_affine_code(16, code_seed)
    matrix, shift = bits_of(np.array(rows), 16).astype(int), bits_of(np.array([offset]), 16)[0]
    np.testing.assert_array_equal(codes, (bits_of(np.arange(65_536), 16) @ matrix.T) % 2 ^ shift)


@pytest.mark.parametrize("code_bits", [1, 2, 9, 16, 24, 62])
def test_affine_code_is_drawn_from_its_seed_and_invertible(code_bits: int) -> None:
    rows, offset = draw_affine_code(code_bits, 5)
    assert (rows, offset) == draw_affine_code(code_bits, 5)
    assert gf2_rank(rows) == code_bits
    assert all(0 <= value < 2**code_bits for value in [*rows, offset])
    if code_bits > 2:
        assert (rows, offset) != draw_affine_code(code_bits, 6)


def feistel(number: int, code_bits: int, keys: list[int]) -> int:
    """The permutation of a permuted code, written out from its description with Python's integers,
    which have no width.
    """
    low_bits = code_bits // 2
    high, low = divmod(number, 2**low_bits)
    for index, key in enumerate(keys):
        turned = (low if index % 2 else high) ^ key
        product = turned * 0x4F1BBCDD % 2**31
        word = (product ^ product // 2**15) * 0x3504F333 // 2**16
        if index % 2:
            high ^= word % 2 ** (code_bits - low_bits)
        else:
            low ^= word % 2**low_bits
    return high * 2**low_bits + low


@pytest.mark.parametrize("code_bits", range(1, 17))
def test_permuted_code_is_a_bijection_of_all_ids_and_not_affine(code_bits: int) -> None:
    ids = torch.arange(2**code_bits)
    for seed in range(4):
        keys, offset = draw_permuted_code(code_bits, seed)
        images = permuted(ids, code_bits, keys)
        assert torch.equal(images.sort().values, ids)
        assert torch.equal(permuted(images, code_bits, keys, backwards=True), ids)
        assert 0 <= offset < 2**code_bits
        # Linearity, seen otherwise than where keys are drawn: each sum of four images whose ids sum
        # to 0 would be 0.
        sums = images ^ images[ids ^ 1] ^ images[ids ^ 2 % len(ids)] ^ images[ids ^ 3 % len(ids)]
        looked_linear = agrees_with_an_affine_map(code_bits, keys)
        assert looked_linear == (code_bits < 3)
        if code_bits > 5:
            assert (sums != 0).float().mean() > 0.5


@pytest.mark.parametrize("code_seed", [0, 1, 2])
def test_permuted_code_is_the_bits_of_the_permuted_id_xor_the_offset(code_seed: int) -> None:
    codes = token_code("permuted_code", 32, 16, code_seed).code(ALL_IDS)[0]
    keys, offset = draw_permuted_code(16, code_seed)
    images = permuted(ALL_IDS[0], 16, keys) ^ offset
    np.testing.assert_array_equal(codes, bits_of(images.numpy(), 16))


@given(st.integers(1, 62), st.integers(0, 2**64), st.integers(0, 2**31), st.booleans())
def test_permuted_codes_are_exact_in_64_bits(
    code_bits: int, number: int, seed: int, largest: bool
) -> None:
    """No product overflows, where runtimes differ; also with the largest key and halves."""
    keys, _ = draw_permuted_code(code_bits, seed)
    if largest:
        keys = [ROUND_MASK] * PERMUTATION_ROUNDS
    number = 2**code_bits - 1 if largest else number % 2**code_bits
    image = permuted(torch.tensor(number), code_bits, keys)
    assert int(image) == feistel(number, code_bits, keys)
    assert int(permuted(image, code_bits, keys, backwards=True)) == number


@pytest.mark.parametrize(("code_bits", "most_bias", "least", "most"), [
    (8, 0.38, 0.35, 0.65), (16, 0.024, 0.485, 0.515),
])  # fmt: skip
def test_permuted_code_is_as_far_from_linear_as_random_permutations(
    code_bits: int, most_bias: float, least: float, most: float
) -> None:
    """The bounds are met by random permutations; an affine code has a bias of 1."""
    numbers = np.arange(2**code_bits)
    masks = some_masks(code_bits)
    chance = np.random.default_rng(1).permutation(2**code_bits)
    seeds = range(3)
    drawn = [draw_permuted_code(code_bits, seed)[0] for seed in seeds]
    permutations = [permuted(torch.from_numpy(numbers), code_bits, keys).numpy() for keys in drawn]
    for images in (*permutations, chance):
        assert linear_bias(images, masks) < most_bias
        turned = avalanche(images)
        assert least < turned.min()
        assert turned.max() < most
    rows, offset = draw_affine_code(code_bits, 0)
    matrix = bits_of(np.array(rows), code_bits).astype(int)
    affine = bits_of(numbers, code_bits) @ matrix.T % 2 @ (1 << np.arange(code_bits)) ^ offset
    assert linear_bias(affine, masks) == 1


@pytest.mark.parametrize("code_bits", [1, 3, 9, 16, 62])
def test_permuted_code_is_drawn_from_its_seed(code_bits: int) -> None:
    drawn = draw_permuted_code(code_bits, 5)
    keys, offset = drawn
    assert drawn == draw_permuted_code(code_bits, 5)
    assert keys != draw_permuted_code(code_bits, 6)[0]
    assert len(keys) == PERMUTATION_ROUNDS
    assert all(0 <= key <= ROUND_MASK for key in keys)
    assert 0 <= offset < 2**code_bits


@given(st.lists(st.integers(0, 63), max_size=6))
def test_gf2_rank_counts_the_sums_that_the_rows_span(rows: list[int]) -> None:
    span = {0}
    for row in rows:
        span |= {row ^ other for other in span}
    assert 2 ** gf2_rank(rows) == len(span)


@given(st.integers(2, 65_536))
def test_bits_needed_is_the_ceiling_of_the_binary_logarithm(vocab_size: int) -> None:
    assert 2 ** (bits_needed(vocab_size) - 1) < vocab_size <= 2 ** bits_needed(vocab_size)


@pytest.mark.parametrize("input_embedding", ["binary_code", "affine_code", "permuted_code"])
def test_a_fixed_code_has_neither_parameter_nor_buffer(input_embedding: str) -> None:
    model = TableFreeForCausalLM(small_config(input_embedding))
    assert (
        list(model.model.input_embedding.parameters())
        == list(model.model.input_embedding.buffers())
        == []
    )
    assert not [name for name in model.state_dict() if "input_embedding" in name]
    assert list(model.buffers()) == []  # a non-persistent one would load as uninitialised memory


# The decoder


def layer_norm(x: Floats, weight: Floats, bias: Floats) -> Floats:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(
        x.var(-1, keepdims=True) + 1e-5
    ) * weight + bias


def numpy_logits(model: TableFreeForCausalLM, ids: npt.NDArray[np.int64]) -> Floats:
    """The decoder of design.md section 1, one sequence, written out from the paper's description
    in NumPy.
    """
    c = model.config
    p = {name: value.detach().double().numpy() for name, value in checkpoint_parameters(model)}
    if c.input_embedding == "learned":
        x = p["input_embedding.weight"][ids]
    else:
        code = bits_of(ids, c.code_bits).astype(int)
        if c.input_embedding == "affine_code":
            code = code @ bits_of(np.array(c.affine_rows), c.code_bits).T % 2 ^ bits_of(
                np.array([c.affine_offset]), c.code_bits
            )
        if c.input_embedding == "permuted_code":
            images = [feistel(int(i), c.code_bits, c.permutation_keys) for i in ids]
            code = bits_of(np.array(images) ^ c.permutation_offset, c.code_bits).astype(int)
        x = np.tile(code, c.d_model // c.code_bits).astype(float)
    tokens, half = len(ids), c.d_model // c.num_heads // 2
    angle = np.arange(tokens)[:, None] / 10_000.0 ** (np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def turn(y: Floats) -> Floats:
        first, second = y[..., :half], y[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    def linear(y: Floats, name: str) -> Floats:
        return y @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    for i in range(c.num_layers):
        at = f"layers.{i}"
        normed = layer_norm(x, p[f"{at}.attention_norm.weight"], p[f"{at}.attention_norm.bias"])
        grouped = linear(normed, f"{at}.attention.query_key_value").reshape(
            tokens, c.num_heads, 3, 2 * half
        )
        q, k, v = turn(grouped[:, :, 0]), turn(grouped[:, :, 1]), grouped[:, :, 2]
        scores = np.einsum("qhc,khc->hqk", q, k) / math.sqrt(2 * half)
        scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hqk,khc->qhc", weights / weights.sum(-1, keepdims=True), v)
        x = x + linear(attended.reshape(tokens, -1), f"{at}.attention.output")
        up = linear(
            layer_norm(x, p[f"{at}.mlp_norm.weight"], p[f"{at}.mlp_norm.bias"]), f"{at}.mlp.up"
        )
        gelu = up * (1 + np.vectorize(math.erf)(up / math.sqrt(2))) / 2
        x = x + linear(gelu, f"{at}.mlp.down")
    return (
        layer_norm(x, p["final_norm.weight"], p["final_norm.bias"])
        @ p["output_projection.weight"].T
    )


@pytest.mark.parametrize("input_embedding", INPUT_EMBEDDINGS)
def test_logits_equal_an_independent_numpy_forward(input_embedding: str) -> None:
    model, ids = small_model(input_embedding), some_ids(2, 17)
    with torch.no_grad():
        logits = model(ids).logits
    for row in range(2):
        expected = numpy_logits(model, ids[row].numpy())
        assert np.abs(expected).max() > 1  # not a comparison of zeros
        np.testing.assert_allclose(logits[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("input_embedding", INPUT_EMBEDDINGS)
def test_logits_equal_stock_gpt_neox_with_the_codes_in_its_table(input_embedding: str) -> None:
    model, ids = small_model(input_embedding), some_ids(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).logits, as_gpt_neox(model)(ids).logits, rtol=1e-5, atol=1e-5
        )


@settings(max_examples=15)
@given(changed=st.integers(0, 15), token=st.integers(0, 299))
def test_a_token_changes_no_logits_before_it(changed: int, token: int) -> None:
    model, ids = small_model(), some_ids(1, 16)
    other = ids.clone()
    other[0, changed] = token
    with torch.no_grad():
        before, after = model(ids).logits, model(other).logits
    torch.testing.assert_close(before[:, :changed], after[:, :changed], rtol=1e-6, atol=1e-6)
    if token != ids[0, changed]:
        assert not torch.allclose(before[:, changed], after[:, changed], atol=1e-3)


def test_labels_give_the_mean_loss_of_the_next_tokens_and_ignore_minus_100() -> None:
    model, ids = small_model(), some_ids(2, 8)
    labels = ids.clone()
    labels[0, 3] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
    nats = -output.logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    counted = torch.ones_like(nats, dtype=torch.bool)
    counted[0, 2] = False
    torch.testing.assert_close(output.loss, nats[counted].mean())


def test_logits_to_keep_are_the_last_ones() -> None:
    model, ids = small_model(), some_ids(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


# Generation


@settings(max_examples=10)
@given(cuts=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_feeding_a_text_in_pieces_through_the_cache_gives_the_logits_of_the_whole(
    cuts: list[int],
) -> None:
    model, ids = small_model(), some_ids(2, sum(cuts))
    pieces, cache = [], None
    with torch.no_grad():
        for piece in ids.split(cuts, dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            pieces.append(output.logits)
            cache = output.past_key_values
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("input_embedding", INPUT_EMBEDDINGS)
def test_generation_with_a_cache_equals_without_and_equals_greedy_by_hand(
    input_embedding: str,
) -> None:
    model, ids = small_model(input_embedding), some_ids(2, 5)
    by_hand = ids
    with torch.no_grad():
        for _ in range(12):
            by_hand = torch.cat([by_hand, model(by_hand).logits[:, -1:].argmax(-1)], 1)
    expected = by_hand[:, 5:].tolist()
    assert len({token for row in expected for token in row}) > 3  # not one token over and over
    assert greedy(model, ids, None, use_cache=True) == expected
    assert greedy(model, ids, None, use_cache=False) == expected


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_left_padded_prompt_generates_what_it_does_alone(use_cache: bool) -> None:
    model, long, short = small_model(), some_ids(1, 9, seed=1), some_ids(1, 4, seed=2)
    padded = torch.cat([torch.full((1, 5), 250), short], 1)
    mask = torch.tensor([[1] * 9, [0] * 5 + [1] * 4])
    together = greedy(model, torch.cat([long, padded]), mask, use_cache)
    assert together == greedy(model, long, None, use_cache) + greedy(model, short, None, use_cache)


def test_left_padding_changes_no_logits_of_the_real_tokens() -> None:
    model, short = small_model(), some_ids(1, 6)
    padded = torch.cat([torch.full((1, 3), 250), short], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    with torch.no_grad():
        logits = model(padded, attention_mask=mask).logits
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(logits[:, 3:], model(short).logits, rtol=1e-4, atol=1e-5)


# Initial and saved weights


def initialised(input_embedding: str, seed: int = 1) -> dict[str, Tensor]:
    model = TableFreeForCausalLM(small_config(input_embedding))
    initialise_parameters(model, seed)
    return {name: value.detach() for name, value in checkpoint_parameters(model)}


def test_shared_weights_of_all_inputs_start_bitwise_equal() -> None:
    of_input = {name: initialised(name) for name in INPUT_EMBEDDINGS}
    shared = of_input["binary_code"]
    assert of_input["learned"].keys() - shared.keys() == {"input_embedding.weight"}
    for input_embedding, weights in of_input.items():
        assert weights.keys() - shared.keys() <= {"input_embedding.weight"}
        for name, value in shared.items():
            assert torch.equal(value, weights[name]), (input_embedding, name)


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    first, again, other = (
        initialised("learned"),
        initialised("learned"),
        initialised("learned", seed=2),
    )
    matrices = [name for name, value in first.items() if value.ndim == 2]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    assert not torch.equal(first["layers.0.mlp.up.weight"], first["layers.1.mlp.up.weight"])


def test_initial_weights_have_the_stated_spread() -> None:
    model = TableFreeForCausalLM(small_config("learned", vocab_size=512, d_model=192, num_layers=2))
    initialise_parameters(model, 1)
    residual = 0.02 / math.sqrt(2 * 2)
    for name, value in model.named_parameters():
        if value.ndim == 2:  # 36,864 or more values each: the spread is known to half a percent
            to_residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
            assert value.std().item() == pytest.approx(
                residual if to_residual else 0.02, rel=0.02
            ), name
            assert abs(value.mean().item()) < 5e-4, name
        else:
            assert torch.all(value == (1.0 if name.endswith("norm.weight") else 0.0)), name


@pytest.mark.parametrize("input_embedding", INPUT_EMBEDDINGS)
def test_a_saved_model_loads_with_the_same_logits(input_embedding: str, tmp_path: Path) -> None:
    model, ids = small_model(input_embedding), some_ids(2, 9)
    model.save_pretrained(tmp_path)
    loaded = TableFreeForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)

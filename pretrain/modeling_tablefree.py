"""The decoder without an input embedding table: token codes, blocks, output projection.

This one file is what trains and what an export ships; it needs torch and transformers (4.57 or
newer), nothing else. Each token id enters as its own bits (paper: arXiv 2605.09751), so the input
has no trainable parameter:

    binary_code   the K bits of the id, least significant first, repeated d_model / K times
    affine_code   A * bits xor b over GF(2), with A invertible, repeated likewise
    permuted_code the bits of a keyed permutation of the ids that is not affine, repeated likewise
    learned       a trainable table, the baseline

The block is GPT-NeoX's with sequential residual and rotary positions over the whole head.
`TableFreeModel` is the decoder without its output projection, `TableFreeForCausalLM` the whole;
both are laid out as tools expect a decoder of transformers to be. What they cannot do they refuse
in a sentence: nothing that would change a result is ignored.

Tensor legend: B batch, T tokens, S keys (cached ones included), H heads, C channels of a head,
K code bits, D model width, V vocabulary.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    Cache,
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

INPUT_EMBEDDINGS = ("binary_code", "affine_code", "permuted_code", "learned")
ROTARY_BASE = 10_000.0
LAYER_NORM_EPS = 1e-5
INIT_STD = 0.02
DEFAULTS: dict[str, Any] = {
    "vocab_size": 65_536, "d_model": 1_024, "num_layers": 32, "num_heads": 32, "seq_len": 1_024,
    "input_embedding": "binary_code", "code_bits": None, "affine_rows": None, "affine_offset": None,
    "permutation_keys": None, "permutation_offset": None,
    "initializer_range": INIT_STD, "use_cache": True, "tie_word_embeddings": False,
}  # fmt: skip

# Of what this file reads in a config; an export's config.json states the one that it was written
# for. 2: the parameters of an export are named as in TableFreeForCausalLM, where before they were
# named as in checkpoints.
MODELING_VERSION = 2
# Rounds of a permuted code. From 6 bits on its largest bias towards a linear function, and its
# avalanche, are those of random permutations; with 4 rounds they are further off for all numbers of
# bits (tests/benchmarks/code_statistics.py).
PERMUTATION_ROUNDS = 8
# Keys, and what a round multiplies, are below 2^31. The multipliers are the first 31 bits after the
# point of (sqrt(5) - 1) / 2 and of sqrt(2), made odd.
ROUND_MASK = (1 << 31) - 1
ROUND_MULTIPLIERS = (0x4F1BBCDD, 0x3504F333)
# Words by which a configuration names what a decoder computes. A key with one of them that is not
# known here would change the model, as far as anyone can tell; other unknown keys (who made it,
# with which tool) are carried along.
WORDS_OF_A_MODEL = frozenset({
    "act", "activation", "alpha", "attn", "attention", "bias", "dropout", "embed", "embedding",
    "embeddings", "eps", "expert", "experts", "head", "heads", "hidden", "intermediate", "kv",
    "layer", "layers", "mlp", "moe", "multiplier", "norm", "position", "positions", "pos",
    "residual", "rope", "rotary", "scale", "scaling", "sliding", "softcap", "softcapping", "theta",
    "tie", "vocab", "width", "window",
})  # fmt: skip

# What transformers 4 writes into any full config, with the values that ask for nothing; 5 does not
# know the keys.
INERT_KEYS: dict[str, Any] = {
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}

# What `forward` takes beyond its named arguments: for the loss, and for attention functions other
# than our own.
LOSS_ARGUMENTS = frozenset({"num_items_in_batch", "shift_labels"})
ATTENTION_ARGUMENTS = frozenset({
    "attention_instances", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    "kernel_options",
})  # fmt: skip
# Packed documents: where they begin in all rows, one after the other, their greatest length, and
# the one of each token.
DOCUMENT_STARTS = ("cu_seq_lens_q", "cu_seq_lens_k")
DOCUMENT_ARGUMENTS = frozenset({*DOCUMENT_STARTS, "max_length_q", "max_length_k", "seq_idx"})
OWN_ATTENTION = ("sdpa", "eager")
# In transformers 4 and the first of 5 a static cache has to be told where to write, or writes to
# its beginning.
CACHE_IS_TOLD_WHERE = "cache_kwargs" in inspect.signature(Cache.update).parameters
# What an output calls its cache: since 5.24 `cache`, with the old name for those who ask.
CACHE_FIELD = (
    "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
)

logger = logging.get_logger(__name__)


def bits_needed(vocab_size: int) -> int:
    """K = ceil(log2 V): the fewest bits that tell V ids apart."""
    return max(1, (vocab_size - 1).bit_length())


def gf2_rank(rows: list[int]) -> int:
    """Rank over GF(2) of a bit matrix, one integer a row."""
    rank = 0
    left = list(rows)
    while left:
        pivot = left.pop()
        if pivot == 0:
            continue
        rank += 1
        low_bit = pivot & -pivot
        left = [row ^ pivot if row & low_bit else row for row in left]
    return rank


def draw_affine_code(code_bits: int, seed: int) -> tuple[list[int], int]:
    """Draw (A, b) with A in GL(code_bits, 2), by rejection.

    Row i of A is an integer, its bit j the column j.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (code_bits + 1, code_bits)
    while True:
        # Of random matrices 0.29 are invertible, so that 3 or 4 draws are to be expected.
        bits = torch.randint(0, 2, shape, generator=generator, device="cpu").tolist()
        *rows, offset = [sum(bit << j for j, bit in enumerate(row)) for row in bits]
        if gf2_rank(rows) == code_bits:
            return rows, offset


def mixed(numbers: Tensor, key: int) -> Tensor:
    """The round function of a permuted code: whole numbers below 2^31 to others, below 2^46.

    Carries of the products make it no linear function of the bits. Products of two numbers below
    2^31 never overflow int64, so that every device and runtime gives the same.
    """
    first, second = ROUND_MULTIPLIERS
    product = (numbers ^ key) * first & ROUND_MASK
    product = (product ^ torch.bitwise_right_shift(product, 15)) * second
    # The lower bits of a product depend on fewer bits of what was multiplied.
    return torch.bitwise_right_shift(product, 16)


def permuted(
    numbers: Tensor, code_bits: int, keys: list[int], *, backwards: bool = False
) -> Tensor:
    """A keyed permutation of the int64 numbers below 2 ** code_bits, or its inverse, elementwise.

    A Feistel network: each round xors to one half of the bits a function of the other half, and so
    undoes itself, whatever the function. So it is one to one for any keys. Of an odd number of bits
    the high half has one more.
    """
    low_bits = code_bits // 2
    low_mask = (1 << low_bits) - 1
    high_mask = (1 << (code_bits - low_bits)) - 1
    low = numbers & low_mask
    high = torch.bitwise_right_shift(numbers, low_bits) & high_mask
    rounds = list(enumerate(keys))
    if backwards:
        rounds.reverse()
    for index, key in rounds:
        if index % 2 == 0:
            low = low ^ (mixed(high, key) & low_mask)
        else:
            high = high ^ (mixed(low, key) & high_mask)
    return high * (1 << low_bits) + low


def agrees_with_an_affine_map(code_bits: int, keys: list[int]) -> bool:
    """Whether a permutation agrees with an affine map over GF(2) on the ids below 2^12."""
    known_bits = min(code_bits, 12)
    ids = torch.arange(1 << known_bits, device="cpu")
    images = permuted(ids, code_bits, keys)
    # The one affine map that agrees on 0 and on the powers of two.
    affine = images[0].expand_as(images)
    for place in range(known_bits):
        column = images[1 << place] ^ images[0]
        affine = affine ^ ((torch.bitwise_right_shift(ids, place) & 1) * column)
    return bool((affine == images).all())


def draw_permuted_code(code_bits: int, seed: int) -> tuple[list[int], int]:
    """Draw the keys of a permuted code, one for each round, and the number xored to its result.

    Those of an affine map are drawn again, which happens below 7 bits; 1 or 2 bits have no other
    permutations.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        keys = torch.randint(
            0, ROUND_MASK + 1, (PERMUTATION_ROUNDS,), generator=generator, device="cpu"
        ).tolist()
        offset = torch.randint(0, 1 << code_bits, (1,), generator=generator, device="cpu").item()
        if code_bits < 3 or not agrees_with_an_affine_map(code_bits, keys):
            return keys, int(offset)


class TableFreeConfig(PretrainedConfig):
    """Architecture of the decoder, by the keys of DEFAULTS.

    `affine_rows` and `affine_offset` hold A and b, as `draw_affine_code` gives them,
    `permutation_keys` and `permutation_offset` what `draw_permuted_code` gives. Raises ValueError,
    in one sentence, for a config that this file cannot compute as it is meant.
    """

    model_type = "tablefree"
    # Lists and dicts of a class, since transformers declares them so.
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "seq_len",
    }

    def __init__(self, **kwargs: Any) -> None:
        kwargs = by_our_names(kwargs, self.attribute_map)
        refuse_other_models(kwargs)
        values = {**DEFAULTS, **kwargs}
        if values["code_bits"] is None:
            values["code_bits"] = bits_needed(values["vocab_size"])
        refuse_what_does_not_fit(values)
        # Not through `super()`, where transformers takes it for a setting of generation.
        self.use_cache = values.pop("use_cache")
        super().__init__(**values)


def by_our_names(keys: dict[str, Any], our_name: dict[str, str]) -> dict[str, Any]:
    """The keys under one name each; ValueError for two values of one.

    Null says nothing beside a value.
    """
    values: dict[str, Any] = {}
    said_by: dict[str, str] = {}  # our name -> the key whose value was taken
    for key, value in keys.items():
        name = our_name.get(key, key)
        taken = values.get(name)
        if taken is None:
            values[name] = value
            said_by[name] = key
        elif value is not None and value != taken:
            raise ValueError(
                f"config.json: {said_by[name]} {taken!r} and {key} {value!r} are two names of one "
                "key with two values; keep one"
            )
    return values


def refuse_other_models(keys: dict[str, Any]) -> None:
    """Raise ValueError for a config of a later modelling file, or one of another architecture."""
    version = keys.get("modeling_version", MODELING_VERSION)
    if not isinstance(version, int) or version > MODELING_VERSION:
        raise ValueError(
            f"config.json: modeling_version {version} is newer than this modeling_tablefree.py "
            f"({MODELING_VERSION}); take the modeling_tablefree.py of the same export"
        )
    if keys.get("tie_word_embeddings"):
        raise ValueError(
            "config.json: tie_word_embeddings is true; this decoder's output projection is its "
            "own: false"
        )
    known = {
        *DEFAULTS,
        *INERT_KEYS,
        *PretrainedConfig().to_dict(),
        "modeling_version",
        "output_attentions",
    }
    for key, value in keys.items():
        # Private keys, and those like `attn_implementation`, choose how to compute, not what.
        if value is None or key.startswith("_") or key.endswith("_implementation"):
            continue
        if key in INERT_KEYS and value != INERT_KEYS[key]:
            raise ValueError(
                f"config.json: {key} {value!r} asks for what this decoder does not have; remove "
                "the key"
            )
        names_a_part = not WORDS_OF_A_MODEL.isdisjoint(key.split("_"))
        if key not in known and names_a_part:
            raise ValueError(
                f"config.json: {key} is unknown to this modeling_tablefree.py and by its name "
                "changes the model; take the modeling_tablefree.py that was written for it, or "
                "remove the key"
            )


def refuse_what_does_not_fit(values: dict[str, Any]) -> None:
    """Raise ValueError for sizes that do not go together."""
    for key in ("vocab_size", "d_model", "num_layers", "num_heads", "seq_len", "code_bits"):
        if not isinstance(values[key], int) or values[key] < 1:
            raise ValueError(f"config.json: {key} {values[key]!r} is no positive whole number")
    kind = values["input_embedding"]
    if kind not in INPUT_EMBEDDINGS:
        raise ValueError(
            f"config.json: input_embedding {kind!r} is none of {', '.join(INPUT_EMBEDDINGS)}"
        )
    width = values["d_model"]
    heads = values["num_heads"]
    # Rotary positions turn the channels of a head in pairs.
    if width % (2 * heads):
        raise ValueError(
            f"config.json: d_model {width} is no even number of channels for each of {heads} heads"
        )
    if kind != "learned":
        refuse_another_code(values)


def refuse_another_code(values: dict[str, Any]) -> None:
    """Raise ValueError for a code that does not tell all ids apart, or does not fill the width."""
    code_bits = values["code_bits"]
    vocab_size = values["vocab_size"]
    width = values["d_model"]
    if code_bits < bits_needed(vocab_size):
        raise ValueError(
            f"config.json: code_bits {code_bits} tell fewer than vocab_size {vocab_size} ids apart"
        )
    if width % code_bits:
        raise ValueError(
            f"config.json: a code of code_bits {code_bits} does not fill d_model {width} evenly"
        )
    is_affine = values["input_embedding"] == "affine_code"
    if is_affine and not is_invertible(values["affine_rows"], values["affine_offset"], code_bits):
        raise ValueError(
            f"config.json: affine_rows and affine_offset are no invertible code of {code_bits} bits"
        )
    is_permuted = values["input_embedding"] == "permuted_code"
    keys = values["permutation_keys"]
    if is_permuted and not is_permutation(keys, values["permutation_offset"], code_bits):
        raise ValueError(
            f"config.json: permutation_keys and permutation_offset are no {PERMUTATION_ROUNDS} "
            f"numbers up to {ROUND_MASK} and one of {code_bits} bits"
        )


def is_invertible(rows: list[int] | None, offset: int | None, code_bits: int) -> bool:
    """Whether A and b give each of the 2^K codes to one id."""
    if rows is None or offset is None or len(rows) != code_bits or gf2_rank(rows) != code_bits:
        return False
    return all(0 <= value < 1 << code_bits for value in [*rows, offset])


def is_permutation(keys: list[int] | None, offset: int | None, code_bits: int) -> bool:
    """Whether a permuted code has a key for each round and a number for its result."""
    if keys is None or offset is None or len(keys) != PERMUTATION_ROUNDS:
        return False
    return 0 <= offset < 1 << code_bits and all(0 <= key <= ROUND_MASK for key in keys)


def is_traced() -> bool:
    """Whether this runs to be compiled or exported.

    Values are unknown then, and no tensor made now may be kept.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def refuse_other_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError for what is no tensor of ids below the vocabulary's size.

    A code would take some bits of it. A GPU is not waited for: there the assertion fails once it is
    reached, as that of a table's lookup does.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(
            f"forward() takes input_ids as whole numbers, not {ids.dtype}; embeddings go as "
            "inputs_embeds"
        )
    if is_traced() or ids.is_meta or type(ids) is not Tensor or ids.numel() == 0:
        return  # There are no values to look at, or a stand-in has none.
    within = (
        f"outside 0 to {vocab_size - 1}, of vocab_size {vocab_size}; resize_token_embeddings "
        "makes room for more"
    )
    ids = ids.long()  # bytes would be compared with the low byte of the size
    if ids.is_cuda:
        all_within = ((ids >= 0) & (ids < vocab_size)).all()
        torch._assert_async(all_within, f"forward() got an id {within}")
        return
    try:
        lowest, highest = (int(value) for value in ids.aminmax())
    except RuntimeError:  # torch.func maps over it: one value stands for many
        return
    if lowest < 0:
        raise ValueError(f"forward() got the id {lowest}, {within}")
    if highest >= vocab_size:
        raise ValueError(f"forward() got the id {highest}, {within}")


def bits_of(numbers: Tensor, shifts: Tensor) -> Tensor:
    """The bits of whole numbers at the places `shifts`, as 0 and 1; the shapes are broadcast."""
    # Not by >>, for which ONNX has no function on int64.
    return torch.bitwise_right_shift(numbers, shifts) & 1


class CodeConstants(NamedTuple):
    """What a code is computed with, on one device."""

    shifts_K: Tensor  # noqa: N815  (the bit that is wanted of an id, for each of the code's)
    matrix_KK: Tensor | None  # noqa: N815  (A transposed; None without an affine code)
    offset_K: Tensor | None  # noqa: N815  (b)


class TokenCode(nn.Module):
    """Ids to fixed codes. No parameter and no buffer: what it needs follows from the config.

    (A non-persistent buffer would come back as uninitialised memory from `from_pretrained`.)
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config
        self._constants: dict[torch.device, CodeConstants] = {}

    def __getattr__(self, name: str) -> Any:
        # Tools ask for these of an nn.Embedding.
        if name in ("weight", "num_embeddings", "embedding_dim"):
            raise AttributeError(
                "the input of this model is a fixed code of the token ids, without a table: "
                f"there is no {name} to train, tie, resize or replace"
            )
        return super().__getattr__(name)

    def constants(self, device: torch.device) -> CodeConstants:
        """What the code is computed with; kept for each device."""
        if device in self._constants:
            return self._constants[device]
        shifts = torch.arange(self.config.code_bits, device=device)
        matrix = None
        offset = None
        if self.config.input_embedding == "affine_code":
            rows = torch.tensor(self.config.affine_rows, device=device)
            matrix = bits_of(rows[:, None], shifts).T.float()
            offset = bits_of(torch.tensor(self.config.affine_offset, device=device), shifts)
        constants = CodeConstants(shifts, matrix, offset)
        if not is_traced():
            self._constants[device] = constants
        return constants

    def code(self, ids: Tensor) -> Tensor:
        """The code of each id as 0 and 1, shape (..., K), int64."""
        shifts, matrix, offset = self.constants(ids.device)
        numbers = ids.long()
        if self.config.input_embedding == "permuted_code":
            numbers = permuted(numbers, self.config.code_bits, self.config.permutation_keys)
            numbers = numbers ^ self.config.permutation_offset
        code = bits_of(numbers[..., None], shifts)
        if matrix is None or offset is None:
            return code
        # CUDA multiplies no matrices of int64; fp32 holds sums of K ones exactly.
        sums = (code.float() @ matrix).long()
        return (sums & 1) ^ offset

    def forward(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Shape (..., D): the code repeated d_model / K times.

        In torch's default dtype if none is given.
        """
        repeats = self.config.d_model // self.config.code_bits
        code = self.code(ids).to(dtype or torch.get_default_dtype())
        return code.tile(repeats)


def rotary_angles(positions_BT: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, each (B, 1, T, C), computed in fp32.

    The first half of the sine is negated, so that `rotate` adds where it would subtract.
    """
    channel = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32)
    frequencies = 1.0 / ROTARY_BASE ** (channel / head_dim)
    angles = positions_BT[..., None].float() * frequencies
    cos = angles.cos()
    sin = angles.sin()
    cos_B1TC = torch.cat((cos, cos), dim=-1)[:, None]
    sin_B1TC = torch.cat((-sin, sin), dim=-1)[:, None]
    return cos_B1TC.to(dtype), sin_B1TC.to(dtype)


def rotate(x_BHTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split convention, with what `rotary_angles` gives."""
    first, second = x_BHTC.chunk(2, dim=-1)
    return x_BHTC * cos + torch.cat((second, first), dim=-1) * sin


def sdpa_attention_forward(
    module: nn.Module, query_BHTC: Tensor, key_BHSC: Tensor, value_BHSC: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """Softmax attention, (B, T, H, C). A mask is (B, 1, T, S) or flex_attention's; None is causal.

    A single token without a mask sees every key.
    """
    if mask is None or isinstance(mask, Tensor):
        # bool(), since in an export the comparison is a symbol.
        is_causal = mask is None and bool(query_BHTC.shape[2] > 1)
        attended = F.scaled_dot_product_attention(
            query_BHTC, key_BHSC, value_BHSC, mask, is_causal=is_causal
        )
        return attended.transpose(1, 2), None
    # Only training has such masks, and only there torch is known to be new enough.
    from torch.nn.attention.flex_attention import flex_attention

    attended = flex_attention(query_BHTC, key_BHSC, value_BHSC, block_mask=mask)
    return attended.transpose(1, 2), None


def eager_attention_forward(
    module: nn.Module,
    query_BHTC: Tensor,
    key_BHSC: Tensor,
    value_BHSC: Tensor,
    mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The same, spelled out, with the weights (B, H, T, S) beside it."""
    scores = query_BHTC @ key_BHSC.transpose(2, 3) * scaling
    tokens, keys = scores.shape[2:]
    if mask is None and tokens > 1:
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value_BHSC.dtype)
    return (weights @ value_BHSC).transpose(1, 2), weights


# All that is registered with transformers, and our own two in place of its.
# `set_attn_implementation` of transformers 5 works for a file that says
# `ALL_ATTENTION_FUNCTIONS.get_interface(`, which transformers 4 does not have; vLLM reads in the
# source of `Attention.forward` that it looks its function up here.
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward
ALL_ATTENTION_FUNCTIONS["eager"] = eager_attention_forward


class Past(NamedTuple):
    """A KV cache, and the places in it where the tokens of a pass go, (T,)."""

    cache: Cache
    slots_T: Tensor  # noqa: N815

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keep keys and values of a layer; gives all that it then has."""
        if CACHE_IS_TOLD_WHERE:
            return self.cache.update(key, value, layer, {"cache_position": self.slots_T})
        return self.cache.update(key, value, layer)


class Attention(nn.Module):
    """Causal multi-head attention.

    Rows of `query_key_value`, (3 D, D), are grouped by head, as in GPT-NeoX: q, k, v of the first.
    """

    def __init__(self, config: TableFreeConfig, layer_index: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_heads
        # Attention functions of transformers and of servers look for these.
        self.layer_idx = layer_index
        self.head_dim = config.d_model // config.num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.query_key_value = nn.Linear(config.d_model, 3 * config.d_model)
        self.output = nn.Linear(config.d_model, config.d_model)

    def forward(
        self, hidden_BTD: Tensor, rotation: tuple[Tensor, Tensor], mask: Any, past: Past | None,
        attentions: list[Tensor | None] | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        batch, tokens, width = hidden_BTD.shape
        grouped = self.query_key_value(hidden_BTD).view(batch, tokens, self.num_heads, -1)
        query, key, value = grouped.transpose(1, 2).chunk(3, dim=-1)
        cos, sin = rotation
        query = rotate(query, cos, sin)
        key = rotate(key, cos, sin)
        if past is not None:
            key, value = past.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attended, weights = attend(
            self, query, key, value, mask, scaling=self.scaling, dropout=0.0, **kwargs
        )
        if attentions is not None:
            attentions.append(weights)
        output: Tensor = self.output(attended.reshape(batch, tokens, width))
        return output


class MLP(nn.Module):
    """Width x4, exact GELU, back."""

    def __init__(self, config: TableFreeConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, 4 * config.d_model)
        self.down = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        output: Tensor = self.down(F.gelu(self.up(hidden_BTD)))
        return output


class Block(GradientCheckpointingLayer):
    """Pre-LayerNorm attention, then MLP, each added to the residual stream."""

    def __init__(self, config: TableFreeConfig, layer_index: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.attention = Attention(config, layer_index)
        self.mlp_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden_BTD: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Any,
        past: Past | None = None,
        **kwargs: Any,
    ) -> Tensor:
        # What the norm gave has no name, so that its memory is free again for the MLP.
        hidden_BTD = hidden_BTD + self.attention(
            self.attention_norm(hidden_BTD), rotation, mask, past, **kwargs
        )
        output: Tensor = hidden_BTD + self.mlp(self.mlp_norm(hidden_BTD))
        return output


def run_block(block: Block, *inputs: Any, **kwargs: Any) -> Tensor:
    """Run a block as it is, keeping everything for the backward pass."""
    output: Tensor = block(*inputs, **kwargs)
    return output


def starts_anew(position_ids: Tensor) -> Tensor:
    """Where positions, (B, T), do not go on from the one before, (B, T - 1)."""
    return position_ids[:, 1:] != position_ids[:, :-1] + 1


def same_document(position_ids: Tensor | None) -> Tensor | None:
    """Which tokens are of one document, (B, T, T), by positions that start anew within a row.

    None where none do.
    """
    if position_ids is None:
        return None
    breaks = starts_anew(position_ids)
    if not is_traced() and not breaks.any():
        return None
    document_BT = F.pad(breaks.long().cumsum(dim=1), (1, 0))
    return document_BT[:, :, None] == document_BT[:, None, :]


def visible_keys(
    attention_mask: Tensor | None, slots_T: Tensor, keys: int, documents: Tensor | None
) -> Tensor | None:
    """Which of S keys each query may see, boolean, (B, 1, T, S).

    None where `sdpa_attention_forward` needs no mask. `attention_mask`, (B, S), marks padded keys
    with 0; a query always sees itself, so that no row is empty.
    """
    tokens = slots_T.shape[0]  # len() would fix it in an export
    index_S = torch.arange(keys, device=slots_T.device)
    visible_TS = index_S <= slots_T[:, None]
    if attention_mask is not None:
        itself_TS = index_S == slots_T[:, None]
        return (visible_TS & attention_mask[:, None, None, :].bool()) | itself_TS
    if documents is not None:
        # A static cache has room for more keys than there are tokens.
        documents_BTS = F.pad(documents, (0, keys - tokens))
        return (visible_TS & documents_BTS)[:, None]
    if tokens == keys:
        return None
    return visible_TS[None, None]


def tell_the_same(arguments: dict[str, Any], position_ids: Tensor | None) -> bool:
    """Whether positions start anew wherever the arguments for packed documents begin one."""
    if position_ids is None:
        return False
    if is_traced():
        return True  # values are unknown
    breaks = starts_anew(position_ids)
    first_of_row_too = F.pad(breaks, (1, 0), value=True).flatten()
    # The place after the last token is told as the start of one more.
    starts = F.pad(first_of_row_too, (0, 1), value=True).nonzero()
    for name in DOCUMENT_STARTS:
        if name in arguments and not torch.isin(arguments[name].to(starts.device), starts).all():
            return False
    if "seq_idx" not in arguments:
        return True
    index_BT = arguments["seq_idx"].to(breaks.device)
    changes = index_BT[:, 1:] != index_BT[:, :-1]
    return not bool((changes & ~breaks).any())


def attention_arguments(
    arguments: dict[str, Any], implementation: str | None, position_ids: Tensor | None
) -> dict[str, Any]:
    """Those of `forward`'s further arguments that an attention function takes.

    `position_ids` are those by which our own attention tells documents apart in this pass, if it
    does. Raises ValueError for what nothing here takes, since it may carry state: transformers 5.24
    renamed the KV cache to `cache`, and a class that took no notice had each new token see itself
    alone.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    # Unused, where positions tell the same: our mask is made of those, and `seq_idx` is for
    # convolutions over tokens. trl gives all of them with packing, whatever the attention function.
    is_own = implementation in OWN_ATTENTION
    unused = given.keys() & (DOCUMENT_ARGUMENTS if is_own else {"seq_idx"})
    if unused and tell_the_same(given, position_ids):
        given = {name: value for name, value in given.items() if name not in unused}
    for name, value in given.items():
        if value is False and name.startswith("output_"):
            continue
        if name not in ATTENTION_ARGUMENTS | DOCUMENT_ARGUMENTS:
            raise ValueError(
                f"forward() got {name}, which this modeling_tablefree.py does not know and so "
                "must not ignore; leave it out, or take a newer modeling_tablefree.py or an "
                "older transformers"
            )
        if is_own or name not in ATTENTION_ARGUMENTS:
            hint = ""
            if name in DOCUMENT_ARGUMENTS:
                hint = (
                    " except beside position_ids that start anew alike, with no attention_mask "
                    "and no filled cache"
                )
            raise ValueError(
                f"forward() got {name}, which attn_implementation {implementation!r} does not "
                f"take{hint}"
            )
    return {name: value for name, value in given.items() if name in ATTENTION_ARGUMENTS}


def the_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The KV cache, under whichever of its two names it came.

    Before transformers 5.24 it is `past_key_values`.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("forward() got two KV caches, past_key_values and cache; give one")
    given = past_key_values if cache is None else cache
    if given is not None and not isinstance(given, Cache):
        raise ValueError(
            f"forward() got a KV cache of type {type(given).__name__}; it takes a "
            "transformers.Cache"
        )
    return given


def static_length(cache: Cache) -> int | None:
    """For how many tokens a static cache has room; None for one that grows."""
    if not cache.layers:
        return None
    return getattr(cache.layers[0], "max_cache_len", None)


def is_empty(cache: Cache | None) -> bool:
    """Whether nothing is cached, as far as can be known without waiting for a device."""
    seen = 0 if cache is None else cache.get_seq_length()
    return isinstance(seen, int) and seen == 0


def as_asked(output: Any, config: PretrainedConfig, return_dict: bool | None) -> Any:
    """An output, or its fields as a tuple."""
    if return_dict is None:
        return_dict = getattr(config, "return_dict", True)
    return output if return_dict else output.to_tuple()


def refuse_other_sizes(new_num_tokens: int | None, pad_to_multiple_of: int | None) -> None:
    """Raise ValueError for what is no size of a vocabulary."""
    sizes = {"new_num_tokens": new_num_tokens, "pad_to_multiple_of": pad_to_multiple_of}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(
                f"resize_token_embeddings() got {name} {value}, which is no positive whole number"
            )


class TableFreePreTrainedModel(PreTrainedModel):
    """What the two classes have in common: what transformers may do with them, and their input."""

    config_class = TableFreeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (transformers declares it so)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # not tried on the devices where `generate` would then compile on its own
    _can_compile_fullgraph = False


class TableFreeModel(TableFreePreTrainedModel):
    """The decoder without its output projection: ids in, normalised hidden states out."""

    def __init__(self, config: TableFreeConfig) -> None:
        super().__init__(config)
        self.input_embedding: nn.Module
        if config.input_embedding == "learned":
            self.input_embedding = nn.Embedding(config.vocab_size, config.d_model)
        else:
            self.input_embedding = TokenCode(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.final_norm: nn.LayerNorm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        # How training runs a block, by its index: recomputed, for one.
        self.block_runners: dict[int, Callable[..., Tensor]] = {}
        self.compiled_blocks = False  # training code may compile them
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The trainable table of the baseline, or the fixed code, which has no weight."""
        return self.input_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of the baseline; a code stays as it is, which is said."""
        if isinstance(self.input_embedding, TokenCode) and not isinstance(value, TokenCode):
            # Servers put an embedding of their own in place of any input that they find; there is
            # nothing to fill it.
            logger.warning_once(
                "The input of this model is a fixed code of the token ids; it is kept, no table "
                "is set"
            )
            return
        self.input_embedding = value

    def resize_token_embeddings(  # type: ignore[override]
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """The table of the baseline, grown or shrunk.

        Raises ValueError for a code, whose vocabulary the head alone bounds.
        """
        refuse_other_sizes(new_num_tokens, pad_to_multiple_of)
        if self.config.input_embedding == "learned":
            return super().resize_token_embeddings(
                new_num_tokens, pad_to_multiple_of, mean_resizing
            )
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.input_embedding
        raise ValueError(
            "TableFreeModel has no table and no head to resize; "
            "TableFreeForCausalLM.resize_token_embeddings can"
        )

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Ids to the first residual stream, (B, T, D)."""
        embedded_BTD: Tensor
        if isinstance(self.input_embedding, TokenCode):
            embedded_BTD = self.input_embedding(ids_BT, self.final_norm.weight.dtype)
        else:
            embedded_BTD = self.input_embedding(ids_BT)
        return embedded_BTD

    def decode(
        self, hidden_BTD: Tensor, positions_BT: Tensor, mask: Any, past: Past | None = None,
        states: list[Tensor] | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """From the first residual stream to normalised hidden states, (B, T, D).

        `states` takes what each block got.
        """
        head_dim = self.config.d_model // self.config.num_heads
        rotation = rotary_angles(positions_BT, head_dim, hidden_BTD.dtype)
        runners = self.block_runners if torch.is_grad_enabled() else {}
        for index, layer in enumerate(self.layers):
            if states is not None:
                states.append(hidden_BTD)
            run: Callable[..., Tensor] = runners.get(index, run_block)
            hidden_BTD = run(layer, hidden_BTD, rotation, mask, past, **kwargs)
        normalised_BTD: Tensor = self.final_norm(hidden_BTD)
        return normalised_BTD

    def hidden_states(
        self, ids_BT: Tensor, positions_BT: Tensor | None = None, mask: Any = None
    ) -> Tensor:
        """What training takes: normalised hidden states (B, T, D).

        The mask is as `sdpa_attention_forward` wants it.
        """
        if positions_BT is None:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        return self.decode(self.embed(ids_BT), positions_BT, mask)

    def recomputes(self) -> bool:
        """Whether blocks run again in the backward pass.

        `gradient_checkpointing_enable` asks that of them.
        """
        asked = self.training and torch.is_grad_enabled()
        return asked and any(layer.gradient_checkpointing for layer in self.layers)

    def past_of(
        self,
        hidden_BTD: Tensor,
        cache: Cache | None,
        use_cache: bool | None,
        cache_position: Tensor | None,
    ) -> Past | None:
        """The KV cache, given or new if one is wanted, and where this pass goes in it.

        Raises ValueError where keys and values of before would have to be passed over.
        """
        if self.recomputes():
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError(
                    "with gradient checkpointing each block runs twice, so it takes no KV cache"
                )
            if use_cache:
                logger.warning_once("With gradient checkpointing there is no KV cache")
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None:
            if not use_cache:
                return None
            cache = DynamicCache()
        if cache_position is not None and static_length(cache) is not None:
            return Past(cache, cache_position)
        tokens_T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
        return Past(cache, tokens_T + cache.get_seq_length())

    def attention_mask_of(
        self,
        hidden_BTD: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        past: Past | None,
    ) -> Any:
        """What the configured attention function takes for `attention_mask`.

        One of four dimensions is that already.
        """
        if attention_mask is not None and len(attention_mask.shape) == 4:
            return attention_mask
        cache = None if past is None else past.cache
        tokens = hidden_BTD.shape[1]
        slots_T = torch.arange(tokens, device=hidden_BTD.device) if past is None else past.slots_T
        if self.config._attn_implementation not in OWN_ATTENTION:
            values = {
                "config": self.config,
                "input_embeds": hidden_BTD,
                "inputs_embeds": hidden_BTD,
                "cache": cache,
                "past_key_values": cache,
                "cache_position": slots_T,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
            }
            # Releases of transformers name these differently, and lack some.
            wanted = inspect.signature(create_causal_mask).parameters
            taken = {name: value for name, value in values.items() if name in wanted}
            return create_causal_mask(**taken)
        room = None
        keys = tokens
        if cache is not None:
            room = static_length(cache)
            keys = room or tokens + cache.get_seq_length()
        if attention_mask is None:
            documents = same_document(position_ids) if is_empty(cache) else None
            if documents is None and tokens == 1 and room is None:
                return None  # it sees all there is
            return visible_keys(None, slots_T, keys, documents)
        if room is None and attention_mask.shape[1] != keys:
            raise ValueError(
                f"attention_mask is of {attention_mask.shape[1]} tokens, where {keys} are to be "
                "seen, with cached ones"
            )
        # Without padding no mask is needed, and there are faster kernels.
        if not is_traced() and attention_mask.all():
            return self.attention_mask_of(hidden_BTD, None, None, past)
        padded_mask = F.pad(attention_mask, (0, keys - attention_mask.shape[1]))
        return visible_keys(padded_mask, slots_T, keys, None)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Normalised hidden states (B, T, D), of ids (B, T) or of embeddings (B, T, D).

        `attention_mask` marks padding with 0, (B, S), or says for each query what it sees, (B, 1,
        T, S). Without one, positions that start anew within a row keep its documents apart. A KV
        cache comes as `past_key_values` or as `cache`; there will be one if `use_cache` or, in
        evaluation mode, the config says so. Raises ValueError for whatever else it is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("forward() takes input_ids or inputs_embeds, one of the two")
        config = self.config
        implementation = config._attn_implementation
        cache_position = kwargs.pop("cache_position", None)
        given_cache = the_cache(past_key_values, cache)
        begins = attention_mask is None and is_empty(given_cache)
        arguments = attention_arguments(kwargs, implementation, position_ids if begins else None)
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_attentions and implementation != "eager":
            raise ValueError(
                "output_attentions needs model.set_attn_implementation('eager'): no other keeps "
                "weights"
            )
        if input_ids is not None:
            refuse_other_ids(input_ids, config.vocab_size)
            hidden_BTD = self.embed(input_ids)
        elif inputs_embeds is not None:
            hidden_BTD = inputs_embeds.to(self.final_norm.weight.dtype)
        if self.recomputes() and not hidden_BTD.requires_grad:
            # What recomputes by re-entering autograd needs an input that asks for a gradient.
            hidden_BTD = hidden_BTD.detach().requires_grad_()
        past = self.past_of(hidden_BTD, given_cache, use_cache, cache_position)
        positions_BT = position_ids
        if positions_BT is None and past is not None:
            positions_BT = past.slots_T[None]
        elif positions_BT is None:
            positions_BT = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)[None]
        mask = self.attention_mask_of(hidden_BTD, attention_mask, position_ids, past)
        states: list[Tensor] | None = [] if output_hidden_states else None
        if output_attentions:
            arguments["attentions"] = []
        if implementation not in OWN_ATTENTION:
            arguments["position_ids"] = position_ids  # by which some tell documents apart
        hidden_BTD = self.decode(hidden_BTD, positions_BT, mask, past, states, **arguments)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden_BTD,
            hidden_states=None if states is None else (*states, hidden_BTD),
            attentions=tuple(arguments["attentions"]) if output_attentions else None,
            **{CACHE_FIELD: None if past is None else past.cache},
        )
        asked: BaseModelOutputWithPast | tuple[Any, ...] = as_asked(output, config, return_dict)
        return asked


def name_in_checkpoints(name: str) -> str:
    """A parameter of TableFreeForCausalLM, as checkpoints name it.

    So did exports before MODELING_VERSION 2.
    """
    return name.removeprefix("model.").replace("lm_head.", "output_projection.")


def name_in_model(name: str) -> str:
    """The parameter of TableFreeForCausalLM that checkpoints have under a name."""
    if name.startswith("output_projection."):
        return name.replace("output_projection.", "lm_head.")
    return f"model.{name}"


class TableFreeForCausalLM(TableFreePreTrainedModel, GenerationMixin):
    """The decoder with its untied output projection; generates with or without a KV cache."""

    def __init__(self, config: TableFreeConfig) -> None:
        super().__init__(config)
        self.model: TableFreeModel = TableFreeModel(config)
        self.lm_head: nn.Linear = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As for any model of transformers.

        Also from exports whose parameters have the names of checkpoints.
        """
        # transformers 5 adds `model.` by itself; 4 asks `_get_key_renaming_mapping` below.
        if not hasattr(PreTrainedModel, "_get_key_renaming_mapping"):
            asked = kwargs.get("key_mapping") or {}
            kwargs["key_mapping"] = {r"^output_projection\.": "lm_head."} | asked
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # By a renaming that is kept `save_pretrained` would give the old name back.
        renamings = getattr(model, "_weight_conversions", None) or []
        kept = [
            renaming
            for renaming in renamings
            if "output_projection" not in str(renaming.source_patterns)
        ]
        if len(kept) < len(renamings):
            model._weight_conversions = kept or None
        return loaded

    def _get_key_renaming_mapping(
        self, checkpoint_keys: list[str], *args: Any, **kwargs: Any
    ) -> dict[str, str]:
        """transformers 4 asks this for names in a file -> names of the model."""
        if "output_projection.weight" in checkpoint_keys:
            return {key: name_in_model(key) for key in checkpoint_keys}
        names: dict[str, str] = super()._get_key_renaming_mapping(  # type: ignore[misc]
            checkpoint_keys, *args, **kwargs
        )
        return names

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def get_submodule(self, target: str) -> nn.Module:
        """As for any module; by the name that peft's prompt tuning tries, what embeds the ids.

        Without it, peft guesses.
        """
        if target == "embeddings.word_embeddings":
            return self.get_input_embeddings()
        return super().get_submodule(target)

    def resize_token_embeddings(  # type: ignore[override]
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Grow or shrink the output projection, and the table of the baseline.

        Gives what embeds the ids. Raises ValueError if the ids would be more than the code's bits
        tell apart, or fewer than one.
        """
        refuse_other_sizes(new_num_tokens, pad_to_multiple_of)
        if self.config.input_embedding == "learned":
            return super().resize_token_embeddings(
                new_num_tokens, pad_to_multiple_of, mean_resizing
            )
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        multiple = pad_to_multiple_of or 1
        wanted = new_num_tokens or self.config.vocab_size
        missing = -wanted % multiple
        size = wanted + missing
        code_bits = self.config.code_bits
        if size > 1 << code_bits:
            raise ValueError(
                f"{size} ids are more than {code_bits} bits tell apart: {1 << code_bits} at most"
            )
        self.lm_head = self._get_resized_lm_head(self.lm_head, size, mean_resizing=mean_resizing)
        self.config.vocab_size = size
        ones = TokenCode(self.config).code(torch.arange(size)).sum(dim=-1)
        alike = ((ones == 0) | (ones == code_bits)).nonzero().flatten().tolist()
        # LayerNorm takes away what all channels share: codes of zeros and of ones are one input.
        if len(alike) == 2:
            logger.warning(
                f"Ids {alike[0]} and {alike[1]} are one input to this model now: their codes are "
                "constant"
            )
        return self.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, T, V), or of the last `logits_to_keep` positions, or of those in a tensor.

        Labels are the input ids themselves (the shift happens here), or `shift_labels` are what
        comes next; -100 is no target. With them the loss is there too: the mean over targets, or
        their sum over `num_items_in_batch`. All else is as for TableFreeModel.
        """
        loss_arguments = {name: kwargs.pop(name, None) for name in LOSS_ARGUMENTS}
        wants_loss = labels is not None or loss_arguments["shift_labels"] is not None
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if wants_loss and not keeps_all:
            raise ValueError("labels need the logits of all positions: leave logits_to_keep out")
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            cache=cache,
            **kwargs,
        )
        hidden_BTD = output.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden_BTD = hidden_BTD[:, logits_to_keep]
        elif not keeps_all:
            hidden_BTD = hidden_BTD[:, -logits_to_keep:]
        logits_BTV = self.lm_head(hidden_BTD)
        loss = None
        if wants_loss:
            loss = self.loss_function(
                logits=logits_BTV,
                labels=labels,
                vocab_size=self.config.vocab_size,
                **loss_arguments,
            )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **{CACHE_FIELD: output.get(CACHE_FIELD)},
        )
        asked: CausalLMOutputWithPast | tuple[Any, ...]
        asked = as_asked(result, self.config, return_dict)
        return asked


def checkpoint_parameters(model: TableFreeForCausalLM) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter, under its name in checkpoints."""
    for name, parameter in model.named_parameters():
        yield name_in_checkpoints(name), parameter


def parameter_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, parameter name)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def initialise_parameters(model: TableFreeForCausalLM, seed: int) -> None:
    """Fill every parameter from (seed, name) alone: what two models share starts bitwise equal.

    Matrices: normal(0, 0.02), those that write to the residual stream scaled by 1 / sqrt(2 *
    layers); biases 0; LayerNorm weights 1.
    """
    residual_scale = 1.0 / math.sqrt(2 * model.config.num_layers)
    for name, parameter in checkpoint_parameters(model):
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            continue
        std = INIT_STD
        if name.endswith(("attention.output.weight", "mlp.down.weight")):
            std = INIT_STD * residual_scale
        values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        values.normal_(0.0, std, generator=parameter_generator(seed, name))
        parameter.copy_(values)

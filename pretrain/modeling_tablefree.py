"""The decoder without an input embedding table: token codes, blocks, output projection.

This one file is what trains and what an export ships; it needs torch and transformers, nothing else.
Each token id enters as its own bits (paper: arXiv 2605.09751), so the input has no trainable parameter:

    binary_code   the K bits of the id, least significant first, repeated d_model / K times
    affine_code   A * bits xor b over GF(2), with A invertible, repeated likewise
    learned       a trainable table, the baseline

The block is GPT-NeoX's with sequential residual and rotary positions over the whole head.

Tensor legend: B batch, T tokens, S keys (cached ones included), H heads, C channels of a head,
K code bits, D model width, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

INPUT_EMBEDDINGS = ("binary_code", "affine_code", "learned")
ROTARY_BASE = 10_000.0
LAYER_NORM_EPS = 1e-5
INIT_STD = 0.02
DEFAULTS: dict[str, Any] = {
    "vocab_size": 65_536, "d_model": 1_024, "num_layers": 32, "num_heads": 32, "seq_len": 1_024,
    "input_embedding": "binary_code", "code_bits": None, "affine_rows": None, "affine_offset": None,
    "initializer_range": INIT_STD, "use_cache": True, "tie_word_embeddings": False,
}  # fmt: skip


def bits_needed(vocab_size: int) -> int:
    """K = ceil(log2 V): the fewest bits that tell V ids apart."""
    return max(1, (vocab_size - 1).bit_length())


def gf2_rank(rows: list[int]) -> int:
    """Rank over GF(2) of a bit matrix, one integer a row."""
    rank, rows = 0, list(rows)
    while rows:
        pivot = rows.pop()
        if pivot:
            rank += 1
            low_bit = pivot & -pivot
            rows = [row ^ pivot if row & low_bit else row for row in rows]
    return rank


def draw_affine_code(code_bits: int, seed: int) -> tuple[list[int], int]:
    """Draw (A, b) with A in GL(code_bits, 2) by rejection; row i of A as an integer, bit j its column j."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        bits = torch.randint(0, 2, (code_bits + 1, code_bits), generator=generator, device="cpu").tolist()
        *rows, offset = (sum(bit << j for j, bit in enumerate(row)) for row in bits)
        if gf2_rank(rows) == code_bits:
            return rows, offset


class TableFreeConfig(PretrainedConfig):
    """Architecture of the decoder, by the keys of DEFAULTS; `affine_rows` and `affine_offset` hold A and b."""

    model_type = "tablefree"
    attribute_map = {  # noqa: RUF012  (transformers declares it so)
        "hidden_size": "d_model", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
        "max_position_embeddings": "seq_len",
    }  # fmt: skip

    def __init__(self, **kwargs: Any) -> None:
        values = {**DEFAULTS, **kwargs}
        values["code_bits"] = values["code_bits"] or bits_needed(values["vocab_size"])
        self.use_cache = values.pop("use_cache")  # which transformers takes for a setting of generation
        super().__init__(**values)


class TokenCode(nn.Module):
    """Ids to fixed codes. No parameter and no buffer: what it needs follows from the config.

    (A non-persistent buffer would come back as uninitialised memory from `from_pretrained`.)
    """

    def __init__(self, config: TableFreeConfig) -> None:
        super().__init__()
        self.config = config
        self._constants: dict[torch.device, tuple[Tensor, Tensor | None, Tensor | None]] = {}

    def constants(self, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Bit positions (K,), the matrix A transposed (K, K) and the offset b (K,), on the device."""
        if device not in self._constants:
            shifts = torch.arange(self.config.code_bits, device=device)
            matrix = offset = None
            if self.config.input_embedding == "affine_code":
                rows = torch.tensor(self.config.affine_rows, device=device)
                matrix = ((rows[:, None] >> shifts) & 1).T.float()
                offset = (torch.tensor(self.config.affine_offset, device=device) >> shifts) & 1
            self._constants[device] = (shifts, matrix, offset)
        return self._constants[device]

    def code(self, ids_BT: Tensor) -> Tensor:
        """The code of each id as 0 and 1, shape (B, T, K), int64."""
        shifts, matrix, offset = self.constants(ids_BT.device)
        code_BTK = (ids_BT[..., None].long() >> shifts) & 1
        if matrix is not None and offset is not None:
            code_BTK = (code_BTK.float() @ matrix).long() & 1 ^ offset
        return code_BTK

    def forward(self, ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """Shape (B, T, D): the code repeated d_model / K times."""
        return self.code(ids_BT).to(dtype).repeat(1, 1, self.config.d_model // self.config.code_bits)


def rotary_angles(positions_BT: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, each (B, 1, T, C), computed in fp32; the sine's first half negated."""
    channel = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32)
    angles = positions_BT[..., None].float() * (1.0 / ROTARY_BASE ** (channel / head_dim))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1)[:, None].to(dtype), torch.cat((-sin, sin), dim=-1)[:, None].to(dtype)


def rotate(x_BHTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split convention, with what `rotary_angles` gives."""
    first, second = x_BHTC.chunk(2, dim=-1)
    return x_BHTC * cos + torch.cat((second, first), dim=-1) * sin


def attend(query_BHTC: Tensor, key_BHSC: Tensor, value_BHSC: Tensor, mask: Any) -> Tensor:
    """Softmax attention, (B, H, T, C). A mask is boolean, (B, 1, T, S), or flex_attention's; None is causal."""
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(query_BHTC, key_BHSC, value_BHSC, mask, is_causal=mask is None)
    from torch.nn.attention.flex_attention import flex_attention  # for training: an export runs on older torch too

    return flex_attention(query_BHTC, key_BHSC, value_BHSC, block_mask=mask)


class Attention(nn.Module):
    """Causal multi-head attention; rows of `query_key_value` are grouped by head, as in GPT-NeoX."""

    def __init__(self, config: TableFreeConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_heads = config.num_heads
        self.query_key_value = nn.Linear(config.d_model, 3 * config.d_model)
        self.output = nn.Linear(config.d_model, config.d_model)

    def forward(
        self, hidden_BTD: Tensor, rotation: tuple[Tensor, Tensor], mask: Any, cache: DynamicCache | None
    ) -> Tensor:
        batch, tokens, width = hidden_BTD.shape
        grouped = self.query_key_value(hidden_BTD).view(batch, tokens, self.num_heads, -1)
        query, key, value = grouped.transpose(1, 2).chunk(3, dim=-1)
        query, key = rotate(query, *rotation), rotate(key, *rotation)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_index)
        attended = attend(query, key, value, mask)
        return self.output(attended.transpose(1, 2).reshape(batch, tokens, width))


class MLP(nn.Module):
    """Width x4, exact GELU, back."""

    def __init__(self, config: TableFreeConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, 4 * config.d_model)
        self.down = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(hidden_BTD)))


class Block(nn.Module):
    """Pre-LayerNorm attention, then MLP, each added to the residual stream."""

    def __init__(self, config: TableFreeConfig, layer_index: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.attention = Attention(config, layer_index)
        self.mlp_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config)

    def forward(
        self, hidden_BTD: Tensor, rotation: tuple[Tensor, Tensor], mask: Any, cache: DynamicCache | None
    ) -> Tensor:
        hidden_BTD = hidden_BTD + self.attention(self.attention_norm(hidden_BTD), rotation, mask, cache)
        return hidden_BTD + self.mlp(self.mlp_norm(hidden_BTD))


def run_block(block: Block, *inputs: Any) -> Tensor:
    """Run a block as it is, keeping everything for the backward pass."""
    return block(*inputs)


def attention_mask_of(attention_mask: Any, tokens: int, cached: int, device: torch.device) -> Any:
    """What `attend` takes: None where plain causal attention does, else which keys each query may see.

    `attention_mask` is that already if it has four dimensions; with two, (B, S), it marks padded keys with 0.
    """
    if attention_mask is None and cached == 0:
        return None
    if attention_mask is not None and len(attention_mask.shape) == 4:
        return attention_mask
    keys = torch.arange(cached + tokens, device=device)
    visible_TS = keys <= keys[cached:, None]
    if attention_mask is None:
        return visible_TS[None, None]
    own_TS = keys == keys[cached:, None]  # a padded query sees itself, so that no row is empty
    return (visible_TS & attention_mask[:, None, None, :].bool()) | own_TS


class TableFreeForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with its untied output projection; generates with or without a KV cache."""

    config_class = TableFreeConfig
    _no_split_modules = ["Block"]  # noqa: RUF012  (transformers declares it so)
    _supports_sdpa = True
    _supports_static_cache = False
    _can_compile_fullgraph = False  # no static cache
    accepts_loss_kwargs = False  # the loss is a mean: a trainer that accumulates gradients divides it itself

    def __init__(self, config: TableFreeConfig) -> None:
        super().__init__(config)
        learned = config.input_embedding == "learned"
        self.input_embedding = nn.Embedding(config.vocab_size, config.d_model) if learned else TokenCode(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.d_model, eps=LAYER_NORM_EPS)
        self.output_projection = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.block_runners: dict[int, Callable[..., Tensor]] = {}  # how training runs a block: recomputed, compiled
        self.compiled_blocks = False  # see pretrain/compilation.py
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:  # type: ignore[override]
        """The trainable table of the baseline; the fixed codes have none."""
        return self.input_embedding if isinstance(self.input_embedding, nn.Embedding) else None

    def get_output_embeddings(self) -> nn.Linear:
        return self.output_projection

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Ids to the first residual stream, (B, T, D)."""
        if isinstance(self.input_embedding, TokenCode):
            return self.input_embedding(ids_BT, self.output_projection.weight.dtype)
        return self.input_embedding(ids_BT)

    def hidden_states(
        self, ids_BT: Tensor, positions_BT: Tensor | None = None, mask: Any = None, cache: DynamicCache | None = None
    ) -> Tensor:
        """Everything but the output projection: normalised hidden states (B, T, D)."""
        cached = 0 if cache is None else cache.get_seq_length()
        if positions_BT is None:
            positions_BT = torch.arange(cached, cached + ids_BT.shape[1], device=ids_BT.device)[None]
        hidden_BTD = self.embed(ids_BT)
        head_dim = self.config.d_model // self.config.num_heads
        rotation = rotary_angles(positions_BT, head_dim, hidden_BTD.dtype)
        mask = attention_mask_of(mask, ids_BT.shape[1], cached, ids_BT.device)
        runners = self.block_runners if torch.is_grad_enabled() else {}
        for index, layer in enumerate(self.layers):
            hidden_BTD = runners.get(index, run_block)(layer, hidden_BTD, rotation, mask, cache)
        return self.final_norm(hidden_BTD)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None, use_cache: bool | None = None,
        labels: Tensor | None = None, logits_to_keep: int = 0, **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Logits (B, T, V), or of the last `logits_to_keep` positions; with `labels`, the mean loss too.

        Labels are the input ids themselves (the shift happens here); -100 is no target. Raises ValueError for what
        this class does not give: embeddings as input, hidden states or attentions as output.
        """
        for name in ("inputs_embeds", "output_hidden_states", "output_attentions"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise ValueError(f"{type(self).__name__} does not support {name}")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        hidden_BTD = self.hidden_states(input_ids, position_ids, attention_mask, past_key_values)
        logits_BTV = self.output_projection(hidden_BTD[:, -logits_to_keep:] if logits_to_keep else hidden_BTD)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=past_key_values)


def parameter_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, parameter name)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def initialise_parameters(model: TableFreeForCausalLM, seed: int) -> None:
    """Fill every parameter from (seed, name) alone, so that weights that two models share start bitwise equal.

    Matrices: normal(0, 0.02), those that write to the residual stream scaled by 1 / sqrt(2 * layers);
    biases 0; LayerNorm weights 1.
    """
    residual_scale = 1.0 / math.sqrt(2 * model.config.num_layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            continue
        scale = residual_scale if name.endswith(("attention.output.weight", "mlp.down.weight")) else 1.0
        values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        values.normal_(0.0, INIT_STD * scale, generator=parameter_generator(seed, name))
        parameter.copy_(values)

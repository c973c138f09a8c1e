"""Small models of random weights, and what they compute."""

from functools import cache

import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from pretrain.config.recipe import ModelRecipe
from pretrain.model.build import model_config
from pretrain.modeling_tablefree import (
    TableFreeConfig,
    TableFreeForCausalLM,
    checkpoint_parameters,
)


def small_config(input_embedding: str = "binary_code", **changes: int) -> TableFreeConfig:
    sizes = {
        "vocab_size": 300,
        "d_model": 48,
        "num_layers": 3,
        "num_heads": 4,
        "seq_len": 32,
        "code_bits": 12,
    }
    return model_config(ModelRecipe(input_embedding=input_embedding, **{**sizes, **changes}))  # type: ignore[arg-type]


@cache
def small_model(input_embedding: str = "binary_code") -> TableFreeForCausalLM:
    """Every parameter random, biases and LayerNorms too, so that a misplaced one shows."""
    model = TableFreeForCausalLM(small_config(input_embedding)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(
                1.0 if name.endswith("norm.weight") else 0.0, 0.2, generator=generator
            )
    return model


def some_ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 300, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def as_gpt_neox(model: TableFreeForCausalLM) -> GPTNeoXForCausalLM:
    """Stock GPT-NeoX with the same weights and the codes written into its embedding table."""
    c = model.config
    stock = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            intermediate_size=4 * c.d_model,
            max_position_embeddings=c.seq_len,
            hidden_act="gelu",
            rotary_pct=1.0,
            use_parallel_residual=False,
            layer_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    ).eval()
    head = "lm_head" if hasattr(stock, "lm_head") else "embed_out"
    stock_names = {
        "layers.": "gpt_neox.layers.",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.output": "attention.dense",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
        "final_norm": "gpt_neox.final_layer_norm",
        "output_projection": head,
    }
    weights = {
        "gpt_neox.embed_in.weight": model.model.embed(torch.arange(c.vocab_size)[None])[0].detach()
    }
    for name, value in checkpoint_parameters(model):
        if not name.startswith("input_embedding"):
            for ours, theirs in stock_names.items():
                name = name.replace(ours, theirs)
            weights[name] = value.detach()
    missing, unexpected = stock.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not [
        name for name in missing if not name.endswith(("inv_freq", "attention.bias", "masked_bias"))
    ]
    return stock


def greedy(
    model: torch.nn.Module, ids: Tensor, mask: Tensor | None, use_cache: bool
) -> list[list[int]]:
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    output = model.generate(ids, attention_mask=mask, use_cache=use_cache, **options)  # type: ignore[operator]
    return output[:, ids.shape[1] :].tolist()

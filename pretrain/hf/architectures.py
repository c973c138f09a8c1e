"""The weights and the configuration of a run in each form that transformers loads.

tablefree   the model as trained, with no input table
gpt_neox    a stock GPTNeoXForCausalLM, with the codes written out as its embedding table
"""

import json
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import GPTNeoXConfig, PretrainedConfig

from pretrain.checkpoint.safetensors_file import StoredTensor
from pretrain.hf.names import GPT_NEOX, MODELING_FILE, TABLEFREE, TO_GPT_NEOX, renamed
from pretrain.modeling_tablefree import (
    LAYER_NORM_EPS,
    MODELING_VERSION,
    ROTARY_BASE,
    TableFreeConfig,
    TokenCode,
    name_in_model,
)

# Rotary positions over the whole head, in the words of transformers 4.
WHOLE_HEAD_ROTARY: dict[str, Any] = {"rotary_pct": 1.0, "rotary_emb_base": ROTARY_BASE}
AUTO_CLASSES = {
    "AutoConfig": "TableFreeConfig",
    "AutoModel": "TableFreeModel",
    "AutoModelForCausalLM": "TableFreeForCausalLM",
}

# Of parameters in memory, or where they are stored: most are renamed, and not looked at.
Weight = TypeVar("Weight", bound=Tensor | StoredTensor)
Config = TypeVar("Config", bound=PretrainedConfig, covariant=True)


class Parts(NamedTuple, Generic[Weight, Config]):
    """What a form is made of."""

    weights: dict[str, Weight]  # under the form's names
    config: Config


def tablefree_parts(
    masters: dict[str, Weight], config: TableFreeConfig
) -> Parts[Weight, TableFreeConfig]:
    """Weights and config of the model as trained; the config is the given one, completed."""
    config.architectures = [AUTO_CLASSES["AutoModelForCausalLM"]]
    config.modeling_version = MODELING_VERSION
    config.auto_map = auto_map()
    weights = {name_in_model(name): parameter for name, parameter in masters.items()}
    return Parts(weights, config)


def auto_map() -> dict[str, str]:
    """By which transformers finds the classes of the modelling file beside a configuration."""
    module = MODELING_FILE.stem
    return {auto: f"{module}.{own}" for auto, own in AUTO_CLASSES.items()}


def gpt_neox_parts(
    masters: dict[str, Weight], config: TableFreeConfig
) -> Parts[Weight | Tensor, GPTNeoXConfig]:
    """Weights and config of a stock GPT-NeoX that computes the same."""
    weights: dict[str, Weight | Tensor] = {
        renamed(name, TO_GPT_NEOX): parameter for name, parameter in masters.items()
    }
    if config.input_embedding != "learned":
        weights["gpt_neox.embed_in.weight"] = code_table(config)
    stock = GPTNeoXConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=4 * config.d_model,
        max_position_embeddings=config.seq_len,
        hidden_act="gelu",  # the exact one; "gelu_new" is the approximation by tanh
        layer_norm_eps=LAYER_NORM_EPS,
        use_parallel_residual=False,  # where GPT-NeoX itself has attention and MLP side by side
        attention_bias=True,
        tie_word_embeddings=False,
        architectures=["GPTNeoXForCausalLM"],
        **WHOLE_HEAD_ROTARY,
    )
    return Parts(weights, stock)


def code_table(config: TableFreeConfig) -> Tensor:
    """The codes of all ids, (V, D), fp32, which stand in for a trained table."""
    ids_BT = torch.arange(config.vocab_size)[None]
    table: Tensor = TokenCode(config)(ids_BT, torch.float32)[0]
    return table


AnyWeight = Tensor | StoredTensor
ARCHITECTURES: dict[
    str, Callable[[dict[str, AnyWeight], TableFreeConfig], Parts[AnyWeight, PretrainedConfig]]
] = {
    TABLEFREE: tablefree_parts,
    GPT_NEOX: gpt_neox_parts,
}


def config_json(
    config: PretrainedConfig, architecture: str, dtype: str, special_ids: dict[str, int]
) -> str:
    """`config.json`; the stock one also in the words of transformers 4."""
    content = config.to_diff_dict() | special_ids | {"dtype": dtype, "use_cache": True}
    # 5.0.0 takes the default of rotary_pct, 0.25, where only the words of 5 are there
    # (findings/transformers_5_0_gpt_neox_rotary.sh).
    if architecture == GPT_NEOX:
        content |= WHOLE_HEAD_ROTARY
    return json.dumps(content, indent=2, sort_keys=True) + "\n"

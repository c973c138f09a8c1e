"""What things are called in the forms of an export: files, precisions, parameters.

No torch here: the command's flags are read before that is imported.
"""

from pathlib import Path

TABLEFREE = "tablefree"
GPT_NEOX = "gpt_neox"
GGUF = "gguf"
# Of each form's weights, the default first; those of gguf as `gguf.GGMLQuantizationType` has them.
DTYPES = {
    TABLEFREE: ("float32", "bfloat16"),
    GPT_NEOX: ("float32", "bfloat16"),
    GGUF: ("f32", "f16", "q8_0"),
}

# It trains, and an export of the form tablefree ships a copy.
MODELING_FILE = Path(__file__).parents[1] / "modeling_tablefree.py"
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"  # of weights in several files
CARD_NAME = "README.md"
# What mends an export that nothing else does.
AGAIN = "export the run again"

# Parts of our parameters' names in checkpoints -> stock GPT-NeoX's, as on disk; transformers 5
# reads embed_out as lm_head.
TO_GPT_NEOX = {
    "input_embedding.": "gpt_neox.embed_in.",
    "layers.": "gpt_neox.layers.",
    ".attention_norm.": ".input_layernorm.",
    ".attention.output.": ".attention.dense.",
    ".mlp_norm.": ".post_attention_layernorm.",
    ".mlp.up.": ".mlp.dense_h_to_4h.",
    ".mlp.down.": ".mlp.dense_4h_to_h.",
    "final_norm.": "gpt_neox.final_layer_norm.",
    "output_projection.": "embed_out.",
}
# Parts of a stock GPT-NeoX's parameter names -> GGUF's.
TO_GGUF = {
    "gpt_neox.embed_in.": "token_embd.",
    "gpt_neox.layers.": "blk.",
    ".input_layernorm.": ".attn_norm.",
    ".attention.query_key_value.": ".attn_qkv.",
    ".attention.dense.": ".attn_output.",
    ".post_attention_layernorm.": ".ffn_norm.",
    ".mlp.dense_h_to_4h.": ".ffn_up.",
    ".mlp.dense_4h_to_h.": ".ffn_down.",
    "gpt_neox.final_layer_norm.": "output_norm.",
    "embed_out.": "output.",
}


def renamed(name: str, parts: dict[str, str]) -> str:
    """A parameter's name with each of its parts, from left to right in `parts`, in other words."""
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def gguf_name(dtype: str) -> str:
    """The name of a GGUF file; hubs and engines find the precision by its end."""
    return f"model-{dtype.upper()}.gguf"

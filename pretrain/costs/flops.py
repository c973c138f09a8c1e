"""What a model costs by arithmetic: parameters, and FLOPs a token. No torch.

MFU, model-FLOPs utilisation, is tokens/s x FLOPs a token / peak FLOP/s. What is counted for a
token, forward and backward together (the backward pass costs twice the forward one):

    6 x (12 L D^2 + V D)     the matrices of the blocks and the output projection: a multiplication
                             and an addition each
    6 x L T D                causal attention: a token meets T/2 keys on average, twice (scores,
                             then values)

Nothing is counted for the input, table or code, nor for recomputed activations, norms and the
optimizer. L layers, D model width, T window, V vocabulary.
"""

from pretrain.config.recipe import ModelRecipe

FORMULA = "6 x (12 L D^2 + V D) + 6 L T D"


def count_parameters(model: ModelRecipe) -> dict[str, int]:
    """Trained parameters of each part of the decoder."""
    width = model.d_model
    table = model.vocab_size * width
    # Vectors of a block: 9 D of biases, 4 D in two LayerNorms.
    block = 12 * width**2 + 13 * width
    return {
        "input_embedding": table if model.input_embedding == "learned" else 0,
        "blocks": model.num_layers * block,
        "final_norm": 2 * width,
        "output_projection": table,
    }


def flops_per_token(model: ModelRecipe) -> float:
    """FLOPs of a trained token, forward and backward, by FORMULA."""
    layers = model.num_layers
    width = model.d_model
    blocks = 12 * layers * width**2
    head = model.vocab_size * width
    attention = layers * model.seq_len * width
    return 6.0 * (blocks + head + attention)

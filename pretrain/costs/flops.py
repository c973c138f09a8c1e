"""What a model costs by arithmetic, and what devices give: parameters, FLOPs a token, peak figures.
No torch.

MFU, model-FLOPs utilisation, is tokens/s x FLOPs a token / peak FLOP/s. What is counted for a
token, forward and backward together (the backward pass costs twice the forward one):

    6 x (12 L D^2 + V D)     the matrices of the blocks and the output projection: a multiplication and an addition each
    6 x L T D                causal attention: a token meets T/2 keys on average, twice (scores, then values)

Nothing is counted for the input, table or code, nor for recomputed activations, norms and the
optimizer. L layers, D model width, T window, V vocabulary.
"""

from pretrain.config.recipe import ModelRecipe

FORMULA = "6 x (12 L D^2 + V D) + 6 L T D"


def count_parameters(model: ModelRecipe) -> dict[str, int]:
    """Trained parameters of each part of the decoder."""
    width, table = model.d_model, model.vocab_size * model.d_model
    return {
        "input_embedding": table if model.input_embedding == "learned" else 0,
        # 9 D biases, 4 D in two LayerNorms
        "blocks": model.num_layers * (12 * width**2 + 13 * width),
        "final_norm": 2 * width,
        "output_projection": table,
    }


def flops_per_token(model: ModelRecipe) -> float:
    """FLOPs of a trained token, forward and backward: 6 x (12 L D^2 + V D) + 6 L T D, as the
    module says.
    """
    matrices = 12 * model.num_layers * model.d_model**2 + model.vocab_size * model.d_model
    return 6.0 * (matrices + model.num_layers * model.seq_len * model.d_model)

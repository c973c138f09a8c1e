"""How much memory the loss head may take for a chunk of logits."""

# Of a chunk's fp32 logits. A CPU gains nothing from more. A GPU needs rows enough
# for a product of (C, V) with (V, D) to fill it, and for passes over the fp32 weight gradient, one
# a chunk, to be few.
LOGITS_BYTES = {
    "cpu": 64 * 2**20,
    "cuda": 2**30,
}


def chunk_tokens(vocab_size: int, device_type: str) -> int:
    """Tokens of a chunk of the loss head: at V = 65,536, 256 on a CPU and 4,096 on a GPU.

    A device of another kind is taken for a GPU.
    """
    budget = LOGITS_BYTES.get(device_type, LOGITS_BYTES["cuda"])
    bytes_per_token = 4 * vocab_size
    return max(1, budget // bytes_per_token)

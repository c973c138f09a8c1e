"""How many bytes of its device a rank needs at its peak, by arithmetic: what fits, before anything
is built. No torch.

Counted are tensors in eager mode; torch.compile keeps less. N tokens of a micro-batch, D width, V
vocabulary, P parameters, e bytes of a number of the model, n ranks, u = e N D the bytes of one
hidden tensor.

Held throughout, by ZeRO-2: parameters e P, fp32 masters 4 P/n, both moments 8 P/n (the last two
elsewhere, where the optimizer is offloaded). Activations: a block of mode `none` keeps 18 u: its
input and first norm 2, query-key-value 3, rotated query and key 2, attention 1, second residual and
norm 2, both sides of the GELU 8; and the statistics of norms and softmax. `selective` keeps the 11
u of input, products and attention, and recomputes 8 more of one block at a time; `full` keeps the
input and recomputes 17. In flight are 5 u of gradients, inside the MLP. Gradients, as DeepSpeed
0.19 has them (runtime/zero/stage_1_and_2.py): each is copied into a bucket of `reduce_bucket_size`
elements (two with overlap_comm); one larger than that stays where it is. A full bucket is copied,
cast to the communication type, reduced, and added to the rank's fp32 partition of 4 P/n, which
lives from a step's first bucket to its update. Of an fp32 model every micro-step has a partition of
its own, with every parameter whole of which the rank owns a part, and the update takes a flat copy.
The gradient norm takes an fp64 copy of one parameter.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from pretrain.config.deepspeed import accumulation_steps
from pretrain.config.recipe import Recipe
from pretrain.costs.budgets import chunk_tokens
from pretrain.costs.flops import count_parameters

MODES = ("none", "selective", "full")
# hidden tensors that a block keeps for its backward pass
KEPT = {"none": 18, "selective": 11, "full": 1}
RECOMPUTED = {"none": 0, "selective": 8, "full": 17}  # and those that come back while it runs
IN_FLIGHT = 5
# What a device must have besides tensors. Contexts of CUDA and NCCL, and what its allocator cannot
# use, are assumed; of a process that trains on a CPU and keeps freed memory 0.59 to 0.79 were
# tensors (tests/benchmarks/plan_accuracy.py).
CONTEXT_BYTES, USABLE = {"cpu": 0.0, "cuda": 1.5e9}, {"cpu": 0.6, "cuda": 0.96}


class Sizes:
    """The letters of the module's docstring, for one run on one kind of device (cpu or cuda).

    Raises UserError where the batch does not divide over the ranks.
    """

    def __init__(
        self, recipe: Recipe, engine_config: dict[str, Any], ranks: int, device_type: str
    ) -> None:
        zero, counts = engine_config.get("zero_optimization", {}), count_parameters(recipe.model)
        blocks = [
            recipe.model.d_model**2 * part
            for _ in range(recipe.model.num_layers)
            for part in (3, 1, 4, 4)
        ]
        self.recipe, self.engine_config, self.ranks, self.device_type = (
            recipe,
            engine_config,
            ranks,
            device_type,
        )
        self.element = 2 if engine_config.get("bf16", {}).get("enabled") else 4
        self.tokens = recipe.batch.micro_batch_size * recipe.model.seq_len
        self.hidden = self.element * self.tokens * recipe.model.d_model
        self.table = counts["output_projection"]  # the largest parameter
        self.matrices = [*filter(None, [counts["input_embedding"]]), *blocks, self.table]
        self.parameters = sum(counts.values())
        self.bucket = float(zero.get("reduce_bucket_size", 5e8))
        self.buckets = self.element * self.bucket * (2 if zero.get("overlap_comm") else 1)
        self.cast = (
            4 if self.element == 2 and engine_config.get("communication_data_type") == "fp32" else 0
        )
        self.accumulates = accumulation_steps(recipe, ranks) > 1
        self.offloads = "offload_optimizer" in zero


def held_bytes(sizes: Sizes) -> dict[str, float]:
    """What stays on the device from step to step."""
    share = 0.0 if sizes.offloads else sizes.parameters / sizes.ranks
    return {
        "parameters": float(sizes.element * sizes.parameters),
        "masters": 4 * share,
        "moments": 8 * share,
    }


def whole_parameters(matrices: Sequence[int], ranks: int) -> int:
    """The most elements that those parameters have together of which one rank owns a part."""
    share = -(-sum(matrices) // ranks)
    owned = [0] * ranks
    for size, end in zip(matrices, accumulate(matrices), strict=True):
        for rank in range((end - size) // share, (end - 1) // share + 1):
            owned[rank] += size
    return max(owned)


def partition_bytes(sizes: Sizes) -> float:
    """The gradients of the parameters that the rank owns."""
    share = sizes.parameters / sizes.ranks
    return 4.0 * (whole_parameters(sizes.matrices, sizes.ranks) if sizes.element == 4 else share)


def activation_bytes(sizes: Sizes, blocks: int) -> float:
    """What the first blocks keep for their backward pass."""
    checkpointing = sizes.recipe.activation_checkpointing
    mode, heads = checkpointing.mode, sizes.recipe.model.num_heads
    statistics = {"none": 4 * heads + 4 * sizes.element, "selective": 4 * heads, "full": 0}
    kept = {key: KEPT[key] * sizes.hidden + statistics[key] * sizes.tokens for key in MODES}
    recomputed = 0 if mode == "none" else -(-blocks // checkpointing.every_n_layers)
    return float((blocks - recomputed) * kept["none"] + recomputed * kept[mode])


def loss_head_bytes(sizes: Sizes) -> float:
    """The most that the loss head holds in its forward pass, besides its input; see
    pretrain/model/loss.py.
    """
    model, low_precision = sizes.recipe.model, sizes.element == 2
    if sizes.recipe.loss_head == "whole":
        return (8.0 + 2.0 * low_precision) * sizes.tokens * model.vocab_size
    chunk = min(sizes.tokens, chunk_tokens(model.vocab_size, sizes.device_type))
    gradients = 4.0 * (sizes.table + sizes.tokens * model.d_model)
    copies = 4.0 * sizes.table if sizes.device_type == "cpu" else 2.0 * chunk * model.vocab_size
    return 8.0 * chunk * model.vocab_size + gradients + copies * low_precision


def backward_bytes(sizes: Sizes) -> float:
    """Activations, gradients on their way and the partition, at the worst block of the backward
    pass.
    """
    square, partition = sizes.recipe.model.d_model**2, partition_bytes(sizes)
    earlier = partition * sizes.accumulates

    def partitions(reduced: float) -> float:
        """Once that many elements are reduced; on a CPU memory that nothing has written to does
        not exist.
        """
        if sizes.element == 2:
            return partition  # written with zeros
        return earlier + (min(partition, 4 * reduced) if sizes.device_type == "cpu" else partition)

    def buckets(gradients: float) -> float:
        """Once that many elements have come."""
        return (
            min(sizes.buckets, sizes.element * gradients)
            if sizes.device_type == "cpu"
            else sizes.buckets
        )

    by_itself = sizes.element * sizes.table * (sizes.table > sizes.bucket)
    copied = sizes.element * (sizes.element == 2 or sizes.ranks > 1) + sizes.cast
    work = (RECOMPUTED[sizes.recipe.activation_checkpointing.mode] + IN_FLIGHT) * sizes.hidden
    work += 4 * sizes.element * square + by_itself
    layers, reduced, waiting = sizes.recipe.model.num_layers, 0.0, float(sizes.table)
    gradients, worst = earlier, 0.0
    if by_itself:
        reduced, waiting, gradients = waiting, 0.0, partitions(waiting)
        worst = (
            activation_bytes(sizes, layers)
            + 2 * sizes.hidden
            + by_itself
            + gradients
            + copied * sizes.table
        )
    for blocks in range(layers, 0, -1):
        waiting += 12 * square
        come, reducing = reduced + waiting, 0.0
        if waiting > sizes.bucket:
            reducing = copied * min(waiting, max(sizes.bucket, 4 * square))
            reduced, waiting = come - 12 * square, 12.0 * square
            gradients = partitions(reduced)
        worst = max(
            worst,
            activation_bytes(sizes, blocks)
            + work
            + gradients
            + reducing
            + buckets(come - 12 * square),
        )
    return worst


def phase_bytes(sizes: Sizes) -> dict[str, float]:
    """The most in each phase: while the engine is built, and of a step."""
    held, partition = sum(held_bytes(sizes).values()), partition_bytes(sizes)
    share, norm = (
        4 * sizes.parameters / sizes.ranks,
        8.0 * min(sizes.table, sizes.parameters / sizes.ranks),
    )
    earlier, activations = (
        partition * sizes.accumulates,
        activation_bytes(sizes, sizes.recipe.model.num_layers),
    )
    gradients = 4.0 * (sizes.table + sizes.tokens * sizes.recipe.model.d_model)
    low_precision = sizes.hidden + sizes.element * sizes.table if sizes.element == 2 else 0
    return {
        "building": sizes.element * sizes.parameters
        + max(float(sizes.element * sizes.parameters), 2 * share),
        "loss head": held + earlier + activations + 2 * sizes.hidden + loss_head_bytes(sizes),
        "loss head, backward": held
        + earlier
        + activations
        + sizes.hidden
        + gradients
        + low_precision,
        "blocks, backward": held + backward_bytes(sizes),
        "update": held + partition + max(norm, share * (sizes.element == 4)),
    }


def needed_bytes(
    recipe: Recipe, engine_config: dict[str, Any], world_size: int, device_type: str
) -> float:
    """What a rank's device must have: the largest phase, and what is not tensors."""
    peak = max(phase_bytes(Sizes(recipe, engine_config, world_size, device_type)).values())
    return peak / USABLE[device_type] + CONTEXT_BYTES[device_type]

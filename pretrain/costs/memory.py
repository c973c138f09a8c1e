"""How many bytes of its device a rank needs at its peak, by arithmetic, before anything is built.

No torch is needed for it. What fits is for pretrain/costs/fit.py to find.

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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from pretrain.config.deepspeed import accumulation_steps
from pretrain.config.recipe import ModelRecipe, Recipe
from pretrain.costs.budgets import chunk_tokens
from pretrain.costs.flops import count_parameters

MODES = ("none", "selective", "full")
# Hidden tensors that a block keeps for its backward pass, those that come back while it runs, and
# gradients in flight.
KEPT = {"none": 18, "selective": 11, "full": 1}
RECOMPUTED = {"none": 0, "selective": 8, "full": 17}
IN_FLIGHT = 5
# What a device must have besides tensors. Contexts of CUDA and NCCL, and what its allocator cannot
# use, are assumed; of a process that trains on a CPU and keeps freed memory 0.59 to 0.79 were
# tensors (tests/benchmarks/plan_accuracy.py).
CONTEXT_BYTES = {"cpu": 0.0, "cuda": 1.5e9}
USABLE = {"cpu": 0.6, "cuda": 0.96}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The letters of the module's docstring, for one run on one kind of device."""

    recipe: Recipe
    engine_config: dict[str, Any]
    ranks: int
    device_type: str  # cpu or cuda
    mode: str  # of activation checkpointing
    layers: int
    is_bf16: bool
    element: int  # bytes of a number of the model
    tokens: int  # of a micro-batch
    hidden: int  # bytes of one hidden tensor
    parameters: int
    table: int  # elements of the output projection, the largest parameter
    block: int  # elements of a block's matrices
    largest_in_block: int  # elements of the largest of them, each side of the MLP
    matrices: list[int]  # elements of every matrix, in ZeRO's order
    bucket: float  # elements that are reduced together
    buckets: float  # bytes of all buckets
    cast: int  # bytes of an element as it travels, where it is cast for that
    accumulates: bool  # several micro-steps make a step
    offloads: bool  # the optimizer is not on the device

    @property
    def is_on_cpu(self) -> bool:
        """Whether memory to which nothing has been written does not exist yet."""
        return self.device_type == "cpu"


def sizes_of(recipe: Recipe, engine_config: dict[str, Any], ranks: int, device_type: str) -> Sizes:
    """Raises UserError where the batch does not divide over the ranks."""
    model = recipe.model
    zero = engine_config.get("zero_optimization", {})
    is_bf16 = bool(engine_config.get("bf16", {}).get("enabled"))
    element = 2 if is_bf16 else 4
    tokens = recipe.batch.micro_batch_size * model.seq_len
    square = model.d_model**2
    counts = count_parameters(model)
    bucket = float(zero.get("reduce_bucket_size", 5e8))
    how_many = 2 if zero.get("overlap_comm") else 1
    travels_in_fp32 = engine_config.get("communication_data_type") == "fp32"
    return Sizes(
        recipe=recipe,
        engine_config=engine_config,
        ranks=ranks,
        device_type=device_type,
        mode=recipe.activation_checkpointing.mode,
        layers=model.num_layers,
        is_bf16=is_bf16,
        element=element,
        tokens=tokens,
        hidden=element * tokens * model.d_model,
        parameters=sum(counts.values()),
        table=counts["output_projection"],
        block=12 * square,
        largest_in_block=4 * square,
        matrices=matrices_in_order(model),
        bucket=bucket,
        buckets=element * bucket * how_many,
        cast=4 if is_bf16 and travels_in_fp32 else 0,
        accumulates=accumulation_steps(recipe, ranks) > 1,
        offloads="offload_optimizer" in zero,
    )


def matrices_in_order(model: ModelRecipe) -> list[int]:
    """Elements of every matrix in the order in which ZeRO lays them out."""
    square = model.d_model**2
    # Query-key-value, attention's output, both sides of the MLP.
    block = [3 * square, square, 4 * square, 4 * square]
    counts = count_parameters(model)
    matrices = block * model.num_layers + [counts["output_projection"]]
    if counts["input_embedding"]:
        matrices.insert(0, counts["input_embedding"])
    return matrices


def held_bytes(sizes: Sizes) -> dict[str, float]:
    """What stays on the device from step to step."""
    share = 0.0 if sizes.offloads else sizes.parameters / sizes.ranks
    return {
        "parameters": float(sizes.element * sizes.parameters),
        "masters": 4 * share,
        "moments": 8 * share,
    }


def whole_parameters(matrices: Sequence[int], ranks: int) -> int:
    """The most elements that those parameters have together of which one rank owns a part.

    The partitions are equal cuts through all of them, one after another.
    """
    share = math.ceil(sum(matrices) / ranks)
    owned = [0] * ranks
    for size, end in zip(matrices, accumulate(matrices), strict=True):
        first_owner = (end - size) // share
        last_owner = (end - 1) // share
        for rank in range(first_owner, last_owner + 1):
            owned[rank] += size
    return max(owned)


def partition_bytes(sizes: Sizes) -> float:
    """The gradients of the parameters that the rank owns."""
    if sizes.is_bf16:
        return 4.0 * (sizes.parameters / sizes.ranks)
    return 4.0 * whole_parameters(sizes.matrices, sizes.ranks)


def kept_bytes(sizes: Sizes, mode: str) -> int:
    """What a block in that mode keeps for its backward pass."""
    hidden = KEPT[mode] * sizes.hidden
    if mode == "full":
        return hidden
    # Of every token: the softmax's statistic for each head, mean and deviation of both norms.
    statistics = 4 * sizes.recipe.model.num_heads
    if mode == "none":
        statistics += 4 * sizes.element
    return hidden + statistics * sizes.tokens


def activation_bytes(sizes: Sizes, blocks: int) -> float:
    """What the first blocks keep for their backward pass."""
    recomputed = 0
    if sizes.mode != "none":
        every = sizes.recipe.activation_checkpointing.every_n_layers
        recomputed = math.ceil(blocks / every)
    whole = blocks - recomputed
    kept = whole * kept_bytes(sizes, "none")
    kept += recomputed * kept_bytes(sizes, sizes.mode)
    return float(kept)


def loss_head_bytes(sizes: Sizes) -> float:
    """The most that the loss head holds in its forward pass, besides its input.

    See pretrain/model/chunked_cross_entropy.py.
    """
    vocab_size = sizes.recipe.model.vocab_size
    if sizes.recipe.loss_head == "whole":
        # Logits and their gradient in fp32, and in bf16 the logits that were cast.
        bytes_per_logit = 10.0 if sizes.is_bf16 else 8.0
        return bytes_per_logit * sizes.tokens * vocab_size
    chunk = min(sizes.tokens, chunk_tokens(vocab_size, sizes.device_type))
    logits = chunk * vocab_size
    gradients = 4.0 * (sizes.table + sizes.hidden // sizes.element)
    held = 8.0 * logits + gradients
    if sizes.is_bf16 and sizes.is_on_cpu:
        held += 4.0 * sizes.table  # a CPU multiplies a copy of the weight in fp32
    elif sizes.is_bf16:
        held += 2.0 * logits  # a GPU multiplies errors in bf16
    return held


class BackwardPass:
    """Gradients on their way, from the output projection down to the first block."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.partition = partition_bytes(sizes)
        # The partition of the micro-steps before, to which this one adds.
        self.earlier = self.partition if sizes.accumulates else 0.0
        is_larger = sizes.table > sizes.bucket
        self.table_by_itself = sizes.element * sizes.table if is_larger else 0
        # Bytes for each element of a bucket while it is reduced: its copy, and what it is cast to.
        self.while_reduced = sizes.cast
        if sizes.is_bf16 or sizes.ranks > 1:
            self.while_reduced += sizes.element
        self.reduced = 0.0  # elements that were reduced
        self.waiting = float(sizes.table)  # elements that wait in the bucket
        self.partitions = self.earlier  # bytes

    def worst(self) -> float:
        """The most bytes at any block."""
        worst = 0.0
        if self.table_by_itself:
            worst = self._after_table()
        for blocks in range(self.sizes.layers, 0, -1):
            worst = max(worst, self._at_block(blocks))
        return worst

    def _after_table(self) -> float:
        """Bytes once the output projection, which no bucket holds, is reduced by itself."""
        sizes = self.sizes
        self.reduced = self.waiting
        self.waiting = 0.0
        self.partitions = self._partitions_now()
        copy = self.while_reduced * sizes.table
        kept = activation_bytes(sizes, sizes.layers) + 2 * sizes.hidden
        return kept + self.table_by_itself + self.partitions + copy

    def _at_block(self, blocks: int) -> float:
        """Bytes while the last of so many blocks is gone through, and its gradients come."""
        sizes = self.sizes
        self.waiting += sizes.block
        come = self.reduced + self.waiting
        reducing = 0.0
        if self.waiting > sizes.bucket:
            # A parameter that is larger than the bucket makes it larger.
            largest = max(sizes.bucket, sizes.largest_in_block)
            in_bucket = min(self.waiting, largest)
            reducing = self.while_reduced * in_bucket
            # What came last has begun the next bucket.
            self.reduced = come - sizes.block
            self.waiting = float(sizes.block)
            self.partitions = self._partitions_now()
        hidden_tensors = RECOMPUTED[sizes.mode] + IN_FLIGHT
        work = hidden_tensors * sizes.hidden
        work += sizes.element * sizes.largest_in_block
        work += self.table_by_itself
        buckets = self._buckets_after(come - sizes.block)
        kept = activation_bytes(sizes, blocks)
        return kept + work + self.partitions + reducing + buckets

    def _partitions_now(self) -> float:
        """Bytes of partitions, with what is reduced by now."""
        if self.sizes.is_bf16:
            return self.partition  # written with zeros
        this_step = self.partition
        if self.sizes.is_on_cpu:
            this_step = min(this_step, 4 * self.reduced)
        return self.earlier + this_step

    def _buckets_after(self, gradients: float) -> float:
        """Bytes of the buckets once that many elements have come."""
        if not self.sizes.is_on_cpu:
            return self.sizes.buckets
        return min(self.sizes.buckets, self.sizes.element * gradients)


def phase_bytes(sizes: Sizes) -> dict[str, float]:
    """The most in each phase: while the engine is built, and of a step."""
    held = sum(held_bytes(sizes).values())
    partition = partition_bytes(sizes)
    parameters = float(sizes.element * sizes.parameters)
    own = sizes.parameters / sizes.ranks  # elements of this rank's partition
    masters = 4 * sizes.parameters / sizes.ranks

    # Before the blocks' backward pass: what is kept of the micro-steps and the blocks so far.
    kept = held
    if sizes.accumulates:
        kept += partition
    kept += activation_bytes(sizes, sizes.layers)
    gradients = 4.0 * (sizes.table + sizes.hidden // sizes.element)
    in_bf16 = 0
    if sizes.is_bf16:
        in_bf16 = sizes.hidden + sizes.element * sizes.table

    # The norm takes an fp64 copy of one parameter, the update of an fp32 model a flat copy.
    at_update = 8.0 * min(sizes.table, own)
    if not sizes.is_bf16:
        at_update = max(at_update, masters)
    return {
        "building": parameters + max(parameters, 2 * masters),
        "loss head": kept + 2 * sizes.hidden + loss_head_bytes(sizes),
        "loss head, backward": kept + sizes.hidden + gradients + in_bf16,
        "blocks, backward": held + BackwardPass(sizes).worst(),
        "update": held + partition + at_update,
    }


def needed_bytes(
    recipe: Recipe, engine_config: dict[str, Any], world_size: int, device_type: str
) -> float:
    """What a rank's device must have: the largest phase, and what is not tensors."""
    sizes = sizes_of(recipe, engine_config, world_size, device_type)
    peak = max(phase_bytes(sizes).values())
    return peak / USABLE[device_type] + CONTEXT_BYTES[device_type]

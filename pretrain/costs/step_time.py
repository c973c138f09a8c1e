"""How long a step takes on some number of ranks, by arithmetic. No torch.

A step of n ranks, each with A micro-batches:

    compute       tokens/n x FLOPs a token / (MFU x peak FLOP/s), FLOPs as costs/flops.py counts
                  them; with full checkpointing the blocks' forward pass once more; or what
                  --calibrate measured
    update        46 bytes of memory traffic for each of the P/n parameters that a rank owns, over
                  its bandwidth
    communicate   A x (n-1)/n x 2 c P + (n-1)/n x e P bytes over the interconnect: DeepSpeed 0.19's
                  ZeRO-2 reduces the gradients, c bytes each, in every micro-step (stage 1: once),
                  by an all-reduce (2 c P), or with use_multi_rank_bucket_allreduce off to their
                  owner alone (c P); then it gathers the parameters, e bytes each. With overlap_comm
                  reducing hides behind the backward pass, two thirds of compute; without, as
                  shipped, DeepSpeed reduces on the stream that computes, and nothing overlaps

The interconnect is what one GPU sends a second within its node, and what its network card sends.
Between nodes a ring uses every card of a node for a part of the data, so a rank gets the lesser of
its link and of all cards of its node (NVIDIA/nccl#812 has 192 GB/s measured over 8 cards of 25).
Left out are latency and stragglers, which weigh more the more ranks there are, and validation and
saves.
"""

import math
from dataclasses import dataclass
from typing import Any

from data_prep.errors import UserError, nearest
from pretrain.config.recipe import Recipe
from pretrain.costs.devices import LINKS, Device
from pretrain.costs.fit import with_micro_batch
from pretrain.costs.flops import count_parameters, flops_per_token
from pretrain.costs.memory import Sizes, needed_bytes

# Peers publish 0.38 to 0.57 for models of this size; below all of them, since nothing is measured.
ASSUMED_MFU = 0.35
UPDATE_BYTES = 46  # norm 4, clipping 8, AdamW 16 read and 12 written, low-precision copy 6
REACHED = 0.8  # of a link, by collectives
BACKWARD_SHARE = 2 / 3  # of the time of forward and backward pass


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of a rank's work."""

    window: float  # forward and backward
    reduced_parameter: float  # each micro-step
    updated_parameter: float  # each update


@dataclass(frozen=True, kw_only=True)
class Links:
    """Bytes/s that a rank sends, and where one link ends and the other begins."""

    in_node: float
    beyond: float
    node: int  # ranks of a node

    def of(self, ranks: int) -> float:
        """Bytes/s of a rank among so many."""
        return self.in_node if ranks <= self.node else self.beyond


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a step is spread over ranks, and over micro-steps in each."""

    ranks: int
    accumulation: int
    bytes_per_s: float  # of a rank's link


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A step on some number of ranks."""

    ranks: int
    micro_batch_size: int
    accumulation: int
    needed_bytes: float  # of a rank's memory
    step_s: float


def parse_interconnect(text: str) -> tuple[float, float]:
    """Bytes/s of a GPU's link within its node, and of its network card.

    Both by name, as `nvlink4,ndr`, or in GB/s, as `300,25`. Raises UserError.
    """
    rates = []
    for part in text.split(","):
        try:
            gigabytes_per_s = float(LINKS.get(part.lower(), part))
        except ValueError:
            raise UserError(
                f"--interconnect {part}: {nearest(part, LINKS)}, or give GB/s of one GPU"
            ) from None
        rates.append(REACHED * 1e9 * gigabytes_per_s)
    if len(rates) > 2 or not all(0 < rate < math.inf for rate in rates):
        raise UserError(
            f"--interconnect {text}: expected GB/s above 0, within a node and between nodes"
        )
    return rates[0], rates[-1]


def assumed_costs(recipe: Recipe, device: Device, mfu: float) -> Costs:
    """From a device's peak figures and an MFU; reducing is part of that MFU."""
    model = recipe.model
    flops = flops_per_token(model)
    if recipe.activation_checkpointing.mode == "full":
        # The blocks' forward pass, a third of their work, once more.
        of_head = 6.0 * model.vocab_size * model.d_model
        of_blocks = flops - of_head
        flops += of_blocks / 3 / recipe.activation_checkpointing.every_n_layers
    return Costs(
        window=model.seq_len * flops / (mfu * device.peak_flops),
        reduced_parameter=0.0,
        updated_parameter=UPDATE_BYTES / device.bytes_per_s,
    )


def step_seconds(
    recipe: Recipe, engine_config: dict[str, Any], costs: Costs, spread: Spread
) -> float:
    """One step, by the formula of the module."""
    zero = engine_config.get("zero_optimization", {})
    parameters = sum(count_parameters(recipe.model).values())
    is_bf16 = bool(engine_config.get("bf16", {}).get("enabled"))
    ranks = spread.ranks

    windows = recipe.global_batch_size / ranks
    compute = windows * costs.window
    # What a rank does to its gradients by itself.
    reduced = spread.accumulation * parameters * costs.reduced_parameter
    updated = parameters / ranks * costs.updated_parameter

    sends_fp32 = engine_config.get("communication_data_type") == "fp32" or not is_bf16
    bytes_sent = 4 if sends_fp32 else 2
    ways = 2 if zero.get("use_multi_rank_bucket_allreduce", True) else 1
    times = spread.accumulation if zero.get("stage") == 2 else 1
    # Through a ring goes all of it but a rank's own part.
    ring = parameters * (ranks - 1) / ranks / spread.bytes_per_s
    reduce = times * ways * bytes_sent * ring
    gather = (2 if is_bf16 else 4) * ring
    hidden = BACKWARD_SHARE * compute if zero.get("overlap_comm") else 0.0
    return compute + reduced + updated + gather + max(0.0, reduce - hidden)


def scale_to(sizes: Sizes, costs: Costs, ranks: int, bytes_per_s: float) -> Scale:
    """The run on that many ranks, over which its batch divides.

    It keeps its micro-batch, or takes the next smaller one that divides.
    """
    recipe = sizes.recipe
    config = sizes.engine_config
    own_windows = recipe.global_batch_size // ranks
    size = recipe.batch.micro_batch_size
    while own_windows % size != 0:
        size -= 1
    smaller = with_micro_batch(recipe, size, sizes.mode)
    spread = Spread(ranks=ranks, accumulation=own_windows // size, bytes_per_s=bytes_per_s)
    return Scale(
        ranks=ranks,
        micro_batch_size=size,
        accumulation=spread.accumulation,
        needed_bytes=needed_bytes(smaller, config, ranks, sizes.device_type),
        step_s=step_seconds(recipe, config, costs, spread),
    )

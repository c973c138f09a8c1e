"""How long a step takes on some number of ranks, by arithmetic."""

from dataclasses import dataclass
from typing import Any

from data_prep.errors import UserError, nearest
from pretrain.config.recipe import Recipe
from pretrain.costs import fit, memory
from pretrain.costs.devices import LINKS
from pretrain.costs.flops import count_parameters

# peers publish 0.38 to 0.57 for models of this size; below all of them, since nothing is measured
ASSUMED_MFU = 0.35
UPDATE_BYTES = 46  # norm 4, clipping 8, AdamW 16 read and 12 written, low-precision copy 6
REACHED = 0.8  # of a link, by collectives


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of a rank's work: of a window, forward and backward; of a parameter, each
    micro-step and each update.
    """

    window: float
    reduced_parameter: float
    updated_parameter: float


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A step on some number of ranks."""

    ranks: int
    micro_batch_size: int
    accumulation: int
    needed_bytes: float  # of a rank's memory
    step_s: float


def parse_interconnect(text: str) -> tuple[float, float]:
    """Bytes/s of a GPU's link within its node, and of its network card: `nvlink4,ndr` or GB/s
    such as `300,25`.
    """
    rates = []
    for part in text.split(","):
        try:
            rates.append(REACHED * 1e9 * float(LINKS.get(part.lower(), part)))
        except ValueError:
            raise UserError(
                f"--interconnect {part}: {nearest(part, LINKS)}, or give GB/s of one GPU"
            ) from None
    if len(rates) > 2 or not all(0 < rate < float("inf") for rate in rates):
        raise UserError(
            f"--interconnect {text}: expected GB/s above 0, within a node and between nodes"
        )
    return rates[0], rates[-1]


def step_seconds(
    recipe: Recipe,
    engine_config: dict[str, Any],
    costs: Costs,
    ranks: int,
    bytes_per_s: float,
    accumulation: int,
) -> float:
    """One step, by the formula of the module."""
    zero, parameters = (
        engine_config.get("zero_optimization", {}),
        sum(count_parameters(recipe.model).values()),
    )
    low_precision = engine_config.get("bf16", {}).get("enabled")
    sent = 4 if engine_config.get("communication_data_type") == "fp32" or not low_precision else 2
    ways, times = (
        1 + zero.get("use_multi_rank_bucket_allreduce", True),
        accumulation if zero.get("stage") == 2 else 1,
    )
    compute = recipe.global_batch_size / ranks * costs.window
    reduce = times * ways * sent * parameters * (ranks - 1) / ranks / bytes_per_s
    gather = (2 if low_precision else 4) * parameters * (ranks - 1) / ranks / bytes_per_s
    local = (
        accumulation * parameters * costs.reduced_parameter
        + parameters / ranks * costs.updated_parameter
    )
    return (
        compute
        + local
        + gather
        + max(0.0, reduce - (2 / 3 * compute if zero.get("overlap_comm") else 0))
    )


def scale_to(sizes: memory.Sizes, costs: Costs, ranks: int, bytes_per_s: float) -> Scale:
    """The run on that many ranks, over which its batch divides, with its micro-batch or the next
    smaller one.
    """
    recipe, config = sizes.recipe, sizes.engine_config
    own_windows = recipe.global_batch_size // ranks
    size = max(n for n in range(1, recipe.batch.micro_batch_size + 1) if own_windows % n == 0)
    smaller = fit.with_micro_batch(recipe, size, recipe.activation_checkpointing.mode)
    return Scale(
        ranks=ranks, micro_batch_size=size, accumulation=own_windows // size,
        needed_bytes=memory.needed_bytes(smaller, config, ranks, sizes.device_type),
        step_s=step_seconds(recipe, config, costs, ranks, bytes_per_s, own_windows // size),
    )  # fmt: skip

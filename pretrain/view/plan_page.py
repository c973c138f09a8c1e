"""What `pretrain.plan` prints: figures of costs in the units in which a reader thinks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.config.recipe import Recipe
from pretrain.costs.devices import Device
from pretrain.costs.fit import largest_micro_batch, with_micro_batch
from pretrain.costs.flops import FORMULA, count_parameters, flops_per_token
from pretrain.costs.memory import (
    MODES,
    Sizes,
    activation_bytes,
    held_bytes,
    loss_head_bytes,
    needed_bytes,
    partition_bytes,
    sizes_of,
)
from pretrain.costs.step_time import Links, Scale
from pretrain.view.templates import render

GB = 1e9  # bytes
CHECKPOINT_BYTES = 12  # a parameter: master and both moments in fp32
TOKEN_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a run is on its own and on other numbers of ranks."""

    links: Links
    scales: dict[int, Scale]  # by ranks; none where the speed is not known
    uneven: Sequence[int]  # ranks over which the batch does not divide
    origin: str  # what it rests on, or why it is not known


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was asked, and what came out."""

    recipe_name: str
    nodes: int
    gpus: int  # of a node
    device: Device | None  # None: a CPU
    sizes: Sizes
    available_bytes: float  # of a rank's memory
    data_tokens: int | None  # of the data set, if it is known
    one_input: str | None  # about ids that are one input
    price_per_gpu_hour: float | None
    speed: Speed

    @property
    def recipe(self) -> Recipe:
        """The run that is planned."""
        return self.sizes.recipe


@dataclass(frozen=True, kw_only=True)
class ModeRow:
    """A checkpointing mode: what it needs, and the largest micro-batch that fits."""

    mode: str
    activations_gb: float
    needed_gb: float
    largest: int | None


@dataclass(frozen=True, kw_only=True)
class ScaleRow:
    """A number of ranks: what a rank needs, and where it fits how fast the run is."""

    scale: Scale
    fits: bool
    needed_gb: float
    tokens_per_s: float
    efficiency: float  # of the smallest number of ranks on which it fits
    hours: float
    gpu_hours: float
    price: float | None


def mode_row(plan: Plan, mode: str) -> ModeRow:
    """What a rank needs in a checkpointing mode."""
    sizes = plan.sizes
    recipe = with_micro_batch(plan.recipe, plan.recipe.batch.micro_batch_size, mode)
    other = sizes_of(recipe, sizes.engine_config, sizes.ranks, sizes.device_type)
    needed = needed_bytes(recipe, sizes.engine_config, sizes.ranks, sizes.device_type)
    return ModeRow(
        mode=mode,
        activations_gb=activation_bytes(other, sizes.layers) / GB,
        needed_gb=needed / GB,
        largest=largest_micro_batch(sizes, plan.available_bytes, mode),
    )


def scale_rows(plan: Plan) -> list[ScaleRow]:
    """One row for each number of ranks."""
    scales = plan.speed.scales.values()
    recipe = plan.recipe
    # The first of them is what the others are compared with.
    fitting = [scale for scale in scales if scale.needed_bytes <= plan.available_bytes]
    rows = []
    for scale in scales:
        # Validation and saves are left out, as in the formula of a step.
        hours = recipe.total_steps * scale.step_s / 3600
        gpu_hours = hours * scale.ranks
        efficiency = 0.0
        if fitting:
            first = fitting[0]
            efficiency = first.step_s * first.ranks / (scale.step_s * scale.ranks)
        price = plan.price_per_gpu_hour
        row = ScaleRow(
            scale=scale,
            fits=scale in fitting,
            needed_gb=scale.needed_bytes / GB,
            tokens_per_s=recipe.batch.global_batch_tokens / scale.step_s,
            efficiency=efficiency,
            hours=hours,
            gpu_hours=gpu_hours,
            price=gpu_hours * price if price else None,
        )
        rows.append(row)
    return rows


def batch_that_divides(recipe: Recipe, ranks: int) -> int:
    """The next larger batch, in tokens, that divides over so many ranks."""
    # A step consists of whole windows.
    windows = math.ceil(recipe.global_batch_size / ranks) * ranks
    return windows * recipe.model.seq_len


def mfu_of(plan: Plan, row: ScaleRow) -> float | None:
    """Model-FLOPs utilisation of a run; None on a CPU, whose peak nobody knows."""
    if plan.device is None:
        return None
    flops = row.tokens_per_s * flops_per_token(plan.recipe.model)
    return flops / (row.scale.ranks * plan.device.peak_flops)


def data_of(plan: Plan) -> tuple[float, float | None]:
    """GB of training tokens, and how often they are seen; None: no token comes twice."""
    trained = plan.recipe.train_tokens
    if not plan.data_tokens:
        return TOKEN_BYTES * trained / GB, None
    return TOKEN_BYTES * plan.data_tokens / GB, trained / plan.data_tokens


def held_gb(sizes: Sizes) -> dict[str, float]:
    """What a rank holds, by name."""
    held = held_bytes(sizes)
    held["gradient partition"] = partition_bytes(sizes)
    held["buckets"] = sizes.buckets
    held["loss head"] = loss_head_bytes(sizes)
    return {name: size / GB for name, size in held.items()}


def plan_page(plan: Plan) -> str:
    """The whole page."""
    recipe = plan.recipe
    sizes = plan.sizes
    links = plan.speed.links
    flops = flops_per_token(recipe.model)
    data_gb, times_seen = data_of(plan)
    rows = scale_rows(plan)
    own = next((row for row in rows if row.scale.ranks == sizes.ranks), None)
    uneven = list(plan.speed.uneven)
    return render(
        "plan.txt.jinja",
        plan=plan,
        recipe=recipe,
        peak_tflops=plan.device.peak_flops / 1e12 if plan.device else None,
        parameters=sizes.parameters,
        in_input=count_parameters(recipe.model)["input_embedding"],
        gflops_per_token=flops / 1e9,
        formula=FORMULA,
        flops_in_all=flops * recipe.train_tokens,
        checkpoint_gb=CHECKPOINT_BYTES * sizes.parameters / GB,
        data_gb=data_gb,
        times_seen=times_seen,
        bits=8 * sizes.element,
        held_gb=held_gb(sizes),
        modes=[mode_row(plan, mode) for mode in MODES],
        rows=rows,
        own=own,
        mfu=mfu_of(plan, own) if own else None,
        in_node_gb=links.in_node / GB,
        beyond_gb=links.beyond / GB,
        available_gb=plan.available_bytes / GB,
        first_uneven=uneven[0] if uneven else None,
        batch_that_divides=batch_that_divides(recipe, uneven[-1]) if uneven else None,
    )

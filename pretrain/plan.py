"""What a run needs and costs, before it starts: memory, time, price, and how it scales. Nothing is
built.

    python -m pretrain.plan --recipe R --device h200 --gpus 8 --nodes 4 [--price-per-gpu-hour X] [--calibrate]
    python -m pretrain.plan --recipe R --device NAME --peak-tflops 312 --memory-gb 64 --interconnect nvlink3,hdr

A step of n ranks, each with A micro-batches:

    compute       tokens/n x FLOPs a token / (MFU x peak FLOP/s), FLOPs as pretrain/costs/flops.py counts them; with
                  full checkpointing the blocks' forward pass once more; or what --calibrate measured
    update        46 bytes of memory traffic for each of the P/n parameters that a rank owns, over its bandwidth
    communicate   A x (n-1)/n x 2 c P + (n-1)/n x e P bytes over the interconnect: DeepSpeed 0.19's ZeRO-2 reduces the
                  gradients, c bytes each, in every micro-step (stage 1: once), by an all-reduce (2 c P), or
                  with use_multi_rank_bucket_allreduce off to their owner alone (c P); then it gathers the
                  parameters, e bytes each. With overlap_comm reducing hides behind the backward pass, two thirds of
                  compute; without, as shipped, DeepSpeed reduces on the stream that computes, and nothing overlaps

The interconnect is what one GPU sends a second within its node, and what its network card sends.
Between nodes a ring uses every card of a node for a part of the data, so a rank gets the lesser of
its link and of all cards of its node (NVIDIA/nccl#812 has 192 GB/s measured over 8 cards of 25).
Left out are latency and stragglers, which weigh more the more ranks there are, and validation and
saves. Nodes that are not given are assumed to hold 8 GPUs.
"""

import math
import os
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.commands import CommandParser, exit_code
from data_prep.errors import UserError, nearest
from data_prep.shards import ShardReader
from pretrain.config.engine_config import load_engine_config, merge_config
from pretrain.config.recipe import Recipe, load_recipe
from pretrain.costs import memory
from pretrain.costs.flops import (
    DEVICES,
    FORMULA,
    LINKS,
    Costs,
    Device,
    count_parameters,
    find_device,
    flops_per_token,
)
from pretrain.model.token_codes import about_one_input
from pretrain.view.templates import render

# peers publish 0.38 to 0.57 for models of this size; below all of them, since nothing is measured
ASSUMED_MFU = 0.35
UPDATE_BYTES = 46  # norm 4, clipping 8, AdamW 16 read and 12 written, low-precision copy 6
REACHED = 0.8  # of a link, by collectives
ASSUMED_NODE = 8
SLOWEST_LINK = "pcie4"
SCALES = tuple(2**i for i in range(11))


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
    smaller = memory.with_micro_batch(recipe, size, recipe.activation_checkpointing.mode)
    return Scale(
        ranks=ranks, micro_batch_size=size, accumulation=own_windows // size,
        needed_bytes=memory.needed_bytes(smaller, config, ranks, sizes.device_type),
        step_s=step_seconds(recipe, config, costs, ranks, bytes_per_s, own_windows // size),
    )  # fmt: skip


def describe_mode(sizes: memory.Sizes, available: float, mode: str) -> dict[str, Any]:
    """What a rank needs in a checkpointing mode, and the largest micro-batch that fits."""
    recipe, run = sizes.recipe, (sizes.engine_config, sizes.ranks, sizes.device_type)
    other = memory.with_micro_batch(recipe, recipe.batch.micro_batch_size, mode)
    kept = memory.activation_bytes(memory.Sizes(other, *run), recipe.model.num_layers)
    largest = memory.largest_micro_batch(recipe, *run, available, mode)
    return {
        "mode": mode,
        "activations": kept,
        "needed": memory.needed_bytes(other, *run),
        "largest": largest,
    }


def build_parser() -> CommandParser:
    """The command line; what it doesn't know must be a dotted recipe key."""
    about = "What a run needs and costs, before it starts."
    more = f"FLOPs a token: {FORMULA}. Any recipe key can be set with --dotted.key=value."
    parser = CommandParser(prog="python -m pretrain.plan", description=about, epilog=more)
    parser.add_argument(
        "--recipe", required=True, metavar="NAME|FILE", help="a shipped recipe or a YAML file"
    )
    parser.add_argument(
        "--device", required=True, help="a GPU such as h200, or cpu, which needs --calibrate"
    )
    parser.add_argument(
        "--peak-tflops", type=float, metavar="X", help="its dense bf16 peak, if it is not known"
    )
    parser.add_argument(
        "--memory-gb", type=float, metavar="Y", help="its memory in 10^9 bytes, if it is not known"
    )
    parser.add_argument("--gpus", type=int, default=1, help="of each node (default 1)")
    parser.add_argument("--nodes", type=int, default=1, help="default 1")
    parser.add_argument("--price-per-gpu-hour", type=float, metavar="X", help="in any currency")
    parser.add_argument(
        "--interconnect", help="a GPU's link,network: names or GB/s (default: its usual link,ndr)"
    )
    computing = parser.add_mutually_exclusive_group()
    computing.add_argument(
        "--mfu", type=float, help=f"utilisation, of the bf16 peak (default {ASSUMED_MFU} in bf16)"
    )
    computing.add_argument(
        "--calibrate", action="store_true", help="measure this machine's device for half a minute"
    )
    parser.add_argument("--data-dir", type=Path, help="data set made by data_prep.build_shards")
    parser.add_argument(
        "--deepspeed-config", metavar="NAME|FILE", help="DeepSpeed JSON (default: the recipe's)"
    )
    return parser


def device_of(flags: Namespace) -> Device | None:
    """The device of that name, with the figures that were given in the place of those known; None:
    the CPU.

    Raises UserError for one that is neither known nor given.
    """
    name, peak_tflops, memory_gb = flags.device, flags.peak_tflops, flags.memory_gb
    known = find_device(name)
    if name == "cpu":
        if peak_tflops or memory_gb:
            raise UserError(
                "--device cpu: --peak-tflops and --memory-gb are for GPUs; add --calibrate to "
                "measure it"
            )
        if not flags.calibrate:
            raise UserError("--device cpu: its peak is not known; add --calibrate to measure it")
        return None
    if known is None and not (peak_tflops and memory_gb):
        words = set(re.findall(r"[a-z0-9]+", name.lower()))
        alike = [device.name for device in DEVICES if words & set(device.name.split())]
        suggestion = nearest(name.lower(), alike or [device.name for device in DEVICES])
        raise UserError(
            f"--device {name}: not known; {suggestion} (or give --peak-tflops and --memory-gb)"
        )
    given = {}
    if peak_tflops:
        given["peak_flops"] = peak_tflops * 1e12
    if memory_gb:
        given["memory_bytes"] = memory_gb * 1e9
    # Of a device that nobody knows, memory bandwidth and link are not known either: the update's
    # traffic is left out, and the slowest of the usual links is taken unless --interconnect says
    # more.
    unknown = Device(
        name=name, peak_flops=0.0, memory_bytes=0.0, bytes_per_s=math.inf, link=SLOWEST_LINK
    )
    return replace(known or unknown, **given)


def check_flags(flags: Namespace) -> None:
    """Raise UserError for a figure that cannot be."""
    limits = {"gpus": 1_000_000, "nodes": 1_000_000, "mfu": 1, "price_per_gpu_hour": 1_000_000}
    for flag, most in {**limits, "peak_tflops": 1_000_000, "memory_gb": 1_000_000}.items():
        value = getattr(flags, flag)
        if value is not None and not 0 < value <= most:
            raise UserError(
                f"--{flag.replace('_', '-')} {value}: expected a number above 0, at most {most:,}"
            )


def costs_of(
    sizes: memory.Sizes, flags: Namespace, device: Device | None
) -> tuple[Costs | None, str]:
    """Measured here, or from the device's peak figures and an MFU that nobody has measured; and
    which, or why not.
    """
    low_precision, recipe, mfu = sizes.element == 2, sizes.recipe, flags.mfu or ASSUMED_MFU
    if device and sizes.offloads:
        return (
            None,
            "host and bus decide how fast an offloaded optimizer is; time some steps of the run",
        )
    if flags.calibrate or device is None:
        from pretrain.engine.calibrate import calibrate

        return calibrate(
            recipe, device, low_precision=low_precision, ranks=flags.gpus
        ), "computing measured here"
    if not low_precision and flags.mfu is None:
        return (
            None,
            "the peak is bf16's and this run is fp32; add --calibrate, or --mfu as a part of that "
            "peak",
        )
    flops, head = (
        flops_per_token(recipe.model),
        6.0 * recipe.model.vocab_size * recipe.model.d_model,
    )
    if recipe.activation_checkpointing.mode == "full":
        flops += (flops - head) / 3 / recipe.activation_checkpointing.every_n_layers
    window, update = (
        recipe.model.seq_len * flops / (mfu * device.peak_flops),
        UPDATE_BYTES / device.bytes_per_s,
    )
    said = f"computing at {mfu:.0%} MFU, an assumption: --calibrate measures it, --mfu sets another"
    if device.bytes_per_s == math.inf:
        said += f";\n{' ' * 13}the memory bandwidth of {device.name} is not known: the update's traffic is left out"
    return Costs(window=window, reduced_parameter=0.0, updated_parameter=update), said


def speeds(sizes: memory.Sizes, flags: Namespace, device: Device | None) -> dict[str, Any]:
    """The run on its own and other numbers of ranks, and what its speed rests on, or why it is
    not known.
    """
    in_node, network = parse_interconnect(
        flags.interconnect or f"{device.link if device else 'loopback'},ndr"
    )
    costs, origin = costs_of(sizes, flags, device)
    node = flags.gpus if flags.nodes > 1 or device is None else max(flags.gpus, ASSUMED_NODE)
    beyond, counts = min(in_node, node * network), sorted({*SCALES, sizes.ranks})
    uneven = [ranks for ranks in counts if sizes.recipe.global_batch_size % ranks]
    links = {ranks: in_node if ranks <= node else beyond for ranks in counts if ranks not in uneven}
    scales = (
        {ranks: scale_to(sizes, costs, ranks, link) for ranks, link in links.items()}
        if costs
        else {}
    )
    return {
        "origin": origin,
        "in_node": in_node,
        "beyond": beyond,
        "node": node,
        "scales": scales,
        "uneven": uneven,
    }


def plan(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    flags, overrides = build_parser().parse_known_args(arguments)
    check_flags(flags)
    device = device_of(flags)
    recipe, ranks = load_recipe(flags.recipe, overrides, flags.data_dir), flags.gpus * flags.nodes
    engine_config = merge_config(
        recipe, load_engine_config(flags.deepspeed_config or recipe.engine), ranks
    )
    sizes = memory.Sizes(recipe, engine_config, ranks, "cuda" if device else "cpu")
    available = (
        device.memory_bytes
        if device
        else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / flags.gpus
    )
    memory.check_it_fits(recipe, engine_config, ranks, available, sizes.device_type)
    held = memory.held_bytes(sizes) | {
        "gradient partition": memory.partition_bytes(sizes),
        "buckets": sizes.buckets,
    }
    held["loss head"] = memory.loss_head_bytes(sizes)
    manifest = ShardReader(flags.data_dir).manifest if flags.data_dir else None
    print(
        render(
            "plan.txt.jinja",
            data_tokens=manifest.tokens("train") if manifest else None,
            one_input=about_one_input(recipe.model, manifest),
            **speeds(sizes, flags, device),
            flags=flags,
            device=device,
            recipe=recipe,
            sizes=sizes,
            parameters=count_parameters(recipe.model),
            flops=flops_per_token(recipe.model),
            formula=FORMULA,
            held=held,
            modes=[describe_mode(sizes, available, mode) for mode in memory.MODES],
            available=available,
        )
    )


if __name__ == "__main__":
    sys.exit(exit_code(plan))

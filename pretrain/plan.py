"""What a run needs and costs, before it starts: memory, time, price, and how it scales. Nothing is built.

    python -m pretrain.plan --recipe R --device h200 --gpus 8 --nodes 4 [--price-per-gpu-hour X] [--calibrate]

A step of n ranks, each with A micro-batches:

    compute       tokens/n x FLOPs a token / (MFU x peak FLOP/s), FLOPs as pretrain/flops.py counts them; with full
                  checkpointing the blocks' forward pass once more; or what --calibrate measured
    update        46 bytes of memory traffic for each of the P/n parameters that a rank owns, over its bandwidth
    communicate   A x (n-1)/n x 2 c P + (n-1)/n x e P bytes over the interconnect: DeepSpeed 0.19's ZeRO-2 reduces the
                  gradients, c bytes each, in every micro-step, by an all-reduce (2 c P), or with
                  use_multi_rank_bucket_allreduce off to their owner alone (c P); then it gathers the parameters, e
                  bytes each. With overlap_comm reducing hides behind the backward pass, two thirds of compute

The interconnect is what one GPU sends a second: within a node while all ranks are on one, between nodes beyond that.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import CommandParser, UserError, exit_code
from data_prep.shards import ShardReader
from pretrain import memory
from pretrain.config import Recipe, load_recipe, nearest
from pretrain.engine_config import load_engine_config, merge_config
from pretrain.flops import DEVICES, FORMULA, Costs, Device, count_parameters, find_device, flops_per_token

ASSUMED_MFU = 0.35  # peers publish 0.38 to 0.57 for models of this size; below all of them, since nothing is measured
UPDATE_BYTES = 46  # norm 4, clipping 8, AdamW 16 read and 12 written, low-precision copy 6
# GB/s that one GPU sends, of the data sheets; four fifths of it is what collectives are taken to reach.
LINKS = {
    "nvlink5": 900.0, "nvlink4": 450.0, "nvlink3": 300.0, "infinity-fabric": 448.0, "pcie5": 64.0, "pcie4": 32.0,
    "xdr": 100.0, "ndr": 50.0, "hdr": 25.0, "100gbe": 12.5, "25gbe": 3.125,
}  # fmt: skip
REACHED = 0.8
SCALES = tuple(2**i for i in range(11))


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A step on some number of ranks."""

    ranks: int
    micro_batch_size: int
    accumulation: int
    step_s: float
    tokens_per_s: float
    hours: float


def parse_interconnect(text: str) -> tuple[float, float]:
    """Bytes/s that a GPU sends within a node and between nodes: `nvlink4,ndr` or GB/s such as `300,25`."""
    rates = []
    for part in text.split(","):
        try:
            rate = float(LINKS.get(part.lower(), part))
        except ValueError:
            raise UserError(f"--interconnect {part}: {nearest(part, list(LINKS))}, or give GB/s of one GPU") from None
        if not 0 < rate < float("inf"):
            raise UserError(f"--interconnect {part}: expected GB/s above 0")
        rates.append(REACHED * rate * 1e9)
    if len(rates) > 2:
        raise UserError(f"--interconnect {text}: expected one figure within a node and one between nodes")
    return rates[0], rates[-1]


def step_seconds(
    recipe: Recipe, engine_config: dict[str, Any], costs: Costs, ranks: int, bytes_per_s: float, accumulation: int
) -> float:
    """One step, by the formula of the module."""
    zero, parameters = engine_config.get("zero_optimization", {}), sum(count_parameters(recipe.model).values())
    low_precision = engine_config.get("bf16", {}).get("enabled")
    sent = 4 if engine_config.get("communication_data_type") == "fp32" or not low_precision else 2
    ways = 2 if zero.get("use_multi_rank_bucket_allreduce", True) else 1
    compute = recipe.global_batch_size / ranks * costs.window
    reduce = accumulation * ways * sent * parameters * (ranks - 1) / ranks / bytes_per_s
    gather = (2 if low_precision else 4) * parameters * (ranks - 1) / ranks / bytes_per_s
    local = accumulation * parameters * costs.reduced_parameter + parameters / ranks * costs.updated_parameter
    return compute + local + gather + max(0.0, reduce - (2 / 3 * compute if zero.get("overlap_comm") else 0))


def scale_to(
    recipe: Recipe, engine_config: dict[str, Any], costs: Costs, ranks: int, bytes_per_s: float
) -> Scale | None:
    """The run on that many ranks, with the recipe's micro-batch or the next smaller one; None: it doesn't divide."""
    of_rank, uneven = divmod(recipe.global_batch_size, ranks)
    if uneven or not of_rank:
        return None
    size = max(n for n in range(1, recipe.batch.micro_batch_size + 1) if of_rank % n == 0)
    step_s = step_seconds(recipe, engine_config, costs, ranks, bytes_per_s, of_rank // size)
    return Scale(
        ranks=ranks,
        micro_batch_size=size,
        accumulation=of_rank // size,
        step_s=step_s,
        tokens_per_s=recipe.batch.global_batch_tokens / step_s,
        hours=recipe.total_steps * step_s / 3600,
    )


def memory_table(recipe: Recipe, engine_config: dict[str, Any], ranks: int, device_type: str, available: float) -> str:
    """Bytes of a rank, and for each checkpointing mode what it needs and what fits."""
    sizes = memory.Sizes(recipe, engine_config, ranks, device_type)
    parts = memory.held_bytes(sizes) | {
        "gradient partition": memory.partition_bytes(sizes),
        "buckets": sizes.buckets,
        "loss head": memory.loss_head_bytes(sizes),
    }
    lines = [f"memory of a rank of {ranks}, GB, {8 * sizes.element}-bit parameters (see pretrain/memory.py)"]
    lines += [f"  {name:<24}{size / 1e9:>10.2f}" for name, size in parts.items()]
    lines += [f"  {'checkpointing':<14}{'activations':>14}{'in all':>10}{'largest micro-batch that fits':>32}"]
    for mode in memory.MODES:
        other = memory.with_micro_batch(recipe, recipe.batch.micro_batch_size, mode)
        kept = memory.activation_bytes(memory.Sizes(other, engine_config, ranks, device_type), recipe.model.num_layers)
        needed = memory.needed_bytes(other, engine_config, ranks, device_type)
        fits = memory.largest_micro_batch(recipe, engine_config, ranks, device_type, available, mode)
        lines += [f"  {mode:<14}{kept / 1e9:>14.2f}{needed / 1e9:>10.2f}{fits or 'none':>32}"]
    return "\n".join(lines)


def scaling_table(scales: dict[int, Scale | None], price: float | None) -> str:
    """One line for each number of GPUs; efficiency is tokens/s a GPU beside one GPU's."""
    lines = ["  GPUs  micro-batch       tokens/s  efficiency      hours  GPU-hours" + ("      price" if price else "")]
    one = next(scale for scale in scales.values() if scale)
    for ranks, scale in scales.items():
        if scale is None:
            lines += [f"{ranks:>6}  the step's windows do not divide over so many"]
            continue
        efficiency = scale.tokens_per_s / ranks / (one.tokens_per_s / one.ranks)
        size, hours = f"{scale.accumulation} x {scale.micro_batch_size}", scale.hours * ranks
        line = f"{ranks:>6}  {size:>11}{scale.tokens_per_s:>15,.0f}{efficiency:>12.0%}{scale.hours:>11,.1f}"
        lines += [f"{line}{hours:>11,.0f}" + (f"{hours * price:>11,.0f}" if price else "")]
    return "\n".join(lines)


def describe_data(data_dir: Path | None, recipe: Recipe) -> str:
    """Bytes on disk: of the data set there is, or of one with a token for every one trained on."""
    if data_dir is None:
        return f"data set     {2 * recipe.train_tokens / 1e9:,.2f} GB where no token comes twice (2 bytes a token)"
    tokens = ShardReader(data_dir).manifest.tokens("train")
    return f"data set     {2 * tokens / 1e9:,.2f} GB of training tokens, seen {recipe.train_tokens / tokens:.2f} times"


def build_parser() -> CommandParser:
    """The command line; what it doesn't know must be a dotted recipe key."""
    parser = CommandParser(
        prog="python -m pretrain.plan",
        description="What a run needs and costs, before it starts.",
        epilog=f"FLOPs a token: {FORMULA}. Any recipe key can be set with --dotted.key=value.",
    )
    parser.add_argument("--recipe", required=True, metavar="NAME|FILE", help="a shipped recipe or a YAML file")
    parser.add_argument("--device", required=True, help="a GPU such as h200, or cpu, which needs --calibrate")
    parser.add_argument("--gpus", type=int, default=1, help="of each node (default 1)")
    parser.add_argument("--nodes", type=int, default=1, help="default 1")
    parser.add_argument("--price-per-gpu-hour", type=float, metavar="X", help="in any currency")
    parser.add_argument("--interconnect", default="nvlink4,ndr", help="within a node, between nodes: names or GB/s")
    parser.add_argument("--mfu", type=float, default=ASSUMED_MFU, help=f"assumed utilisation (default {ASSUMED_MFU})")
    parser.add_argument("--calibrate", action="store_true", help="measure this machine's device for half a minute")
    parser.add_argument("--data-dir", type=Path, help="data set made by data_prep.build_shards")
    parser.add_argument("--deepspeed-config", metavar="NAME|FILE", help="DeepSpeed JSON (default: the recipe's)")
    return parser


def known_device(name: str, *, calibrate: bool) -> Device | None:
    """The device of that name; None: the CPU, which only a measurement can say something about. Raises UserError."""
    device = find_device(name)
    if device is None and name == "cpu" and not calibrate:
        raise UserError("--device cpu: its peak is not known; add --calibrate to measure it")
    if device is None and name != "cpu":
        raise UserError(f"--device {name}: not known; {nearest(name.lower(), [known.name for known in DEVICES])}")
    return device


def check_flags(flags: Namespace) -> None:
    """Raise UserError for a figure that cannot be."""
    for flag in ("gpus", "nodes"):
        if getattr(flags, flag) < 1:
            raise UserError(f"--{flag} {getattr(flags, flag)}: expected 1 or more")
    if not 0 < flags.mfu <= 1:
        raise UserError(f"--mfu {flags.mfu}: expected a fraction above 0, at most 1")
    if flags.price_per_gpu_hour is not None and not 0 < flags.price_per_gpu_hour < float("inf"):
        raise UserError(f"--price-per-gpu-hour {flags.price_per_gpu_hour}: expected a price above 0")


def summary(recipe: Recipe, flags: Namespace, device: Device | None) -> str:
    """The model, its FLOPs, and what lies on disk."""
    counts, flops = count_parameters(recipe.model), flops_per_token(recipe.model)
    total = sum(counts.values())
    peak = f", peak {device.peak_flops / 1e12:,.0f} TFLOP/s in bf16" if device else ""
    return "\n".join(
        [
            f"{flags.recipe} on {flags.nodes} x {flags.gpus} {device.name if device else 'cpu'}{peak}",
            f"parameters   {total:,} trained, {counts['input_embedding']:,} of them in the input",
            f"FLOPs        {flops / 1e9:.3f} G a token = {FORMULA}; {flops * recipe.train_tokens:.3g} in all",
            f"steps        {recipe.total_steps:,} of {recipe.batch.global_batch_tokens:,} tokens",
            f"checkpoint   {12 * total / 1e9:,.2f} GB each (12 bytes a parameter)",
            describe_data(flags.data_dir, recipe),
        ]
    )


def available_bytes(device: Device | None, gpus: int) -> float:
    """A rank's memory: its device's, or on CPUs its part of the machine's."""
    return device.memory_bytes if device else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / gpus


def costs_of(recipe: Recipe, flags: Namespace, device: Device | None, *, low_precision: bool) -> tuple[Costs, str]:
    """Measured here, or from the device's peak figures and an MFU that nobody has measured; and which."""
    if flags.calibrate or device is None:
        from pretrain.calibrate import calibrate  # torch takes seconds to import

        return calibrate(recipe, device, low_precision=low_precision), "computing measured on this machine"
    flops, model = flops_per_token(recipe.model), recipe.model
    if recipe.activation_checkpointing.mode == "full":
        blocks = flops - 6.0 * model.vocab_size * model.d_model
        flops += blocks / 3 / recipe.activation_checkpointing.every_n_layers
    window, update = model.seq_len * flops / (flags.mfu * device.peak_flops), UPDATE_BYTES / device.bytes_per_s
    said = f"computing at {flags.mfu:.0%} MFU, an assumption: --calibrate measures it, --mfu sets another"
    return Costs(window=window, reduced_parameter=0.0, updated_parameter=update), said


def speed_lines(recipe: Recipe, own: Scale, device: Device | None, price: float | None) -> str:
    """The planned run's speed, time and price."""
    gpu_hours = own.hours * own.ranks
    mfu = own.tokens_per_s * flops_per_token(recipe.model) / (own.ranks * device.peak_flops) if device else None
    figures = [f"{own.tokens_per_s:,.0f} tokens/s", f"{own.step_s:.3f} s a step"]
    figures += [f"MFU {mfu:.1%}"] if mfu else []
    figures += [f"{own.hours:,.1f} hours", f"{gpu_hours:,.0f} GPU-hours"]
    figures += [f"price {gpu_hours * price:,.0f}"] if price else []
    return f"speed        {', '.join(figures)}"


def plan(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    flags, overrides = build_parser().parse_known_args(arguments)
    check_flags(flags)
    device, links = known_device(flags.device, calibrate=flags.calibrate), parse_interconnect(flags.interconnect)
    recipe, ranks = load_recipe(flags.recipe, overrides), flags.gpus * flags.nodes
    engine_config = merge_config(recipe, load_engine_config(flags.deepspeed_config or recipe.engine), ranks)
    device_type, available = "cuda" if device else "cpu", available_bytes(device, flags.gpus)
    memory.check_it_fits(recipe, engine_config, ranks, available, device_type)
    print(summary(recipe, flags, device))
    print(f"\n{memory_table(recipe, engine_config, ranks, device_type, available)}\n", flush=True)
    low_precision = bool(engine_config.get("bf16", {}).get("enabled"))
    costs, origin = costs_of(recipe, flags, device, low_precision=low_precision)
    scales = {
        count: scale_to(recipe, engine_config, costs, count, links[0] if count <= flags.gpus else links[1])
        for count in sorted({*SCALES, ranks})
    }
    own = scales[ranks]
    assert own is not None, "merge_config has checked that the batch divides"
    print(speed_lines(recipe, own, device, flags.price_per_gpu_hour))
    print(f"             {origin};")
    print(f"             a GPU sends {links[0] / 1e9:.4g} GB/s in a node, {links[1] / 1e9:.4g} beyond: assumed")
    print(f"\n{scaling_table(scales, flags.price_per_gpu_hour)}")


if __name__ == "__main__":
    sys.exit(exit_code(plan))

"""What a run needs and costs, before it starts: memory, time, price, and how it scales. Nothing is built.

    python -m pretrain.plan --recipe R --device h200 --gpus 8 --nodes 4 [--price-per-gpu-hour X] [--calibrate]

A step of n ranks, each with A micro-batches:

    compute       tokens/n x FLOPs a token / (MFU x peak FLOP/s), FLOPs as pretrain/flops.py counts them; with full
                  checkpointing the blocks' forward pass once more; or what --calibrate measured
    update        46 bytes of memory traffic for each of the P/n parameters that a rank owns, over its bandwidth
    communicate   A x (n-1)/n x 2 c P + (n-1)/n x e P bytes over the interconnect: DeepSpeed 0.19's ZeRO-2 reduces the
                  gradients, c bytes each, in every micro-step (stage 1: once), by an all-reduce (2 c P), or
                  with use_multi_rank_bucket_allreduce off to their owner alone (c P); then it gathers the
                  parameters, e bytes each. With overlap_comm reducing hides behind the backward pass, two thirds of
                  compute; without, as shipped, DeepSpeed reduces on the stream that computes, and nothing overlaps

The interconnect is what one GPU sends a second within its node, and what its network card sends. Between nodes a ring
uses every card of a node for a part of the data, so a rank gets the lesser of its link and of all cards of its node
(NVIDIA/nccl#812 has 192 GB/s measured over 8 cards of 25). Left out are latency and stragglers, which weigh more the
more ranks there are, and validation and saves. Nodes that are not given are assumed to hold 8 GPUs.
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
# GB/s in one direction, of the data sheets; four fifths of it is what collectives are taken to reach. Infinity Fabric
# by CDNA generation: 3 links of 50 that leave a die's package, 7 of 64, 7 of 76.8. Loopback as gloo had it on a CPU.
LINKS = {
    "nvlink5": 900.0, "nvlink4": 450.0, "nvlink3": 300.0, "pcie5": 64.0, "pcie4": 32.0, "loopback": 2.1,
    "infinity-fabric4": 537.6, "infinity-fabric3": 448.0, "infinity-fabric2": 150.0,
    "xdr": 100.0, "ndr": 50.0, "hdr": 25.0, "100gbe": 12.5, "25gbe": 3.125,
}  # fmt: skip
REACHED = 0.8
ASSUMED_NODE = 8
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
    """Bytes/s of a GPU's link within its node, and of its network card: `nvlink4,ndr` or GB/s such as `300,25`."""
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
    ways, times = 1 + zero.get("use_multi_rank_bucket_allreduce", True), accumulation if zero.get("stage") == 2 else 1
    compute = recipe.global_batch_size / ranks * costs.window
    reduce = times * ways * sent * parameters * (ranks - 1) / ranks / bytes_per_s
    gather = (2 if low_precision else 4) * parameters * (ranks - 1) / ranks / bytes_per_s
    local = accumulation * parameters * costs.reduced_parameter + parameters / ranks * costs.updated_parameter
    return compute + local + gather + max(0.0, reduce - (2 / 3 * compute if zero.get("overlap_comm") else 0))


def scale_to(sizes: memory.Sizes, costs: Costs, ranks: int, bytes_per_s: float) -> Scale | None:
    """The run on that many ranks, with the recipe's micro-batch or the next smaller one; None: it doesn't divide."""
    recipe, config = sizes.recipe, sizes.engine_config
    fitting = [n for n in range(1, recipe.batch.micro_batch_size + 1) if recipe.global_batch_size % (ranks * n) == 0]
    if not fitting:
        return None
    size, accumulation = fitting[-1], recipe.global_batch_size // (ranks * fitting[-1])
    smaller = memory.with_micro_batch(recipe, size, recipe.activation_checkpointing.mode)
    needed = memory.needed_bytes(smaller, config, ranks, sizes.device_type)
    step_s = step_seconds(recipe, config, costs, ranks, bytes_per_s, accumulation)
    return Scale(ranks=ranks, micro_batch_size=size, accumulation=accumulation, needed_bytes=needed, step_s=step_s)


def memory_table(sizes: memory.Sizes, available: float) -> str:
    """Bytes of a rank, and for each checkpointing mode what it needs and what fits."""
    recipe, run = sizes.recipe, (sizes.engine_config, sizes.ranks, sizes.device_type)
    parts = memory.held_bytes(sizes) | {
        "gradient partition": memory.partition_bytes(sizes),
        "buckets": sizes.buckets,
        "loss head": memory.loss_head_bytes(sizes),
    }
    lines = [f"memory of a rank of {sizes.ranks}, GB, ZeRO-2, {8 * sizes.element}-bit parameters (pretrain/memory.py)"]
    lines += [f"  {name:<24}{size / 1e9:>10.2f}" for name, size in parts.items()]
    lines += [f"  {'checkpointing':<14}{'activations':>14}{'in all':>10}{'largest micro-batch that fits':>32}"]
    for mode in memory.MODES:
        other = memory.with_micro_batch(recipe, recipe.batch.micro_batch_size, mode)
        kept = memory.activation_bytes(memory.Sizes(other, *run), recipe.model.num_layers)
        fits = memory.largest_micro_batch(recipe, *run, available, mode)
        needed = memory.needed_bytes(other, *run)
        lines += [f"  {mode:<14}{kept / 1e9:>14.2f}{needed / 1e9:>10.2f}{fits or 'none':>32}"]
    return "\n".join(lines)


def scaling_table(recipe: Recipe, scales: dict[int, Scale | None], available: float, price: float | None) -> str:
    """One line for each number of GPUs, one of which fits; efficiency is tokens/s a GPU beside the first that does."""
    lines = ["  GPUs  micro-batch       tokens/s  efficiency      hours  GPU-hours" + ("      price" if price else "")]
    first = next(scale for scale in scales.values() if scale and scale.needed_bytes <= available)
    for ranks, scale in scales.items():
        if scale and scale.needed_bytes > available:
            lines += [f"{ranks:>6}  does not fit: needs {scale.needed_bytes / 1e9:.1f} GB of {available / 1e9:.1f}"]
        elif scale:
            speed, hours = recipe.batch.global_batch_tokens / scale.step_s, recipe.total_steps * scale.step_s / 3600
            size, efficiency = f"{scale.accumulation} x {scale.micro_batch_size}", first.step_s / scale.step_s
            line = f"{ranks:>6}  {size:>11}{speed:>15,.0f}{efficiency * first.ranks / ranks:>12.0%}{hours:>11,.1f}"
            lines += [f"{line}{hours * ranks:>11,.0f}" + (f"{hours * ranks * price:>11,.0f}" if price else "")]
    if uneven := [ranks for ranks, scale in scales.items() if scale is None]:
        tokens = -(-recipe.global_batch_size // uneven[-1]) * uneven[-1] * recipe.model.seq_len
        lines += [f"{uneven[0]:>5}+  a step's {recipe.global_batch_size} windows do not divide over so many; "]
        lines[-1] += f"with batch.global_batch_tokens {tokens} they would"
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
    parser.add_argument("--interconnect", help="a GPU's link,network: names or GB/s (default: its usual link,ndr)")
    computing = parser.add_mutually_exclusive_group()
    computing.add_argument("--mfu", type=float, help=f"utilisation, of the bf16 peak (default {ASSUMED_MFU} in bf16)")
    computing.add_argument("--calibrate", action="store_true", help="measure this machine's device for half a minute")
    parser.add_argument("--data-dir", type=Path, help="data set made by data_prep.build_shards")
    parser.add_argument("--deepspeed-config", metavar="NAME|FILE", help="DeepSpeed JSON (default: the recipe's)")
    return parser


def known_device(name: str, *, calibrate: bool) -> Device | None:
    """The device of that name, which is here if it is to be measured; None: the CPU. Raises UserError."""
    device = find_device(name)
    if device is None and name == "cpu" and not calibrate:
        raise UserError("--device cpu: its peak is not known; add --calibrate to measure it")
    if device is None and name != "cpu":
        raise UserError(f"--device {name}: not known; {nearest(name.lower(), [known.name for known in DEVICES])}")
    if calibrate:
        from pretrain.calibrate import check_device  # torch takes seconds to import

        check_device(device)
    return device


def check_flags(flags: Namespace) -> None:
    """Raise UserError for a figure that cannot be."""
    for flag in ("gpus", "nodes"):
        if getattr(flags, flag) < 1:
            raise UserError(f"--{flag} {getattr(flags, flag)}: expected 1 or more")
    if flags.mfu is not None and not 0 < flags.mfu <= 1:
        raise UserError(f"--mfu {flags.mfu}: expected a fraction above 0, at most 1")
    if flags.price_per_gpu_hour is not None and not 0 < flags.price_per_gpu_hour < float("inf"):
        raise UserError(f"--price-per-gpu-hour {flags.price_per_gpu_hour}: expected a price above 0")


def summary(recipe: Recipe, flags: Namespace, device: Device | None) -> str:
    """The model, its FLOPs, and what lies on disk."""
    counts, flops = count_parameters(recipe.model), flops_per_token(recipe.model)
    total = sum(counts.values())
    peak = f", peak {device.peak_flops / 1e12:,.0f} TFLOP/s in bf16" if device else ""
    return f"""{flags.recipe} on {flags.nodes} x {flags.gpus} {device.name if device else "cpu"}{peak}
parameters   {total:,} trained, {counts["input_embedding"]:,} of them in the input
FLOPs        {flops / 1e9:.3f} G a token = {FORMULA}; {flops * recipe.train_tokens:.3g} in all
steps        {recipe.total_steps:,} of {recipe.batch.global_batch_tokens:,} tokens
checkpoint   {12 * total / 1e9:,.2f} GB each (12 bytes a parameter)
{describe_data(flags.data_dir, recipe)}"""


def available_bytes(device: Device | None, gpus: int) -> float:
    """A rank's memory: its device's, or on CPUs its part of the machine's."""
    return device.memory_bytes if device else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / gpus


def costs_of(sizes: memory.Sizes, flags: Namespace, device: Device | None) -> tuple[Costs | None, str]:
    """Measured here, or from the device's peak figures and an MFU that nobody has measured; and which, or why not."""
    low_precision, recipe, mfu = sizes.element == 2, sizes.recipe, flags.mfu or ASSUMED_MFU
    if device and sizes.offloads:
        return None, "host and bus decide how fast an offloaded optimizer is; time some steps of the run"
    if flags.calibrate or device is None:
        from pretrain.calibrate import calibrate

        return calibrate(recipe, device, low_precision=low_precision, ranks=flags.gpus), "computing measured here"
    if not low_precision and flags.mfu is None:
        return None, "the peak is bf16's and this run is fp32; add --calibrate, or --mfu as a part of that peak"
    flops, head = flops_per_token(recipe.model), 6.0 * recipe.model.vocab_size * recipe.model.d_model
    if recipe.activation_checkpointing.mode == "full":
        flops += (flops - head) / 3 / recipe.activation_checkpointing.every_n_layers
    window, update = recipe.model.seq_len * flops / (mfu * device.peak_flops), UPDATE_BYTES / device.bytes_per_s
    said = f"computing at {mfu:.0%} MFU, an assumption: --calibrate measures it, --mfu sets another"
    return Costs(window=window, reduced_parameter=0.0, updated_parameter=update), said


def speed_line(recipe: Recipe, own: Scale, device: Device | None, price: float | None) -> str:
    """The planned run's speed, time and price."""
    speed, hours = recipe.batch.global_batch_tokens / own.step_s, recipe.total_steps * own.step_s / 3600
    figures = [f"{speed:,.0f} tokens/s", f"{own.step_s:.3f} s a step"]
    if device:
        figures += [f"MFU {speed * flops_per_token(recipe.model) / (own.ranks * device.peak_flops):.1%}"]
    figures += [f"{hours:,.1f} hours", f"{hours * own.ranks:,.0f} GPU-hours"]
    figures += [f"price {hours * own.ranks * price:,.0f}"] if price else []
    return f"speed        {', '.join(figures)}"


def speeds(
    sizes: memory.Sizes, flags: Namespace, device: Device | None, links: tuple[float, float], available: float
) -> str:
    """The planned run's speed, what it rests on, and that on other numbers of ranks; or why it is not known."""
    costs, origin = costs_of(sizes, flags, device)
    if costs is None:
        return f"speed        not estimated: {origin}"
    node = flags.gpus if flags.nodes > 1 or device is None else max(flags.gpus, ASSUMED_NODE)
    beyond, counts = min(links[0], node * links[1]), sorted({*SCALES, sizes.ranks})
    scales = {n: scale_to(sizes, costs, n, links[0] if n <= node else beyond) for n in counts}
    own = scales[sizes.ranks]
    assert own is not None, "merge_config has checked that the batch divides"
    return f"""{speed_line(sizes.recipe, own, device, flags.price_per_gpu_hour)}
             {origin};
             assumed: {links[0] / 1e9:.4g} GB/s a rank in a node of {node}, {beyond / 1e9:.4g} beyond (--interconnect);
             latency, which grows with the number of GPUs, is left out

{scaling_table(sizes.recipe, scales, available, flags.price_per_gpu_hour)}"""


def plan(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    flags, overrides = build_parser().parse_known_args(arguments)
    check_flags(flags)
    device = known_device(flags.device, calibrate=flags.calibrate)
    links = parse_interconnect(flags.interconnect or f"{device.link if device else 'loopback'},ndr")
    recipe, ranks = load_recipe(flags.recipe, overrides), flags.gpus * flags.nodes
    engine_config = merge_config(recipe, load_engine_config(flags.deepspeed_config or recipe.engine), ranks)
    sizes = memory.Sizes(recipe, engine_config, ranks, "cuda" if device else "cpu")
    available = available_bytes(device, flags.gpus)
    memory.check_it_fits(recipe, engine_config, ranks, available, sizes.device_type)
    print(summary(recipe, flags, device))
    print(f"\n{memory_table(sizes, available)}\n", flush=True)
    print(speeds(sizes, flags, device, links, available))


if __name__ == "__main__":
    sys.exit(exit_code(plan))

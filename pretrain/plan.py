"""What a run needs and costs, before it starts: memory, time, price, and how it scales.

    python -m pretrain.plan --recipe R --device h200 --gpus 8 --nodes 4 [--price-per-gpu-hour X]
    python -m pretrain.plan --recipe R --device h200 --calibrate
    python -m pretrain.plan --recipe R --device NAME --peak-tflops 312 --memory-gb 64
                            --interconnect nvlink3,hdr

Nothing is built. The formulas stand in pretrain/costs/step_time.py and pretrain/costs/memory.py.
Nodes that are not given are assumed to hold 8 GPUs.
"""

import math
import os
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_prep.commands import exit_code
from data_prep.errors import UserError, nearest
from data_prep.shards import ShardReader
from pretrain.config.deepspeed import load_engine_config, merge_config, monitor_objection
from pretrain.config.load import load_recipe
from pretrain.config.recipe_parser import RecipeParser
from pretrain.costs.devices import DEVICES, Device, find_device
from pretrain.costs.fit import check_it_fits
from pretrain.costs.flops import FORMULA
from pretrain.costs.memory import Sizes, sizes_of
from pretrain.costs.step_time import (
    ASSUMED_MFU,
    Costs,
    Links,
    assumed_costs,
    parse_interconnect,
    scale_to,
)
from pretrain.model.token_codes import about_one_input
from pretrain.view.plan_page import Plan, Speed, plan_page

ASSUMED_NODE = 8
SLOWEST_LINK = "pcie4"
SCALES = tuple(2**i for i in range(11))  # numbers of ranks that a plan shows
# What a flag's number may be at most; above 0 in any case.
LIMITS = {
    "gpus": 1_000_000,
    "nodes": 1_000_000,
    "mfu": 1,
    "price_per_gpu_hour": 1_000_000,
    "peak_tflops": 1_000_000,
    "memory_gb": 1_000_000,
}


def build_parser() -> RecipeParser:
    """The command line; what it doesn't know must be a dotted recipe key."""
    about = "What a run needs and costs, before it starts."
    more = f"FLOPs a token: {FORMULA}. Any recipe key can be set with --dotted.key=value."
    parser = RecipeParser(prog="python -m pretrain.plan", description=about, epilog=more)
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
    if flags.device == "cpu":
        if flags.peak_tflops or flags.memory_gb:
            raise UserError(
                "--device cpu: --peak-tflops and --memory-gb are for GPUs; add --calibrate to "
                "measure it"
            )
        if not flags.calibrate:
            raise UserError("--device cpu: its peak is not known; add --calibrate to measure it")
        return None
    given = {}
    if flags.peak_tflops:
        given["peak_flops"] = flags.peak_tflops * 1e12
    if flags.memory_gb:
        given["memory_bytes"] = flags.memory_gb * 1e9
    known = find_device(flags.device)
    if known is None and len(given) < 2:
        raise UserError(
            f"--device {flags.device}: not known; {suggest_device(flags.device)} (or give "
            "--peak-tflops and --memory-gb)"
        )
    # Of a device that nobody knows, memory bandwidth and link are not known either: the update's
    # traffic is left out, and the slowest of the usual links is taken unless --interconnect says
    # more.
    unknown = Device(
        name=flags.device,
        peak_flops=0.0,
        memory_bytes=0.0,
        bytes_per_s=math.inf,
        link=SLOWEST_LINK,
    )
    return replace(known or unknown, **given)


def suggest_device(name: str) -> str:
    """A suggestion for a name that no device has: one that shares a word with it, or any."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    alike = [device.name for device in DEVICES if words & set(device.name.split())]
    return nearest(name.lower(), alike or [device.name for device in DEVICES])


def check_flags(flags: Namespace) -> None:
    """Raise UserError for a figure that cannot be."""
    for flag, most in LIMITS.items():
        value = getattr(flags, flag)
        if value is not None and not 0 < value <= most:
            raise UserError(
                f"--{flag.replace('_', '-')} {value}: expected a number above 0, at most {most:,}"
            )


def costs_of(sizes: Sizes, flags: Namespace, device: Device | None) -> tuple[Costs | None, str]:
    """Measured here, or from the device's peak figures and an MFU that nobody has measured; and
    which, or why not.
    """
    if device is not None and sizes.offloads:
        return (
            None,
            "host and bus decide how fast an offloaded optimizer is; time some steps of the run",
        )
    if flags.calibrate or device is None:
        # Which imports torch, and that takes seconds.
        from pretrain.engine.calibrate import calibrate

        costs = calibrate(sizes.recipe, device, low_precision=sizes.is_bf16, ranks=flags.gpus)
        return costs, "computing measured here"
    if not sizes.is_bf16 and flags.mfu is None:
        return (
            None,
            "the peak is bf16's and this run is fp32; add --calibrate, or --mfu as a part of that "
            "peak",
        )
    mfu = flags.mfu or ASSUMED_MFU
    said = f"computing at {mfu:.0%} MFU, an assumption: --calibrate measures it, --mfu sets another"
    if device.bytes_per_s == math.inf:
        below = " " * 13  # the page's first column
        said += (
            f";\n{below}the memory bandwidth of {device.name} is not known: the update's traffic "
            "is left out"
        )
    return assumed_costs(sizes.recipe, device, mfu), said


def links_of(flags: Namespace, device: Device | None) -> Links:
    """What a rank sends a second, in its node and beyond. Raises UserError."""
    link = device.link if device else "loopback"
    in_node, network = parse_interconnect(flags.interconnect or f"{link},ndr")
    node = flags.gpus
    if flags.nodes == 1 and device is not None:
        node = max(flags.gpus, ASSUMED_NODE)
    return Links(in_node=in_node, beyond=min(in_node, node * network), node=node)


def speed_of(sizes: Sizes, flags: Namespace, device: Device | None) -> Speed:
    """The run on its own and other numbers of ranks, and what its speed rests on, or why it is
    not known.
    """
    links = links_of(flags, device)
    costs, origin = costs_of(sizes, flags, device)
    scales = {}
    uneven = []
    for ranks in sorted({*SCALES, sizes.ranks}):
        if sizes.recipe.global_batch_size % ranks:
            uneven.append(ranks)
        elif costs is not None:
            scales[ranks] = scale_to(sizes, costs, ranks, links.of(ranks))
    return Speed(links=links, scales=scales, uneven=uneven, origin=origin)


def plan(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    flags, overrides = build_parser().parse_known_args(arguments)
    check_flags(flags)
    device = device_of(flags)
    recipe = load_recipe(flags.recipe, overrides, flags.data_dir)
    ranks = flags.gpus * flags.nodes
    engine = flags.deepspeed_config or recipe.engine
    engine_config = load_engine_config(engine)
    objection = monitor_objection(engine_config)
    if objection:
        raise UserError(f"engine {engine}: {objection}")
    engine_config = merge_config(recipe, engine_config, ranks)
    sizes = sizes_of(recipe, engine_config, ranks, "cuda" if device else "cpu")
    if device is not None:
        available = device.memory_bytes
    else:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        available = machine / flags.gpus
    check_it_fits(recipe, engine_config, ranks, available, sizes.device_type)
    manifest = ShardReader(flags.data_dir).manifest if flags.data_dir else None
    planned = Plan(
        recipe_name=flags.recipe,
        nodes=flags.nodes,
        gpus=flags.gpus,
        device=device,
        sizes=sizes,
        available_bytes=available,
        data_tokens=manifest.tokens("train") if manifest else None,
        one_input=about_one_input(recipe.model, manifest),
        price_per_gpu_hour=flags.price_per_gpu_hour,
        speed=speed_of(sizes, flags, device),
    )
    print(plan_page(planned))


if __name__ == "__main__":
    sys.exit(exit_code(plan))

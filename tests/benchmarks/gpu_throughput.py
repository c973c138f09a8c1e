"""Tokens/s and MFU of a recipe on one device, over micro-batch x activation checkpointing x compile
x loss head.

    python tests/benchmarks/gpu_throughput.py [--recipe paper_binary_code] [--all] [--quick]
        [--dotted.key=value ...]

One command, no network, torch 2.6 or newer. Every row is a process of its own that trains real
steps on random ids through the engine (DeepSpeed ZeRO-2, bf16 with fp32 masters, accumulation and
reduction), and dies of its own memory alone. Without `--all`, rows follow a search: compile and
checkpointing first, then the loss head, then the micro-batch, each with the best of what came
before; then the best row once more with heads of 128 in place of the recipe's, which shows what
narrow heads cost. MFU is tokens/s x FLOPs a token (pretrain/costs/flops.py) / the device's bf16
peak.

`--profile` profiles two steps of the best row and prints its ten largest costs. On a machine
without a GPU, or with `--quick`, a tiny shape runs in fp32 on the CPU: a test of this file, not a
figure.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).parent.parent.parent
sys.path[:0] = [str(REPOSITORY)]

from benchmark_recipes import with_vocabulary

from data_prep.commands import exit_code
from data_prep.errors import UserError
from pretrain.config.deepspeed import load_engine_config, merge_config
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.data.batches import widened
from pretrain.distributed.devices import keep_freed_memory
from pretrain.distributed.world import World
from pretrain.engine.engine import Engine
from pretrain.engine.process_group import start_process_group
from pretrain.engine.profiler import StepProfiler
from pretrain.metrics.utilisation import Utilisation
from pretrain.model.build import build_model

ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)
EOS_ID, DOCUMENT_TOKENS = 0, 500
TINY = {
    "model.vocab_size": 512,
    "model.d_model": 64,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.seq_len": 64,
    "engine": "zero2_fp32",
}
MICRO_BATCHES = (4, 8, 16, 32, 64)
MODES = ("none", "selective", "full")
COLUMNS = (
    *("micro-batch", "checkpointing", "compile", "loss head", "heads", "documents masked"),
    *("tokens/s", "MFU", "peak GB", "ms a step"),
)
SHOWN = (
    *("batch.micro_batch_size", "activation_checkpointing.mode", "compile", "loss_head"),
    *("model.num_heads", "intra_document_masking"),
)
Keys = dict[str, Any]


def measure(recipe: Recipe, steps: int, profile: bool) -> Keys:
    """Train some steps in this process; medians over those after the third."""
    keep_freed_memory()
    engine_config = merge_config(recipe, load_engine_config(recipe.engine), ALONE.world_size)
    device = start_process_group(ALONE)
    engine = Engine(build_model(recipe), recipe, engine_config, ALONE, device)
    engine.mask_documents(EOS_ID)
    random = np.random.default_rng(0)
    shape = (recipe.batch.micro_batch_size, recipe.model.seq_len + 1)
    profiler = StepProfiler(
        2 if profile else 0,
        range(3 + steps),
        Path("profile"),
        lambda text: print(text, file=sys.stderr),
    )
    figures = []
    for step in range(3 + steps):
        batches = []
        for _ in range(engine.accumulation_steps):
            ids = random.integers(1, recipe.model.vocab_size, shape).astype(np.uint16)
            ids[random.random(shape) < 1 / DOCUMENT_TOKENS] = EOS_ID
            batches.append(widened(ids, pinned=True))
        engine.clock.mark("data")
        profiler.before(step)
        figures.append(engine.train_step(batches, recipe.optimizer.peak_learning_rate).own)
        profiler.after(step)
    seconds = {
        phase: statistics.median(f.seconds[phase] for f in figures[3:])
        for phase in figures[0].seconds
    }
    tokens_per_s = recipe.batch.global_batch_tokens / sum(seconds.values())
    utilisation = Utilisation(recipe, device, torch.bfloat16, ALONE)
    return {
        "device": str(utilisation),
        "tokens_per_s": tokens_per_s,
        "mfu": utilisation.mfu(tokens_per_s),
        "peak_memory_bytes": figures[-1].peak_memory_bytes,
        "seconds": seconds,
    }


def as_flags(keys: Keys) -> list[str]:
    """Recipe keys as the training command takes them."""
    return [f"--{key}={value}" for key, value in keys.items()]


def run_row(flags: argparse.Namespace, keys: Keys, *, profile: bool = False) -> Keys:
    """Measure one configuration in a child; `failed` says why where there is no figure."""
    recipe = load_recipe(flags.recipe, as_flags(flags.overrides | keys))
    tokens = keys["batch.micro_batch_size"] * flags.accumulation * recipe.model.seq_len
    overrides = as_flags(
        flags.overrides | keys | {"batch.global_batch_tokens": tokens, "train_tokens": 100 * tokens}
    )
    command = [
        sys.executable,
        __file__,
        "--child",
        "--recipe",
        flags.recipe,
        "--steps",
        str(flags.steps),
        *overrides,
    ]
    child = subprocess.run(
        [*command, *(["--profile"] if profile else [])], capture_output=True, text=True
    )
    if profile:
        print(child.stderr)
    result = json.loads(child.stdout.splitlines()[-1]) if child.returncode == 0 else {}
    if not result:
        last = [line for line in child.stderr.splitlines() if line.strip()][-1:]
        result = {
            "failed": "out of memory"
            if "out of memory" in child.stderr.lower()
            else "".join(last)[-110:]
        }
    print(row_words(keys, result), flush=True)
    return {"keys": keys, **result}


def row_words(keys: Keys, result: Keys) -> str:
    """One row of the Markdown table."""
    if "failed" in result:
        figures = [result["failed"], "", "", ""]
    else:
        split = ", ".join(
            f"{phase} {second * 1e3:.0f}" for phase, second in result["seconds"].items()
        )
        mfu = "" if result["mfu"] is None else f"{result['mfu']:.1%}"
        figures = [
            f"{result['tokens_per_s']:,.0f}",
            mfu,
            f"{result['peak_memory_bytes'] / 1e9:.1f}",
            split,
        ]
    return "| " + " | ".join([*(str(keys.get(key, "")) for key in SHOWN), *figures]) + " |"


def best(rows: Sequence[Keys]) -> Keys:
    """The keys of the fastest row. Raises SystemExit if there is none."""
    measured = [row for row in rows if "failed" not in row]
    if not measured:
        raise SystemExit(f"no configuration ran; the first failed with: {rows[0]['failed']}")
    return max(measured, key=lambda row: row["tokens_per_s"])["keys"]


def searched(flags: argparse.Namespace) -> Iterator[Keys]:
    """Rows of the search, then the best one again with wide heads."""
    heads = ["chunked", "whole", *(["liger"] if torch.cuda.is_available() else [])]
    rows = []
    for compiled, mode in itertools.product(("true", "false"), flags.modes):
        keys = {"batch.micro_batch_size": flags.micro_batches[len(flags.micro_batches) // 2]}
        rows.append(
            run_row(
                flags,
                keys
                | {
                    "compile": compiled,
                    "activation_checkpointing.mode": mode,
                    "loss_head": "chunked",
                },
            )
        )
    for head in heads[1:]:
        rows.append(run_row(flags, best(rows) | {"loss_head": head}))
    for size in flags.micro_batches:
        keys = best(rows) | {"batch.micro_batch_size": size}
        if keys not in [row["keys"] for row in rows]:
            rows.append(run_row(flags, keys))
    yield from rows
    wide = load_recipe(flags.recipe, as_flags(flags.overrides)).model.d_model // 128
    if wide:
        run_row(flags, best(rows) | {"model.num_heads": wide})
    run_row(flags, best(rows) | {"intra_document_masking": "true"})


def everything(flags: argparse.Namespace) -> Iterator[Keys]:
    """Rows of the whole product."""
    heads = ["chunked", "whole", *(["liger"] if torch.cuda.is_available() else [])]
    for size, mode, compiled, head in itertools.product(
        flags.micro_batches, flags.modes, ("true", "false"), heads
    ):
        keys = {"batch.micro_batch_size": size, "activation_checkpointing.mode": mode}
        yield run_row(flags, keys | {"compile": compiled, "loss_head": head})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="paper_binary_code")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each row")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=list(MICRO_BATCHES))
    parser.add_argument(
        "--accumulation",
        type=int,
        default=4,
        help="micro-batches a step; the paper's step has 32 of 16",
    )
    parser.add_argument("--all", action="store_true", help="every row of the product")
    parser.add_argument("--quick", action="store_true", help="a tiny shape on any device")
    parser.add_argument("--profile", action="store_true", help="profile the best row")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    flags, overrides = parser.parse_known_args(arguments)
    flags.modes = MODES
    if flags.child:
        try:
            print(
                json.dumps(
                    measure(load_recipe(flags.recipe, overrides), flags.steps, flags.profile)
                )
            )
        except UserError as error:
            raise SystemExit(str(error)) from None
        return
    given = with_vocabulary(flags.recipe, overrides)
    flags.overrides = dict(override.removeprefix("--").split("=", 1) for override in given)
    if flags.quick or not torch.cuda.is_available():
        flags.overrides = TINY | flags.overrides
        flags.steps, flags.micro_batches, flags.accumulation, flags.modes = 2, [1], 2, MODES[1:2]
    print(
        f"{flags.recipe} {flags.overrides}, {flags.accumulation} micro-batches a step, torch "
        f"{torch.__version__}\n"
    )
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    rows = list(everything(flags) if flags.all else searched(flags))
    print(f"\nbest: {best(rows)}\n{next(row['device'] for row in rows if 'device' in row)}")
    if flags.profile:
        run_row(flags, best(rows), profile=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))

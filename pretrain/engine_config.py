"""The DeepSpeed JSON: reading it, checking it, and merging it with what the recipe owns.

The JSON holds engine knobs (ZeRO, precision, communication); the recipe owns batch sizes, clipping and schedule. A
JSON that repeats the recipe is refused, so that every value has one home. Nothing here imports deepspeed.
"""

import json
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pretrain.config import Recipe, nearest

DS_CONFIGS_DIR = Path(__file__).parent.parent / "ds_configs"
OWNED_BY_RECIPE = {
    "train_batch_size": "batch.global_batch_tokens",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.global_batch_tokens and batch.micro_batch_size",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "activation_checkpointing": "activation_checkpointing",
}
# Keys of the merged configuration that may differ when a run is resumed: they don't change what a step computes.
ENGINE_MAY_CHANGE_ON_RESUME = frozenset(
    {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print"}
)
# What may stand in the JSON: DeepSpeed ignores a key it doesn't know, so a misspelt one would do nothing.
KNOWN_KEYS = frozenset(
    {
        "zero_optimization",
        "bf16",
        "fp16",
        "data_types",
        "communication_data_type",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "prescale_gradients",
        "gradient_predivide_factor",
        "dump_state",
        "memory_breakdown",
        "wall_clock_breakdown",
        "steps_per_print",
        "flops_profiler",
        "comms_logger",
        "csv_monitor",
        "tensorboard",
        "wandb",
    }
)

ZERO_KEYS = frozenset(
    {
        "stage",
        "overlap_comm",
        "contiguous_gradients",
        "reduce_scatter",
        "reduce_bucket_size",
        "allgather_partitions",
        "allgather_bucket_size",
        "use_multi_rank_bucket_allreduce",
        "round_robin_gradients",
        "ignore_unused_parameters",
        "offload_optimizer",
    }
)


def engine_config_path(name: str) -> Path:
    """A file of ds_configs/ by name, or the path itself."""
    path = Path(name)
    if path.suffix == ".json":
        if not path.is_file():
            raise UserError(f"--deepspeed-config {name}: no such file")
        return path
    shipped = sorted(p.stem for p in DS_CONFIGS_DIR.glob("*.json"))
    if name not in shipped:
        raise UserError(f"engine {name}: no such DeepSpeed configuration; {nearest(name, shipped)} (or give a file)")
    return DS_CONFIGS_DIR / f"{name}.json"


def load_engine_config(name: str) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON. Raises UserError for what this pipeline can't honour."""
    path = engine_config_path(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object of DeepSpeed keys")
    for key, home in OWNED_BY_RECIPE.items():
        if key in config:
            raise UserError(f"{path}: {key} belongs to the recipe ({home}); remove it here")
    if '"auto"' in json.dumps(config):
        raise UserError(f'{path}: holds an "auto" value; write the value you want, or leave the key out')
    for key in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f"{path}: {key} is {config[key]!r}, expected a JSON object")
    for key in config:
        if key not in KNOWN_KEYS:
            raise UserError(f"{path}: unknown key {key}; {nearest(key, sorted(KNOWN_KEYS))}")
    for key in config.get("zero_optimization", {}):
        if key not in ZERO_KEYS:
            raise UserError(f"{path}: unknown key zero_optimization.{key}; {nearest(key, sorted(ZERO_KEYS))}")
    if "enabled" not in config.get("bf16", {"enabled": False}):
        raise UserError(f'{path}: bf16 has no key enabled; write "bf16": {{"enabled": true}}')
    if "offload_optimizer" in config.get("zero_optimization", {}):
        raise UserError(f"{path}: zero_optimization.offload_optimizer is not supported; remove it")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage != 2:
        raise UserError(f"{path}: zero_optimization.stage is {stage}, expected 2")
    if config.get("fp16", {}).get("enabled"):
        raise UserError(f"{path}: fp16 is not supported; use bf16, or neither for fp32")
    return config


def accumulation_steps(recipe: Recipe, world_size: int) -> int:
    """Micro-batches that each rank takes in a step. Raises UserError unless the batch divides evenly."""
    batch, at_once = recipe.global_batch_size, world_size * recipe.batch.micro_batch_size
    if batch % at_once == 0:
        return batch // at_once
    below = batch // at_once * at_once
    nearest_tokens = " or ".join(f"{n * recipe.model.seq_len}" for n in (below, below + at_once) if n)
    fitting = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= recipe.batch.micro_batch_size)
    fitting_ranks = [n for n in range(1, world_size + 1) if batch % (n * recipe.batch.micro_batch_size) == 0]
    ways = [f"batch.global_batch_tokens {nearest_tokens}"]
    per_rank = [n for n in range(fitting, 0, -1) if batch % (world_size * n) == 0]
    if per_rank:
        ways.append(f"batch.micro_batch_size {per_rank[0]}")
    if fitting_ranks:
        ways.append(f"{fitting_ranks[-1]} rank{'s' if fitting_ranks[-1] > 1 else ''}")
    raise UserError(
        f"a step of {batch} windows does not divide over {world_size} ranks x micro-batch "
        f"{recipe.batch.micro_batch_size}; nearest that do: {', or '.join(ways)}"
    )


def merge_config(recipe: Recipe, engine_config: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The one dictionary that DeepSpeed gets. Gradients add up and travel in fp32 unless the JSON says otherwise."""
    return {
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        **engine_config,
        "train_batch_size": recipe.global_batch_size,
        "train_micro_batch_size_per_gpu": recipe.batch.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(recipe, world_size),
        "gradient_clipping": recipe.optimizer.gradient_clipping,
        "steps_per_print": 2**31,  # this pipeline reports its own figures
    }

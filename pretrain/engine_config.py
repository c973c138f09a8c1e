"""The DeepSpeed JSON: reading it, checking it, and merging it with what the recipe owns.

The JSON holds engine knobs (ZeRO, precision, communication); the recipe owns batch sizes, clipping and schedule. A
JSON that repeats the recipe is refused, so that every value has one home. Nothing here imports deepspeed.
"""

import json
from collections.abc import Iterator
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
# What may stand in the JSON, and in its sections: DeepSpeed ignores a key it doesn't know, so a misspelt one would do
# nothing. Under bf16 and data_types it knows more, which would take fp32 masters, moments or sums away.
KNOWN_KEYS = {
    "": [
        "zero_optimization", "bf16", "fp16", "data_types", "communication_data_type", "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer", "dump_state", "memory_breakdown", "wall_clock_breakdown", "steps_per_print",
        "flops_profiler", "comms_logger", "csv_monitor", "tensorboard", "wandb",
    ],
    "zero_optimization": [
        "stage", "overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size",
        "allgather_partitions", "allgather_bucket_size", "use_multi_rank_bucket_allreduce", "round_robin_gradients",
        "ignore_unused_parameters", "offload_optimizer",
    ],
    "zero_optimization.offload_optimizer": ["device", "pin_memory"],
    "bf16": ["enabled"],
    "data_types": ["grad_accum_dtype"],
}  # fmt: skip


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
    for objection in objections(config):
        raise UserError(f"{path}: {objection}")
    return config


def objections(config: dict[str, Any]) -> Iterator[str]:
    """What this pipeline can't honour in a DeepSpeed JSON. Later ones rely on there being no earlier ones."""
    for key, home in OWNED_BY_RECIPE.items():
        if key in config:
            yield f"{key} belongs to the recipe ({home}); remove it here"
    if '"auto"' in json.dumps(config):
        yield 'holds an "auto" value; write the value you want, or leave the key out'
    yield from unknown_keys(config)
    fp16 = config.get("fp16", {})
    if not isinstance(fp16, dict) or fp16.get("enabled"):
        yield "fp16 is not supported; use bf16, or neither for fp32"
    if "enabled" not in config.get("bf16", {"enabled": False}):
        yield 'bf16 has no key enabled; write "bf16": {"enabled": true}'
    yield from zero_objections(config)


def unknown_keys(content: dict[str, Any], section: str = "") -> Iterator[str]:
    """Keys that are not known where they stand, and sections that are no JSON objects."""
    known = KNOWN_KEYS[section]
    for key, value in content.items():
        name = f"{section}.{key}".lstrip(".")
        if key not in known:
            yield f"unknown key {name}; {nearest(key, sorted(known))}"
        elif name in KNOWN_KEYS:
            if not isinstance(value, dict):
                yield f"{name} is {value!r}, expected a JSON object"
            yield from unknown_keys(value, name)


def zero_objections(config: dict[str, Any]) -> Iterator[str]:
    """Stages, and keys of ZeRO, that wouldn't train right or couldn't be saved."""
    zero = config.get("zero_optimization", {})
    stage, offload = zero.get("stage"), zero.get("offload_optimizer")
    if stage not in (0, 1, 2):
        yield f"zero_optimization.stage is {stage}, expected 0, 1 or 2"
    if stage == 0 and (config.get("bf16", {}).get("enabled") or offload is not None):
        yield "zero_optimization.stage is 0, which keeps no fp32 masters for bf16 or offload_optimizer; write 1 or 2"
    if offload is not None and offload.get("device") != "cpu":
        yield f"zero_optimization.offload_optimizer.device is {offload.get('device')!r}, expected 'cpu'"
    if offload is not None and config.get("zero_force_ds_cpu_optimizer"):
        yield "zero_force_ds_cpu_optimizer is true, but the optimizer is torch's AdamW; write false"
    if zero.get("round_robin_gradients"):
        # DeepSpeed 0.19.8 trains right with it, but its `_hp_mapping` still says where parameters were before.
        yield "zero_optimization.round_robin_gradients would make wrong checkpoints on several ranks; remove it"


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
    """The one dictionary that DeepSpeed gets. Gradients add up and travel in fp32 unless the JSON says otherwise.

    DeepSpeed's own search for infinite gradients is off: it would make the host wait, and skip the step in silence
    where Engine.train_step raises.
    """
    return {
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,
        **engine_config,
        **({"bf16": {**engine_config["bf16"], "check_grad_overflow": False}} if "bf16" in engine_config else {}),
        "train_batch_size": recipe.global_batch_size,
        "train_micro_batch_size_per_gpu": recipe.batch.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(recipe, world_size),
        "gradient_clipping": recipe.optimizer.gradient_clipping,
        "steps_per_print": 2**31,  # this pipeline reports its own figures
    }

"""The DeepSpeed JSON: reading it, checking it, and merging it with what the recipe owns.

The JSON holds engine knobs (ZeRO, precision, communication); the recipe owns batch sizes, clipping
and schedule. A JSON that repeats the recipe is refused, so that every value has one home. Nothing
here imports deepspeed.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, nearest, parse_json
from pretrain.config.load import shipped_file
from pretrain.config.recipe import Recipe

DS_CONFIGS_DIR = Path(__file__).parent.parent.parent / "ds_configs"
OWNED_BY_RECIPE = {
    "train_batch_size": "batch.global_batch_tokens",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.global_batch_tokens and batch.micro_batch_size",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "activation_checkpointing": "activation_checkpointing",
}
# What a key may hold: in words, and as a pattern of its JSON text.
FLAG = ("true or false", "true|false")
SIZE = ("a whole number, 1 or more", r"[1-9]\d*(\.0)?")
DTYPE = ('"fp32" or "bf16"', '"(fp32|bf16)"')
SECTION = ("a JSON object", r"\{.*")
# DeepSpeed's own monitors. With the engine that trains here 0.19.8 writes no loss to them, and
# their steps are counted from 0 again after a resume.
MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
# What may stand in the JSON, and in its sections: DeepSpeed ignores a key it doesn't know, so a
# misspelt one would do nothing. Under bf16 and data_types it knows more, which would take fp32
# masters, moments or sums away.
KNOWN_KEYS = {
    "": {
        "communication_data_type": DTYPE,
        "steps_per_print": SIZE,
        "zero_force_ds_cpu_optimizer": ("false: the optimizer is torch's AdamW", "false"),
        **dict.fromkeys(["zero_optimization", "bf16", "data_types"], SECTION),
        **dict.fromkeys(["flops_profiler", "comms_logger", *MONITORS], SECTION),
        **dict.fromkeys(["dump_state", "memory_breakdown", "wall_clock_breakdown"], FLAG),
        "zero_allow_untested_optimizer": FLAG,
    },
    "zero_optimization": {
        "stage": ("0, 1 or 2", "[012]"),
        "reduce_bucket_size": SIZE,
        "offload_optimizer": SECTION,
        "allgather_bucket_size": ("an even number, 2 or more", r"(?!0)\d*[02468](\.0)?"),
        # DeepSpeed 0.19.8 trains right with it, but its `_hp_mapping` still says where parameters
        # were before.
        "round_robin_gradients": (
            "false: true would make wrong checkpoints on several ranks",
            "false",
        ),
        **dict.fromkeys(
            ["overlap_comm", "contiguous_gradients", "reduce_scatter", "allgather_partitions"], FLAG
        ),
        **dict.fromkeys(["use_multi_rank_bucket_allreduce", "ignore_unused_parameters"], FLAG),
    },
    "zero_optimization.offload_optimizer": {"device": ('"cpu"', '"cpu"'), "pin_memory": FLAG},
    "bf16": {"enabled": FLAG},
    "data_types": {"grad_accum_dtype": DTYPE},
}
# Of the sections that know them.
REQUIRED_KEYS = ["zero_optimization", "stage", "device", "enabled"]


def load_engine_config(name: str) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON. Raises UserError for what this pipeline can't honour."""
    path = shipped_file(name, DS_CONFIGS_DIR, ".json", "engine")
    config = parse_json(path.read_bytes(), str(path), "mend it")
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object of DeepSpeed keys")
    for objection in objections(config):
        raise UserError(f"{path}: {objection}")
    return config


def objections(config: dict[str, Any]) -> Iterator[str]:
    """What this pipeline can't honour in a DeepSpeed JSON.

    Later ones rely on there being no earlier ones.
    """
    for key, home in OWNED_BY_RECIPE.items():
        if key in config:
            yield f"{key} belongs to the recipe ({home}); remove it here"
    yield from key_objections(config)
    zero = config["zero_optimization"]
    is_bf16 = config.get("bf16", {}).get("enabled")
    sums_in_bf16 = config.get("data_types", {}).get("grad_accum_dtype") == "bf16"
    if zero["stage"] == 0 and (is_bf16 or sums_in_bf16 or "offload_optimizer" in zero):
        yield (
            "zero_optimization.stage is 0, which is for fp32 alone, without bf16 or "
            "offload_optimizer; write 1 or 2"
        )


def key_objections(content: dict[str, Any], section: str = "") -> Iterator[str]:
    """Keys that are not known where they stand, that are missing, or hold what they may not."""
    known = KNOWN_KEYS[section]
    texts = {key: "missing" for key in REQUIRED_KEYS if key in known}
    texts |= {key: json.dumps(value) for key, value in content.items()}
    for key, text in texts.items():
        name = f"{section}.{key}".lstrip(".")
        if key not in known:
            yield f"unknown key {name}; {nearest(key, known)}"
            continue
        expected, pattern = known[key]
        if not re.fullmatch(pattern, text):
            yield f"{name} is {text}, expected {expected}"
        if name in KNOWN_KEYS:
            yield from key_objections(content[key], name)


def monitor_objection(config: dict[str, Any]) -> str:
    """What is to be said of DeepSpeed's monitors that a JSON enables; empty if it enables none.

    A block that is not enabled does nothing, and may stay.
    """
    enabled = [name for name in MONITORS if config.get(name, {}).get("enabled")]
    if not enabled:
        return ""
    return (
        f"{', '.join(enabled)}: DeepSpeed's monitors get no loss here, and count steps anew when a "
        'run is resumed; remove them or write "enabled": false, and name sinks in the recipe '
        "(log.sinks)"
    )


def accumulation_steps(recipe: Recipe, world_size: int) -> int:
    """Micro-batches that each rank takes in a step.

    Raises UserError unless the batch divides evenly.
    """
    batch = recipe.global_batch_size
    micro_batch = recipe.batch.micro_batch_size
    steps, rest = divmod(batch, world_size * micro_batch)
    if rest == 0:
        return steps
    ways = ", or ".join(ways_to_divide(recipe, world_size))
    raise UserError(
        f"a step of {batch} windows does not divide over {world_size} ranks x micro-batch "
        f"{micro_batch}; nearest that do: {ways}"
    )


def ways_to_divide(recipe: Recipe, world_size: int) -> list[str]:
    """What to change, one thing at a time, so that a step divides over ranks and micro-batches."""
    batch = recipe.global_batch_size
    micro_batch = recipe.batch.micro_batch_size
    at_once = world_size * micro_batch
    below = batch // at_once * at_once
    above = below + at_once
    batches = [windows * recipe.model.seq_len for windows in (below, above) if windows > 0]
    ways = [f"batch.global_batch_tokens {' or '.join(map(str, batches))}"]

    for size in range(micro_batch, 0, -1):
        if batch % (world_size * size) == 0:
            ways.append(f"batch.micro_batch_size {size}")
            break
    for ranks in range(world_size, 0, -1):
        if batch % (micro_batch * ranks) == 0:
            ways.append(f"{ranks} of the ranks")
            break
    return ways


def merge_config(recipe: Recipe, engine_config: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The one dictionary that DeepSpeed gets.

    Gradients add up and travel in fp32 unless the JSON says otherwise. DeepSpeed's own search for
    infinite gradients is off: it would make the host wait, and skip the step in silence where
    Engine.train_step says why.
    """
    merged = {
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,
        **engine_config,
    }
    if "bf16" in engine_config:
        merged["bf16"] = {**engine_config["bf16"], "check_grad_overflow": False}
    return merged | {
        "train_batch_size": recipe.global_batch_size,
        "train_micro_batch_size_per_gpu": recipe.batch.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(recipe, world_size),
        "gradient_clipping": recipe.optimizer.gradient_clipping,
        "steps_per_print": 2**31,  # this pipeline reports its own figures
    }

"""What a resumed or a branched run may change of its recipe and of its DeepSpeed configuration."""

from typing import Any

from data_prep.errors import UserError
from pretrain.config.deepspeed import MONITORS

# What a resumed run may change, keys and sections: none of it alters what a step computes, but for
# the order of float sums. Decisions on bad steps are recorded and replayed; of the engine, the
# merged configuration is compared instead.
MAY_CHANGE_ON_RESUME = frozenset(
    {
        "batch.micro_batch_size",
        "compile",
        "loss_head",
        "data",
        "activation_checkpointing",
        "validation",
        "checkpoints",
        "bad_steps",
        "stalls",
        "log",
        "engine",
    }
)
# A branch may also go on longer, and decay otherwise.
MAY_CHANGE_ON_BRANCH = MAY_CHANGE_ON_RESUME | {"train_tokens", "schedule"}
# Keys of the merged configuration that may differ when a run is resumed: they don't change what a
# step computes. The three before the monitors are what earlier versions added otherwise than this
# one; their runs go on. Monitors are refused in a new run; one that began with them may leave them
# out.
ENGINE_MAY_CHANGE_ON_RESUME = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "steps_per_print",
        "bf16.check_grad_overflow",
        "zero_force_ds_cpu_optimizer",
        "zero_allow_untested_optimizer",
        *MONITORS,
    }
)


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def refuse_changes(
    saved: dict[str, Any], now: dict[str, Any], may_change: frozenset[str], origin: str
) -> None:
    """Raise UserError for the first dotted key whose value differs.

    Keys in `may_change`, or whose sections are in it, may differ.
    """
    old = flatten(saved)
    new = flatten(now)
    for key in old | new:
        section = key.partition(".")[0]
        if key in may_change or section in may_change:
            continue
        before = old.get(key)
        after = new.get(key)
        if before != after:
            raise UserError(
                f"{origin}: this run was started with {key}={before!r}, got {after!r}; give the "
                "old value to continue it, or another --run-dir to start a new run"
            )

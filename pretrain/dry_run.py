"""What `--dry-run` prints: everything that a run would be, from the checks that need no other rank."""

import json
from typing import Any

from pretrain.config import Recipe, recipe_to_yaml
from pretrain.flops import count_parameters, flops_per_token
from pretrain.loader import TrainingLoader
from pretrain.optim import learning_rate
from pretrain.progress import epochs_lines


def schedule_table(recipe: Recipe) -> list[str]:
    """The learning rate at eleven steps from the first to the last."""
    total = recipe.total_steps
    warmup = recipe.schedule.warmup(total)
    shown = sorted({0, max(0, warmup - 1), *(round(i * (total - 1) / 10) for i in range(11))})
    peak = recipe.optimizer.peak_learning_rate
    return [f"  step {step:>10,}   {learning_rate(step, total, peak, recipe.schedule):.4e}" for step in shown]


def describe(recipe: Recipe, engine_config: dict[str, Any], loader: TrainingLoader, world_size: int) -> str:
    """Resolved recipe, merged engine JSON, parameters, schedule, steps and epochs, as text."""
    counts = count_parameters(recipe.model)
    accumulation = engine_config["gradient_accumulation_steps"]
    return "\n".join(
        [
            "# recipe, resolved",
            recipe_to_yaml(recipe).rstrip(),
            "\n# DeepSpeed configuration, merged",
            json.dumps(engine_config, indent=1),
            "\n# parameters",
            *(f"  {part:<24}{count:>16,}" for part, count in counts.items()),
            f"  {'total':<24}{sum(counts.values()):>16,}",
            f"  {flops_per_token(recipe.model) / 1e9:.3f} GFLOP a token, forward and backward",
            "\n# learning rate",
            *schedule_table(recipe),
            "\n# steps and data",
            f"  {recipe.total_steps:,} steps of {recipe.batch.global_batch_tokens:,} tokens: "
            f"{world_size} ranks x {accumulation} micro-batches x {recipe.batch.micro_batch_size} windows of "
            f"{recipe.model.seq_len:,}",
            *(f"  {line}" for line in epochs_lines(recipe, loader)),
        ]
    )

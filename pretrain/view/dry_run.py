"""What `--dry-run` prints: everything that a run would be, from the checks that need no other
rank.
"""

import json
from typing import Any

from pretrain.config.load import recipe_to_yaml
from pretrain.config.recipe import Recipe
from pretrain.config.schedule import learning_rate
from pretrain.costs.flops import count_parameters, flops_per_token
from pretrain.data.loader import TrainingLoader
from pretrain.view.progress import epochs_lines
from pretrain.view.templates import render


def learning_rates(recipe: Recipe) -> dict[int, float]:
    """The learning rate at eleven steps from the first to the last, and at the end of the
    warm-up.
    """
    total, peak = recipe.total_steps, recipe.optimizer.peak_learning_rate
    end_of_warmup = max(0, recipe.schedule.warmup(total) - 1)
    shown = sorted({0, end_of_warmup, *(round(i * (total - 1) / 10) for i in range(11))})
    return {step: learning_rate(step, total, peak, recipe.schedule) for step in shown}


def describe(
    recipe: Recipe,
    engine_config: dict[str, Any],
    loader: TrainingLoader,
    world_size: int,
    default_start: str = "",
) -> str:
    """Resolved recipe, merged engine JSON, parameters, schedule, steps and epochs, as text.

    `default_start` is a line on what launch/pretrain.sh would start, where this is no launch of
    several ranks.
    """
    return render(
        "dry_run.txt.jinja",
        recipe=recipe,
        recipe_yaml=recipe_to_yaml(recipe),
        engine_config=engine_config,
        engine_json=json.dumps(engine_config, indent=1),
        parameters=count_parameters(recipe.model),
        flops=flops_per_token(recipe.model),
        rates=learning_rates(recipe),
        world_size=world_size,
        epochs=epochs_lines(recipe, loader),
        default_start=default_start,
    )

"""What `--dry-run` prints: everything that a run would be, as far as one rank can tell."""

import json
from dataclasses import dataclass
from typing import Any

from pretrain.config.load import recipe_to_yaml
from pretrain.config.recipe import Recipe
from pretrain.config.schedule import rate_of
from pretrain.costs.flops import count_parameters, flops_per_token
from pretrain.data.loader import TrainingLoader
from pretrain.data.stages import DataStage
from pretrain.view.progress import epochs_lines, stages_lines
from pretrain.view.templates import render


def learning_rates(recipe: Recipe) -> dict[int, float]:
    """By step: at eleven steps from the first to the last, and at the end of the warm-up."""
    total = recipe.total_steps
    end_of_warmup = max(0, recipe.schedule.warmup(total) - 1)
    shown = {end_of_warmup}
    for tenth in range(11):
        shown.add(round(tenth * (total - 1) / 10))
    return {step: rate_of(recipe, step) for step in sorted(shown)}


@dataclass(frozen=True, kw_only=True)
class DataOfRun:
    """What a run draws its samples from."""

    loader: TrainingLoader  # of the newest stage
    stages: tuple[DataStage, ...]


def describe(
    recipe: Recipe,
    engine_config: dict[str, Any],
    data: DataOfRun,
    world_size: int,
    default_start: str = "",
) -> str:
    """Resolved recipe, merged engine JSON, parameters, schedule, steps and epochs, as text.

    `default_start` is a line on what launch/pretrain.sh would start, where this is no launch of
    several ranks.
    """
    parameters = count_parameters(recipe.model)
    return render(
        "dry_run.txt.jinja",
        recipe=recipe,
        recipe_yaml=recipe_to_yaml(recipe),
        engine_config=engine_config,
        engine_json=json.dumps(engine_config, indent=1),
        parameters=parameters,
        parameters_in_all=sum(parameters.values()),
        gflops_per_token=flops_per_token(recipe.model) / 1e9,
        rates=learning_rates(recipe),
        world_size=world_size,
        epochs=epochs_lines(recipe, data.loader, data.stages[-1]),
        stages=stages_lines(data.stages),
        default_start=default_start,
    )

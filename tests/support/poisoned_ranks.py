"""Ranks some of whose steps have gradients that are no numbers."""

from pathlib import Path
from typing import Any

from support.forked_ranks import Ended, be_a_rank, run_ranks


def be_a_poisoned_rank(arguments: list[str], variables: dict[str, str], log: Path) -> None:
    """Body of a forked rank where some steps' gradients, on the last rank alone, are no numbers."""
    import torch

    from pretrain.engine.engine import Engine

    steps, calls, honest = (
        set(map(int, variables["POISONED"].split())),
        iter(range(10**6)),
        Engine.train_step,
    )

    def train_step(engine: Engine, *step: Any) -> Any:
        poisoned = next(calls) in steps and engine.world.rank == engine.world.world_size - 1
        weight = engine.deepspeed.module.model.model.final_norm.weight
        hook = weight.register_hook(lambda grad: grad * torch.nan) if poisoned else None
        figures = honest(engine, *step)
        if hook:
            hook.remove()
        return figures

    Engine.train_step = train_step  # type: ignore[method-assign]
    be_a_rank(arguments, variables, log)


def poisoned_run(
    ranks: int, steps: str, recipe: Path, data: Path, run_dir: Path, *more: str, **env: str
) -> Ended:
    """Run the training command where the steps of so many calls, counted from 0, are bad."""
    body = be_a_poisoned_rank
    return run_ranks(ranks, recipe, data, run_dir, *more, body=body, POISONED=steps, **env)

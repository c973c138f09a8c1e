"""Directories of runs that were never trained, with as many steps as a test asks for."""

import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.files import write_durably
from pretrain.config.load import build_recipe, recipe_to_yaml
from pretrain.config.recipe import Recipe
from pretrain.metrics.step_record import AnyStep, SkippedStep, StepRecord
from pretrain.run.starts import Start, append_start
from pretrain.run.state import write_state
from support.runs import tiny_recipe_content

GLOBAL_TOKENS = 6 * 32  # of a step of the tiny recipe


def falling_steps(steps: int, seed: int = 1, outlier_at: int | None = None) -> Iterator[StepRecord]:
    """The steps of a run that learns, as noisy as real ones; one may have a loss of 99."""
    noise = random.Random(seed)
    for step in range(steps):
        share = step / steps
        loss = 2.0 + 4.0 * math.exp(-6 * share) + noise.gauss(0, 0.05)
        seconds = {
            "data": 0.001,
            "forward": 0.1 + noise.random() / 50,
            "backward": 0.2 + noise.random() / 50,
            "optimizer": 0.05,
            "other": 0.002,
        }
        step_s = sum(seconds.values())
        record = StepRecord(
            step=step,
            loss=99.0 if step == outlier_at else loss,
            gradient_norm=0.5 + math.exp(noise.gauss(0, 0.3)) / 5,
            learning_rate=0.01 * min(1.0, 20 * (share + 1 / steps)) * (1 - 0.9 * share),
            tokens=(step + 1) * GLOBAL_TOKENS,
            tokens_per_s=GLOBAL_TOKENS / step_s,
            tokens_per_s_per_rank=GLOBAL_TOKENS / step_s / 2,
            step_s=step_s,
            seconds=seconds,
            peak_memory_bytes=10**9,
            slowest=None,
        )
        is_validated = (step + 1) % max(1, steps // 20) == 0
        yield replace(record, val_loss=loss + 0.1) if is_validated else record


def skipped_step(step: int, reason: str) -> SkippedStep:
    """The record of a step that was refused."""
    return SkippedStep(
        step=step,
        loss=None,
        gradient_norm=None,
        learning_rate=0.01,
        tokens=(step + 1) * GLOBAL_TOKENS,
        skipped=reason,
    )


def recipe_of(steps: int, **sections: Any) -> Recipe:
    """The tiny recipe, of so many steps."""
    content = tiny_recipe_content(train_tokens=steps * GLOBAL_TOKENS, **sections)
    return build_recipe(content, "test")


def write_run(
    run_dir: Path, steps: Iterable[AnyStep], recipe: Recipe, *starts: dict[str, Any]
) -> Path:
    """A run's directory as the trainer leaves it, without checkpoints."""
    run_dir.mkdir(parents=True)
    write_durably(run_dir / "recipe.yaml", recipe_to_yaml(recipe).encode())
    with (run_dir / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for record in steps:
            file.write(json.dumps(record.to_line()) + "\n")
    command = f"python -m pretrain.train --recipe r.yaml --data-dir dataset --run-dir {run_dir}"
    first = {
        "step": 0,
        "time": "2026-01-02T03:04:05Z",
        "command": command,
        "commit": "0123456789abcdef",
        "ranks": 2,
        "hosts": {"host": 2},
        "devices": {"NVIDIA H200": 2},
        "cpu_kernels": {"AVX512": 2},
        "threads_per_rank": [8],
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
    }
    for start in ({}, *starts):
        append_start(run_dir, Start.from_line({**first, **start}))
    write_state(run_dir, status="done", fingerprint="0" * 32)
    return run_dir

"""What pretrain.plan predicts beside what is measured: memory of a rank, and tokens/s after
calibration.

    python tests/benchmarks/plan_accuracy.py [--quick] [--memory-only]

Every case trains real steps through pretrain.engine.engine in processes of its own. Memory is the
peak of resident memory above what the process held before the model was built, after a first step
of a tiny model has loaded every library. The C library is told to return freed blocks at once, so
that resident memory is that of live tensors; the last lines show how much more a run holds that
keeps freed memory, as pretrain.train does on a CPU. Speed is the median step after the first, with
freed memory kept, between two calibrations; one rank, since gloo's speed is not what is calibrated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODES = ("none", "selective", "full")
RETURN_FREED = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_ARENA_MAX": "1",
}
SHAPE: dict[str, Any] = {
    "layers": 8,
    "width": 512,
    "windows": 4,
    "seq_len": 256,
    "vocab": 4096,
    "bucket": 5_000_000,
}


def cases() -> list[dict[str, Any]]:
    """What to train, for memory."""
    common: list[dict[str, Any]] = [
        {"engine": engine, "mode": mode}
        for engine in ("zero2_fp32", "zero2_bf16")
        for mode in MODES
    ]
    more: list[dict[str, Any]] = [
        {"engine": engine, "ranks": 2, "mode": mode}
        for engine in ("zero2_fp32", "zero2_bf16")
        for mode in MODES
    ]
    accumulated: list[dict[str, Any]] = [
        {"engine": engine, "accumulation": 2} for engine in ("zero2_fp32", "zero2_bf16")
    ]
    others: list[dict[str, Any]] = [
        {"vocab": 32_768, "layers": 4},
        {"bucket": 50_000_000},
        {"input": "learned", "vocab": 16_384},
        {"mode": "full", "every": 2},
        {"vocab": 8192, "head": "whole"},
        {"windows": 16, "width": 256, "layers": 12, "mode": "selective"},
    ]
    return [{**SHAPE, **case} for part in (common, accumulated, more, others) for case in part]


def recipe_of(case: dict[str, Any], ranks: int) -> Any:
    """The recipe of a case."""
    from pretrain.config.load import build_recipe

    size = case["windows"]
    content = {
        "model": {
            "vocab_size": case["vocab"],
            "d_model": case["width"],
            "num_layers": case["layers"],
            "num_heads": case["width"] // 64,
            "seq_len": case["seq_len"],
            "code_bits": 16,
            "input_embedding": case.get("input", "binary_code"),
        },
        "batch": {
            "global_batch_tokens": case["seq_len"] * size * case.get("accumulation", 1) * ranks,
            "micro_batch_size": size,
        },
        "optimizer": {"peak_learning_rate": 1e-3},
        "activation_checkpointing": {
            "mode": case.get("mode", "none"),
            "every_n_layers": case.get("every", 1),
        },
        "validation": {"every_steps": 1},
        "checkpoints": {"every_steps": 1},
        "train_tokens": 1_000_000,
        "engine": case.get("engine", "zero2_fp32"),
        "loss_head": case.get("head", "chunked"),
    }
    return build_recipe(content, "benchmark")


def status_bytes(field: str) -> int:
    """A figure of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class Trainer:
    """A case in this process."""

    def __init__(self, case: dict[str, Any]) -> None:
        from pretrain.distributed.world import world_from_environment
        from pretrain.engine.process_group import start_process_group

        self.world = world_from_environment()
        self.device = start_process_group(self.world)
        self.train(
            {**case, "layers": 1, "width": 64, "vocab": 64, "seq_len": 32, "bucket": 1000}, steps=1
        )

    def train(self, case: dict[str, Any], steps: int) -> list[float]:
        """Seconds of each step."""
        import numpy as np

        from pretrain.config.deepspeed import load_engine_config, merge_config
        from pretrain.data.batches import widened
        from pretrain.engine.engine import Engine
        from pretrain.model.build import build_model

        self.recipe = recipe_of(case, self.world.world_size)
        loaded = load_engine_config(self.recipe.engine)
        loaded["zero_optimization"]["reduce_bucket_size"] = case["bucket"]
        self.config = merge_config(self.recipe, loaded, self.world.world_size)
        engine = Engine(build_model(self.recipe), self.recipe, self.config, self.world, self.device)
        random, seconds = np.random.default_rng(0), []
        for _ in range(steps):
            shape = (engine.accumulation_steps, case["windows"], case["seq_len"] + 1)
            ids = random.integers(0, case["vocab"], shape).astype(np.uint16)
            started = time.perf_counter()
            engine.train_step([widened(one, pinned=False) for one in ids], 1e-3)
            seconds.append(time.perf_counter() - started)
        return seconds


def measure_memory(case: dict[str, Any]) -> dict[str, float]:
    """Bytes predicted and measured of this rank."""
    import gc

    from pretrain.costs.memory import phase_bytes, sizes_of

    trainer = Trainer(case)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    before = status_bytes("VmRSS")
    if case.get("keep_freed"):
        from pretrain.distributed.devices import keep_freed_memory

        keep_freed_memory()
    trainer.train(case, steps=2)
    phases = phase_bytes(sizes_of(trainer.recipe, trainer.config, trainer.world.world_size, "cpu"))
    return {"predicted": max(phases.values()), "measured": status_bytes("VmHWM") - before}


def measure_speed(case: dict[str, Any]) -> dict[str, float]:
    """Tokens/s predicted and measured of one rank."""
    from pretrain.costs.step_time import Spread, step_seconds
    from pretrain.distributed.devices import keep_freed_memory
    from pretrain.engine.calibrate import calibrate

    keep_freed_memory()
    trainer = Trainer(case)
    recipe, low_precision = recipe_of(case, 1), case["engine"] == "zero2_bf16"
    calibrated = [calibrate(recipe, None, low_precision=low_precision, budget_s=case["budget_s"])]
    measured = statistics.median(trainer.train(case, steps=case["steps"] + 1)[1:])
    calibrated += [calibrate(recipe, None, low_precision=low_precision, budget_s=case["budget_s"])]
    count = case.get("accumulation", 1)
    # One rank sends nothing.
    alone = Spread(ranks=1, accumulation=count, bytes_per_s=1.0)
    seconds = [step_seconds(recipe, trainer.config, costs, alone) for costs in calibrated]
    tokens = recipe.batch.global_batch_tokens
    return {"predicted": tokens / statistics.mean(seconds), "measured": tokens / measured}


def run(case: dict[str, Any], measurement: str) -> dict[str, float]:
    """The case in processes of its own; the figures of the rank that held most."""
    from pretrain.distributed.rendezvous import free_port

    ranks, repository = case.get("ranks", 1), Path(__file__).resolve().parents[2]
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "PYTHONPATH": str(repository),
    }
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= RETURN_FREED if measurement == "memory" and not case.get("keep_freed") else {}
    command = [
        sys.executable,
        __file__,
        "--child",
        json.dumps({**case, "measurement": measurement}),
    ]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{case}: a rank failed")
    return max(
        (json.loads(output.splitlines()[-1]) for output in outputs),
        key=lambda figures: figures["measured"],
    )


def named(case: dict[str, Any]) -> str:
    """A case as the table has it."""
    told = {key: value for key, value in case.items() if SHAPE.get(key) != value}
    return ", ".join(f"{key} {value}" for key, value in told.items()) or "fp32"


def table(measurement: str, selected: Sequence[dict[str, Any]], unit: float) -> list[float]:
    """Print one line a case as it ends; the ratios."""
    print(f"\n| {measurement} | predicted | measured | ratio |\n|---|---:|---:|---:|", flush=True)
    ratios = []
    for case in selected:
        figures = run(case, measurement)
        ratios.append(figures["predicted"] / figures["measured"])
        columns = (
            f"{figures['predicted'] / unit:,.1f} | {figures['measured'] / unit:,.1f} | "
            f"{ratios[-1]:.2f}"
        )
        print(f"| {named(case)} | {columns} |", flush=True)
    return ratios


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """The command; returns the ratios of memory, predicted to measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one small case for memory, one for speed"
    )
    parser.add_argument("--memory-only", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.child:
        case = json.loads(flags.child)
        figures = measure_memory(case) if case["measurement"] == "memory" else measure_speed(case)
        print(f"\n{json.dumps(figures)}", flush=True)
        os._exit(0)  # nothing is left to say, and ranks need not wait for each other
    small = {**SHAPE, "width": 256, "windows": 8, "vocab": 1024, "engine": "zero2_fp32"}
    ratios = table("memory", [small] if flags.quick else cases(), 1e6)
    if not flags.memory_only:
        timing = {"steps": 1, "budget_s": 0.5} if flags.quick else {"steps": 5, "budget_s": 6.0}
        speed = [
            {**SHAPE, **timing, "engine": engine, "mode": mode}
            for engine in ("zero2_fp32", "zero2_bf16")
            for mode in MODES
        ]
        speed += [{**SHAPE, **timing, "engine": "zero2_fp32", "accumulation": 3, "vocab": 16_384}]
        table("tokens/s", [{**small, **timing}] if flags.quick else speed, 1.0)
    if not flags.quick:
        kept = [{**SHAPE, "engine": "zero2_fp32", "mode": mode, "keep_freed": 1} for mode in MODES]
        table("memory", kept, 1e6)
    return ratios


if __name__ == "__main__":
    main()

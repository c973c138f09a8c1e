"""Hand-made manifests and steps: what a run would say, of a run that there is not."""

from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.manifest import AboutData, CheckpointManifest
from pretrain.data.batches import rows_of
from pretrain.metrics.step_record import StepRecord

if TYPE_CHECKING:
    from pretrain.engine.engine import Engine


def manifest_of(step: int, parameters: dict[str, list[int]], **changes: Any) -> CheckpointManifest:
    """The manifest of a checkpoint of these parameters' shapes, without its files."""
    fields: dict[str, Any] = {
        "optimizer_step": 1,
        "seed": 1,
        "fingerprint": "0" * 32,
        "data_dir": "",
        "data": AboutData(eos_id=0, sources=[]),
        "recipe": {},
        "deepspeed": {},
        "model_config": {},
    }
    return CheckpointManifest(step=step, parameters=parameters, **{**fields, **changes})


def rows_of_rank(engine: "Engine") -> list[slice]:
    """Which rows of a global batch an engine's rank takes in each micro-step."""
    size = engine.recipe.batch.micro_batch_size
    return [rows_of(i, size, engine.world) for i in range(engine.accumulation_steps)]


def trained_step(step: int, loss: float = 1.0) -> StepRecord:
    """The record of a step of 192 tokens in half a second."""
    return StepRecord(
        step=step,
        loss=loss,
        gradient_norm=0.5,
        learning_rate=1e-3,
        tokens=(step + 1) * 192,
        tokens_per_s=384.0,
        tokens_per_s_per_rank=384.0,
        step_s=0.5,
        seconds={"data": 0.1, "forward": 0.1, "backward": 0.1, "optimizer": 0.1, "other": 0.1},
        peak_memory_bytes=10**6,
        slowest=None,
    )

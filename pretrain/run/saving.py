"""What a run saves: its state with all that must be the same to go on from it, and what is done
around it.
"""

from pathlib import Path

from data_prep.manifest import Manifest
from pretrain.checkpoint.manifest import AboutData, CheckpointManifest
from pretrain.checkpoint.saving import Callback
from pretrain.checkpoint.writer import AroundSaves, CheckpointWriter
from pretrain.config.load import recipe_to_dict
from pretrain.engine.engine import Engine
from pretrain.metrics.metrics_file import flush_metrics
from pretrain.run.bad_steps import BadSteps
from pretrain.run.exports.exporter import Exporter
from pretrain.run.prepare import Run, of_source
from pretrain.run.state import write_state


def save(
    run: Run, engine: Engine, bad_steps: BadSteps, writer: CheckpointWriter, step: int
) -> None:
    """Have a checkpoint made after `step` steps.

    After a bad step none is dropped for it: whether training diverged, only the next steps will
    tell.
    """
    # Views of this rank's fp32 state; the writer copies them before the next step changes them.
    fragments, optimizer_step = engine.read_state()
    data = run.reader.manifest
    manifest = CheckpointManifest(
        step=step,
        optimizer_step=optimizer_step,
        seed=run.recipe.seed,
        fingerprint=data.fingerprint,
        data_dir=str(run.data_dir.resolve()),
        data=about_data(data),
        skips=bad_steps.skips_before(step),
        recent_steps=tuple(bad_steps.recent),
        recipe=recipe_to_dict(run.recipe),
        deepspeed=run.engine_config,
        model_config=run.model_config.to_diff_dict(),
        parameters=engine.parameter_shapes(),
        stages=run.stages if len(run.stages) > 1 else (),
    )
    writer.save(fragments, manifest, prunes=not bad_steps.replayed(step - 1))


def about_data(manifest: Manifest) -> AboutData:
    """What an export must know of the data set."""
    return AboutData(
        eos_id=manifest.eos_id,
        tokenizer_sha256=manifest.tokenizer_sha256,
        sources=[of_source(source) for source in manifest.sources],
        loss=str(manifest.loss) if manifest.loss else None,
    )


def around_saves(
    run_dir: Path,
    failed: Callback = None,
    wrote_block: Callback = None,
    exporter: Exporter | None = None,
) -> AroundSaves:
    """What a run does around a save: its lines of metrics are made durable before, and state.json
    and the exporter, if there is one, hear of it after. `failed` and `wrote_block` are passed on.
    """

    def before() -> None:
        flush_metrics(run_dir)

    def saved(step: int) -> None:
        write_state(run_dir, saved_step=step)
        if exporter:
            exporter.saved(step)

    return AroundSaves(
        before=before,
        saved=saved,
        wrote_block=wrote_block,
        failed=failed,
        in_use=exporter.in_use if exporter else frozenset,
    )

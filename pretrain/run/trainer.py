"""The trainer: takes a run from a step to its end, a record for every step."""

import time
from dataclasses import dataclass, replace

from data_prep.errors import UserError
from pretrain.checkpoint.find import newest_good
from pretrain.checkpoint.layout import checkpoints_dir, naming_the_disk
from pretrain.checkpoint.writer import CheckpointWriter
from pretrain.config.schedule import rate_of
from pretrain.data.batches import Prefetch, StepBatches, validation_batches, windows_to_validate
from pretrain.data.text_size import bytes_per_token
from pretrain.distributed.agree import inform, say, together
from pretrain.engine.clock import PAUSE
from pretrain.engine.engine import Engine
from pretrain.engine.figures import StepFigures, finite
from pretrain.engine.profiler import StepProfiler
from pretrain.metrics.metrics_file import MetricsFile
from pretrain.metrics.sinks import Sinks
from pretrain.metrics.step_record import AnyStep, Sample, SkippedStep, StepRecord
from pretrain.metrics.utilisation import Utilisation
from pretrain.model.compilation import compiled_graphs
from pretrain.model.token_codes import check_same_code
from pretrain.run.bad_steps import BadSteps, Decision, describe_rows
from pretrain.run.continuing import refuse_another_run
from pretrain.run.prepare import Run, about_run, sample_writer
from pretrain.run.saving import save
from pretrain.run.starts import read_starts, record_start
from pretrain.run.state import read_state
from pretrain.view.block import About
from pretrain.view.progress import Progress
from pretrain.view.time_left import TimeLeft
from pretrain.watch.watch import Watch

# What sinks have yet to draw is waited for so long after the last step of a start; after a signal,
# whose sender waits no longer than a minute or so, less.
SINKS_PATIENCE_S = 60.0
SINKS_PATIENCE_AFTER_SIGNAL_S = 10.0


@dataclass(kw_only=True)
class Trainer:
    """Trains a run from `start_step` on. All ranks make one, and call it alike."""

    run: Run
    engine: Engine
    bad_steps: BadSteps
    watch: Watch
    writer: CheckpointWriter
    start_step: int

    def __post_init__(self) -> None:
        run = self.run
        engine = self.engine
        self.world = engine.world
        on_gpu = engine.device.type == "cuda"
        self.batches = StepBatches(
            run.loader,
            run.recipe,
            self.world,
            pinned=on_gpu,
            samples_before=run.stage.samples_before,
        )
        self.prefetch = Prefetch(self.batches.of_step, run.stop_at_step)
        self.utilisation = Utilisation(run.recipe, engine.device, engine.dtype, self.world)
        self.samples = sample_writer(run, engine.module.model, self.world)
        self.metrics: MetricsFile | None = None  # on rank 0, while it trains
        self.graphs = 0  # that compiled blocks have so far

    def fit(self) -> int:
        """Train to the run's end, to where it is to stop, or to a signal; returns how many steps
        of the run are done then. Raises UserError on all ranks where a bad step stops it.
        """
        with self._begin() as progress:
            step = self.start_step
            while step < self.run.stop_at_step and not self.engine.ends:
                record = self._step(step)
                if self._calls_for_rewind(record):
                    # The same steps follow, without this one: it is replayed from its decision.
                    step = self._rewind(step)
                    continue
                self._warn_of_compilation(step)
                record = self._validate(record, progress)
                self._show(record, progress)
                self._record(record)
                self._save(step, progress)
                step += 1
            self.writer.wait()  # so that the last checkpoint is seen, too
        self.prefetch.close()
        self._close_metrics()
        self._close_sinks(step)
        return step

    def _begin(self) -> Progress:
        """Note the start, and say on what it trains."""
        run = self.run
        self._leave_passed_over(self.start_step)
        self._open_metrics(self.start_step)
        # From here on this start counts as one that trains: launch/pretrain.sh asks for its line.
        warnings = together(
            lambda: record_start(
                run.run_dir, self.start_step, run.command, self.world, self.engine.device
            )
        )
        for warning in warnings:
            say(self.world, warning)
        self.sinks = self._open_sinks()
        inform(self.world, str(self.utilisation))
        validated = windows_to_validate(run.validation, run.recipe) * run.recipe.model.seq_len
        self.profiler = StepProfiler(
            run.profile_steps if self.world.is_main else 0,
            range(self.start_step, run.stop_at_step),
            run.run_dir / "profile",
            lambda text: say(self.world, text),
        )
        together(lambda: self.writer.begin_with(self.start_step) if self.world.is_main else None)
        self.engine.clock.mark(PAUSE)  # setting up is part of no step
        about = About(
            name=str(run.run_dir),
            newest_save=lambda: self.writer.newest,
            bytes_per_token=bytes_per_token(run.reader.manifest),
        )
        return Progress(TimeLeft(run.recipe, validated), self.start_step, self.world, about)

    # A step

    def _step(self, step: int) -> AnyStep:
        """Train a step, unless it is a bad one or was found to be one before; says so then."""
        self.profiler.before(step)
        decision = self.bad_steps.replayed(step)
        record = self._skipped(decision) if decision else self.train_step(step)
        self.profiler.after(step)
        if isinstance(record, SkippedStep):
            as_recorded = "" if record.is_new else ", as recorded"
            say(self.world, f"step {step} is skipped{as_recorded}: {record.skipped}")
        return record

    def train_step(self, step: int) -> AnyStep:
        """Train one step; its record says so, or that it was refused. Raises UserError on all ranks
        where a bad step is to stop the run.
        """
        own_batches = self.prefetch.take(step)
        self.engine.clock.mark("data")
        rate = rate_of(self.run.recipe, step)
        figures = self.engine.train_step(own_batches, rate)
        if figures.refused:
            # The weights are still those from before the step, so its rows can be told apart.
            decision = self._refuse(step, figures, self.engine.row_nats(own_batches))
            return replace(self._skipped(decision), is_new=True)
        seconds = sum(figures.own.seconds.values())
        tokens_per_s = self.run.recipe.batch.global_batch_tokens / seconds
        return StepRecord(
            step=step,
            loss=figures.loss,
            gradient_norm=figures.gradient_norm,
            learning_rate=rate,
            tokens=self._tokens(step),
            tokens_per_s=tokens_per_s,
            tokens_per_s_per_rank=tokens_per_s / self.world.world_size,
            step_s=seconds,
            seconds=figures.own.seconds,
            peak_memory_bytes=figures.own.peak_memory_bytes,
            slowest=figures.slowest,
            mfu=self.utilisation.mfu(tokens_per_s),
            mfu_of_matmul=self.utilisation.mfu_of_matmul(tokens_per_s),
        )

    def _tokens(self, step: int) -> int:
        """How many tokens were seen by the end of a step."""
        return (step + 1) * self.run.recipe.batch.global_batch_tokens

    def _skipped(self, decision: Decision) -> SkippedStep:
        """The record of a step that is not trained, from the decision on it alone: the same
        whenever the run comes to it.
        """
        return SkippedStep(
            step=decision.step,
            loss=decision.loss,
            gradient_norm=decision.gradient_norm,
            learning_rate=rate_of(self.run.recipe, decision.step),
            tokens=self._tokens(decision.step),
            skipped=decision.reason,
        )

    def _refuse(self, step: int, figures: StepFigures, row_nats: list[float]) -> Decision:
        """Decide on a bad step and record it. Raises UserError where the run is to stop."""
        run = self.run
        decision = Decision(
            step=step,
            reason=figures.refused or "",
            policy=self.bad_steps.decide(step),
            loss=finite(figures.loss),
            gradient_norm=finite(figures.gradient_norm),
        )
        samples = self.batches.samples_of(step)
        self.bad_steps.record(decision, describe_rows(run.loader, run.reader, samples, row_nats))
        if decision.policy != "stop":
            return decision
        stopped = (
            f"step {step}: {decision.reason}; nothing of it reached the weights; "
            f"{self.bad_steps.path} has its rows"
        )
        if run.recipe.bad_steps.policy == "stop":
            raise UserError(
                f"{stopped}; with --bad_steps.policy=skip the same command goes on without it"
            )
        raise UserError(
            f"{stopped}. All {run.recipe.bad_steps.max_in_a_row} steps before it were bad too: "
            "training diverged. Start a new run with a lower optimizer.peak_learning_rate or a "
            "longer warm-up"
        )

    def _warn_of_compilation(self, step: int) -> None:
        graphs = compiled_graphs()
        if step > self.start_step and graphs > self.graphs:
            say(
                self.world,
                f"warning: step {step} compiled its blocks again, which takes time; the first step "
                "should do",
            )
        self.graphs = graphs

    # After a step

    def _is_due(self, step: int, every: int) -> bool:
        """Whether something that happens every N steps, and at the end, happens after this step."""
        return (step + 1) % every == 0 or step + 1 == self.run.stop_at_step

    def _validate(self, record: AnyStep, progress: Progress) -> AnyStep:
        """The record with its validation, where one is due."""
        run = self.run
        self.engine.clock.mark("other")  # what follows is no part of the step
        if not self._is_due(record.step, run.recipe.validation.every_steps):
            return record
        count, batches = validation_batches(run.validation, run.recipe, self.world)
        with progress.time_left.during("validation"):
            val_loss = self.engine.mean_nats(progress.validating(batches, count))
            samples = self._write_samples()
        self.engine.clock.mark(PAUSE)
        return replace(record, val_loss=val_loss, samples=samples)

    def _write_samples(self) -> tuple[Sample, ...]:
        """What the model makes of the recipe's prompts by now; none where it has none."""
        if self.samples is None:
            return ()
        # Each token is a sign of life for the watch, as each batch of a validation is.
        return self.samples.write(lambda: self.engine.clock.mark(PAUSE))

    def _show(self, record: AnyStep, progress: Progress) -> None:
        progress.show(record)
        if isinstance(record, StepRecord):
            self.watch.step_seconds.append(record.step_s)

    def _record(self, record: AnyStep) -> None:
        if self.metrics:
            self.metrics.append(record)
            self.sinks.add(record)  # which find in the file what they were not told in time

    def _save(self, step: int, progress: Progress) -> None:
        """Have a checkpoint made where it is due; between steps, none that would hold the state of
        the one before it.
        """
        recipe = self.run.recipe.checkpoints
        began = time.monotonic()
        self.engine.clock.mark("other")
        # `ends` is the same on all ranks, who learnt of it in the exchange of this step.
        is_end = bool(self.engine.ends) or step + 1 == self.run.stop_at_step
        if not is_end and not self._is_due(step, recipe.every_steps):
            return
        since_last = range(step + 1 - recipe.every_steps, step + 1)
        if is_end or not self.bad_steps.all_bad(since_last):
            save(self.run, self.engine, self.bad_steps, self.writer, step + 1)
            # What training waited for: the copy of its state, and the save before, if it went on.
            progress.time_left.pause_s["save"] = time.monotonic() - began
        self.engine.clock.mark(PAUSE)

    # Going back

    def _calls_for_rewind(self, record: AnyStep) -> bool:
        """Whether this step was found bad just now, and the run goes back for it."""
        is_new = isinstance(record, SkippedStep) and record.is_new
        return is_new and self.run.recipe.bad_steps.policy == "rewind"

    def _rewind(self, step: int) -> int:
        """Go back to the newest checkpoint; the step to go on with."""
        say(self.world, f"rewinding from step {step}")
        self.watch.step_seconds.clear()  # loading takes as long as at the start
        self.writer.wait()  # a save under way may be the one to go back to
        step = restore(self.run, self.engine, self.bad_steps)
        self._leave_passed_over(step)
        self._close_metrics()
        self._open_metrics(step)
        self.sinks.go_back(step)
        return step

    def _leave_passed_over(self, step: int) -> None:
        """Have checkpoints that were passed over for the one of a step stay, without counting; said
        once of each.
        """
        names = together(lambda: self.writer.pass_over_newer(step) if self.world.is_main else [])
        home = checkpoints_dir(self.run.run_dir)
        for name in names:
            say(
                self.world,
                f"{home / name}: left where it is, and not counted by checkpoints.keep_last, until "
                "its step is saved anew",
            )

    def _open_metrics(self, step: int) -> None:
        """Open the file for the lines from a step on, on rank 0; says what is lost of it."""
        self.metrics = together(lambda: self._cut_metrics(step) if self.world.is_main else None)

    def _cut_metrics(self, step: int) -> MetricsFile:
        with naming_the_disk(self.run.run_dir):
            metrics = MetricsFile(self.run.run_dir, step)
        if metrics.cut:
            say(self.world, f"warning: {metrics.cut}")
        if metrics.lacks:
            say(
                self.world,
                f"warning: {metrics.path} lacks {metrics.lacks} of the lines of the {step} steps "
                "so far",
            )
        return metrics

    def _close_metrics(self) -> None:
        if self.metrics:
            self.metrics.close()

    # Sinks

    def _open_sinks(self) -> Sinks:
        """The sinks that the recipe names, which are told all from rank 0; none elsewhere."""
        run = self.run
        names = run.recipe.log.sinks if self.world.is_main else ()
        about = about_run(run) if names else None
        return Sinks(names, about, self.start_step, lambda text: say(self.world, text))

    def _close_sinks(self, steps: int) -> None:
        ends_by_signal = bool(self.engine.ends)
        patience_s = SINKS_PATIENCE_AFTER_SIGNAL_S if ends_by_signal else SINKS_PATIENCE_S
        self.sinks.close(steps, patience_s)


def restore(run: Run, engine: Engine, bad_steps: BadSteps) -> int:
    """Load the newest good checkpoint, if any, on all ranks; returns the step to go on with.

    Raises UserError where one was saved and none is good, or the newest is another run's.
    """
    world = engine.world
    checkpoint, passed_over = newest_good(run.run_dir, world)
    for line in passed_over:
        say(world, line)
    bad_steps.restore(checkpoint.manifest if checkpoint else None)
    if checkpoint is None:
        saved_step = together(lambda: read_state(run.run_dir)).saved_step
        if saved_step is not None:
            raise UserError(
                f"{run.run_dir}: step {saved_step} was saved, but no good checkpoint is left; "
                "restore one, or start again with another --run-dir"
            )
        if world.is_main and read_starts(run.run_dir):
            inform(world, f"{run.run_dir}: no checkpoint yet: begins again from step 0")
        return 0
    refuse_another_run(run.run_dir, checkpoint, run.identity)
    if checkpoint.shapes != engine.parameter_shapes():
        raise UserError(
            f"{checkpoint.path}: holds another model's parameters; give another --run-dir"
        )
    check_same_code(run.model_config, checkpoint)
    together(lambda: engine.write_state(checkpoint))
    inform(world, f"continuing from {checkpoint.path}")
    return checkpoint.step

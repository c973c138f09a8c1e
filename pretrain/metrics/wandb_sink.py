"""W&B: a run of project "tablefree", or `WANDB_PROJECT`; offline with `WANDB_MODE=offline`.

    RUN_DIR/wandb/        what W&B keeps
    RUN_DIR/wandb.json    the id of the run that draws this one

W&B takes no step back, and offline it goes on in no run. So each start that goes on begins a new
one, which has all steps and whose config names the one before; they are in one group. Its key is
W&B's own affair (`WANDB_API_KEY`, `wandb login`): it is never asked for here, nor passed on.
"""

import os
import secrets
from dataclasses import replace

import wandb

from pretrain.metrics.run_note import RunNote, read_note, write_note
from pretrain.metrics.told import AboutRun, ToldStep

PROJECT = "tablefree"
NOTE_NAME = "wandb.json"


class WandbSink:
    """A run as W&B draws it."""

    def __init__(self, about: AboutRun) -> None:
        self.about = about
        self.note = about.run_dir / NOTE_NAME
        # Silent, it asks nobody for a key, which a terminal would have it do amid training.
        wandb.setup(settings=wandb.Settings(silent=True))

    def holds(self, steps: int) -> bool:
        """Whether the run of the start before was closed with so many."""
        before = read_note(self.note)
        return before is not None and before.steps == steps

    def begin(self, step: int) -> int:
        """Begin a run, whose first step is the run's first. Raises what W&B does."""
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        before = read_note(self.note) if step else None
        run_id = secrets.token_hex(4)
        name = self.about.name
        config = self.about.config
        if before:
            # It has all steps: those before are drawn anew.
            name = f"{name}, drawn anew at step {step}"
            config = config | {"continues": before.run}
        self.begun = RunNote(project=project, run=run_id)
        self.steps = 0
        self.run = wandb.init(
            project=project,
            dir=self.about.run_dir,
            id=run_id,
            name=name,
            group=self.about.name,
            config=config,
            resume="never",
            settings=quiet_settings(),
        )
        return 0

    def write(self, told: ToldStep) -> None:
        """Hand over a step, with its texts. Until the first one the note names the run before: one
        that a kill left empty continues nothing, and nothing continues it.
        """
        if self.steps == 0:
            write_note(self.note, self.begun)
        row: dict[str, float | str] = {**told.figures, **told.texts}
        self.run.log(row, step=told.step, commit=True)
        self.steps = told.step + 1

    def close(self) -> None:
        """Have W&B write or send what it holds back."""
        self.run.finish()
        write_note(self.note, replace(self.begun, steps=self.steps))


def quiet_settings() -> wandb.Settings:
    """What is told is told by us: nothing of the console, code, command line, host or machine."""
    return wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        host="not told",
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,
    )

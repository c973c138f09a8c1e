"""What a run generated while it trained, as the page shows it: few enough steps for its size."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import escape

from data_prep.errors import printable
from pretrain.metrics.step_columns import SampledStep
from pretrain.metrics.step_record import Sample
from pretrain.reporting.reported_run import ReportedRun
from pretrain.reporting.words import SampledRun, Section, ShownSample, ShownStep, figure

MOST_BYTES = 400_000  # of the page, for the samples of all runs
MOST_PROMPT = 400  # characters that are shown
MOST_TEXT = 1_000
MOST_PRINTED = 4  # steps that stand there on paper, and where no script runs


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes of the page that a run's samples may take."""

    of_run: int
    of_step: int


def samples_section(runs: Sequence[ReportedRun]) -> Section:
    """The samples of each run that has some."""
    sampled = [run for run in runs if run.steps.sampled]
    share = MOST_BYTES // max(1, len(sampled))
    budget = Budget(of_run=share, of_step=share // 2)
    return Section(title="Samples", sampled=[shown_run(run, budget) for run in sampled])


def shown_run(run: ReportedRun, budget: Budget) -> SampledRun:
    """As many of a run's steps as its share of the page holds, evenly, the last one too."""
    steps = run.steps.sampled
    shown = [shown_samples(step, budget) for step in steps]
    largest = max(sum(map(size_of, samples)) for samples in shown)
    most = max(2, budget.of_run // max(1, largest))
    chosen = evenly(len(steps), most)
    printed = {chosen[place] for place in evenly(len(chosen), MOST_PRINTED)}
    shown_steps = []
    for place in chosen:
        words = f"after step {steps[place].step + 1:,}"
        own = ShownStep(words=words, samples=shown[place], is_printed=place in printed)
        shown_steps.append(own)
    return SampledRun(
        name=run.name,
        steps=shown_steps,
        note=note_on(run, chosen, shown),
    )


def note_on(run: ReportedRun, chosen: Sequence[int], shown: Sequence[Sequence[ShownSample]]) -> str:
    """What is left out, if anything is."""
    lines = []
    if len(chosen) < run.steps.all_sampled:
        lines.append(
            f"{len(chosen)} of {run.steps.all_sampled:,} steps that have samples, evenly chosen."
        )
    prompts = len(run.steps.sampled[-1].samples)
    of_last = len(shown[-1])
    if of_last < prompts:
        lines.append(f"The first {of_last} of {prompts} prompts.")
    return " ".join(lines)


def evenly(count: int, most: int) -> list[int]:
    """Places of at most so many of `count` things, evenly spread, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [place * (count - 1) // (most - 1) for place in range(most)]


def shown_samples(step: SampledStep, budget: Budget) -> list[ShownSample]:
    """The samples of a step that fit, the first one always."""
    shown: list[ShownSample] = []
    spent = 0
    for sample in step.samples:
        own = shown_sample(sample)
        spent += size_of(own)
        if shown and spent > budget.of_step:
            break
        shown.append(own)
    return shown


def shown_sample(sample: Sample) -> ShownSample:
    """A sample's texts, cut where they are long."""
    return ShownSample(
        prompt=cut(sample.prompt, MOST_PROMPT),
        text=cut(sample.text, MOST_TEXT),
        bits_per_byte=figure(sample.bits_per_byte, ".3f"),
    )


def cut(text: str, most: int) -> str:
    """The beginning of a text, what a browser would obey spelled out."""
    shown = printable(text[:most])
    return f"{shown}…" if len(text) > most else shown


def size_of(sample: ShownSample) -> int:
    """Bytes that a sample takes on the page, where signs of markup are spelled out."""
    return len(escape(sample.prompt + sample.text).encode())

"""Columns of steps, and groups of them: of what is drawn of a run, no extreme is lost."""

import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.written_runs import falling_steps, skipped_step

from pretrain.metrics.metrics_file import METRICS_NAME, read_steps
from pretrain.metrics.step_columns import (
    Floats,
    Groups,
    StepColumns,
    columns_of,
    extremes,
    read_columns,
)
from pretrain.metrics.step_record import StepRecord

HERE = Path("metrics.jsonl")


def columns_with(losses: list[float]) -> StepColumns:
    """The columns of a run whose losses these are."""
    steps = columns_of(falling_steps(len(losses)), HERE)
    table = steps.table.copy()
    table[:, 2] = losses
    return StepColumns(table=table)


def test_columns_are_the_figures_of_the_records(tmp_path: Path) -> None:
    records = [*falling_steps(20), skipped_step(20, "loss nan"), *falling_steps(30)]
    del records[21:42]  # so that steps go on from 21
    with (tmp_path / METRICS_NAME).open("w") as file:
        file.writelines(json.dumps(record.to_line()) + "\n" for record in records)
    columns = read_columns(tmp_path)
    assert read_steps(tmp_path) == records
    assert len(columns) == 30
    assert columns.missing == 0
    assert columns.column("loss")[3] == records[3].loss
    assert np.isnan(columns.column("loss")[20])
    assert columns.column("tokens")[20] == records[20].tokens
    assert [step.step for step in columns.skipped] == [20]
    seconds = sum(record.step_s for record in records if isinstance(record, StepRecord))
    assert np.isclose(columns.seconds_so_far()[-1], seconds)
    assert np.isclose(columns.gpu_seconds(), 2 * seconds)


LOSSES = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(float("nan"))), min_size=1, max_size=60)


@given(losses=LOSSES, size=st.integers(1, 25))
def test_groups_keep_the_least_the_greatest_and_the_mean(losses: list[float], size: int) -> None:
    groups = Groups(steps=columns_with(losses), size=size)
    values = np.array(losses)
    parts: list[Floats] = [values[i : i + size] for i in range(0, len(values), size)]
    assert len(groups.starts) == len(parts)
    for number, part in enumerate(parts):
        known = part[~np.isnan(part)]
        mean = groups.mean(values)[number]
        if len(known) == 0:
            assert np.isnan(mean)
            assert np.isnan(groups.least(values)[number])
            continue
        assert groups.least(values)[number] == known.min()
        assert groups.most(values)[number] == known.max()
        assert np.isclose(mean, known.mean(), atol=1e-6)
    assert groups.last(values).tolist()[-1:] == values[-1:].tolist() or np.isnan(values[-1])


@given(losses=LOSSES, most=st.integers(4, 30))
def test_few_points_hold_the_first_the_last_and_the_extremes(
    losses: list[float], most: int
) -> None:
    values = np.array(losses)
    rows = extremes(values, most).tolist()
    known = np.flatnonzero(~np.isnan(values)).tolist()
    assert len(rows) <= max(most, 4)
    assert rows == sorted(set(rows))
    assert set(rows) <= set(known)
    if known:
        assert rows[0] == known[0]
        assert rows[-1] == known[-1]
        assert values[rows].max() == np.nanmax(values)
        assert values[rows].min() == np.nanmin(values)

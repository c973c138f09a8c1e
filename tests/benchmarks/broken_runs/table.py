"""What is printed at the end: a table of the faults, and a sentence for each leg."""

import statistics
from collections.abc import Sequence

from broken_runs.attempt import LOADING, SAVE, STEP
from broken_runs.leg import DISK, FLIP, ONE, RANKS, WHOLE, Leg, Record
from pretrain.checkpoint.reader import Checkpoint

HEAD = (
    "| fault | moment | count | steps lost, median / most | all ended after s, median / most "
    "| ended by the runner as a launcher would | unreadable states |",
    "|---|---|---:|---:|---:|---:|---:|",
)


def median_and_most(values: Sequence[float], digits: int) -> str:
    """Both, in so many digits."""
    return f"{statistics.median(values):.{digits}f} / {max(values):.{digits}f}"


def helped_and_unreadable(records: Sequence[Record]) -> str:
    """The last two columns: how often of all."""
    helped = sum(record.fault.ended_by_launcher for record in records)
    unreadable = sum(record.unreadable for record in records)
    return f"{helped} | {unreadable}"


def table(records: Sequence[Record]) -> str:
    """A row for every kind of fault and moment that there was, and one for all."""
    rows = [*HEAD]
    for kind in (WHOLE, ONE, FLIP, DISK, RANKS):
        for moment in (LOADING, STEP, SAVE):
            those = [
                record
                for record in records
                if record.fault.kind == kind and record.fault.moment == moment
            ]
            if not those:
                continue
            lost = median_and_most([record.lost for record in those], 0)
            seconds = median_and_most([record.fault.seconds for record in those], 2)
            rows.append(
                f"| {kind} | {moment} | {len(those)} | {lost} | {seconds} "
                f"| {helped_and_unreadable(those)} |"
            )
    return "\n".join([*rows, f"| all | | {len(records)} | | | {helped_and_unreadable(records)} |"])


def sentence(leg: Leg, expected: Checkpoint) -> str:
    """What a leg showed."""
    said = f"{leg.name}: {leg.starts} starts, {len(leg.seen)} steps, {leg.replayed} trained again; "
    if leg.relative:
        said += (
            f"losses within {leg.worst:.1e} relative of the unbroken run's "
            f"(at most {leg.relative:g})"
        )
    else:
        same = "are bitwise" if not leg.problems else "are NOT all"
        said += (
            f"every step's figures, and all {len(expected.shapes)} parameters, exp_avg and "
            f"exp_avg_sq at the end, {same} those of the unbroken run"
        )
    return said + f"; {len(leg.problems)} problems."


def summary(legs: list[Leg], expected: Checkpoint, skipped: list[str]) -> str:
    """What follows the table."""
    faults = [record.fault for leg in legs for record in leg.records]
    kills = [fault for fault in faults if fault.kind in (WHOLE, ONE)]
    lines = []
    if kills:
        within = sum(fault.moment == SAVE for fault in kills)
        share = within / len(kills)
        lines.append(f"{within} of {len(kills)} kills ({share:.0%}) fell within a save.")
    lines += [sentence(leg, expected) for leg in legs]
    return "\n".join([*lines, *skipped])

"""The three legs: kills and flips to the end of the run, a small disk, other numbers of ranks."""

import time
from pathlib import Path

from broken_runs.attempt import LOADING, SAVE, STEP, Attempt
from broken_runs.faults import fill_disk, kill_one, kill_whole, resize
from broken_runs.leg import DISK, FLIP, ONE, RANKS, WHOLE, Fault, Leg

SAVES_SHARE = 0.45  # of the kills are to fall within saves, as long as fewer did


def next_moment(leg: Leg) -> str:
    """A kind of moment: more in saves as long as too few fell there."""
    kills = [record.fault for record in leg.records if record.fault.kind in (WHOLE, ONE)]
    within = sum(fault.moment == SAVE for fault in kills)
    if within < SAVES_SHARE * (len(kills) + 1):
        return SAVE
    return leg.sample.choice([STEP, STEP, LOADING])


def next_step(leg: Leg, left: int, every: int) -> int:
    """Up to which step the next start may go before it is struck: so that what is left finds
    place.
    """
    room = len(leg.reference) - 2 * every - 1 - leg.done
    drawn = int(leg.sample.uniform(0, 2 * room / (left + 1)))
    return leg.done + max(0, min(room, drawn))


def leg_of_kills(leg: Leg, kills: int, flips: int, every: int) -> None:
    """The run with all its kills and flips, to its end."""
    faults = [WHOLE if i % 2 == 0 else ONE for i in range(kills)] + [FLIP] * flips
    leg.sample.shuffle(faults)
    while faults:
        kind = faults[-1]
        attempt = leg.start()
        moment = STEP if kind == FLIP else next_moment(leg)
        step = next_step(leg, len(faults), every)
        if kind == FLIP:
            attempt.until(lambda: len(leg.good_checkpoints()) > 1)
        if not attempt.until_moment(moment, step, leg.sample):
            if leg.end(attempt):
                leg.problem(f"was done before its last {len(faults)} faults")
            return
        if strike(leg, attempt, kind):
            faults.pop()
    leg.end(leg.start())


def strike(leg: Leg, attempt: Attempt, kind: str) -> bool:
    """Have the fault strike; False if another had to be put in its place."""
    if kind == ONE:
        if kill_one(leg, attempt) is not None:
            return True
        kill_whole(leg, attempt)
        return False
    if kind == FLIP and len(leg.good_checkpoints()) < 2:
        kill_whole(leg, attempt, note="(in place of a flip: one checkpoint alone)")
        return False
    kill_whole(leg, attempt, kind)
    return True


def leg_on_small_disk(leg: Leg, full: int, every: int, mount: Path, size: int) -> None:
    """The first part of the run on a disk that is full during so many saves."""
    while full:
        attempt = leg.start()
        if not attempt.until_step(leg.done + leg.sample.randrange(1, every)):
            leg.end(attempt)
            leg.problem(f"was done before its last {full} full disks")
            return
        while attempt.until(attempt.is_saving):
            began = time.monotonic()
            if fill_disk(leg, attempt, mount):
                break
            resize(mount, size)
            attempt.until(attempt.has_saved)
        if attempt.job.ended_well():
            continue  # every save was faster: once more, from what it left
        if "No space left on device" not in attempt.job.said():
            leg.problem(f"ended on a full disk, and does not say so:\n{attempt.last_words()}")
        seconds = time.monotonic() - began
        leg.note_published()
        leg.record(attempt, Fault(kind=DISK, moment=SAVE, seconds=seconds))
        resize(mount, size)
        full -= 1
    leg.end(leg.start())


def leg_of_world_sizes(leg: Leg, sizes: list[int], every: int) -> None:
    """The first part of the run, killed and started on another number of ranks again and again."""
    for number, ranks in enumerate(sizes[:-1]):
        changes_left = len(sizes) - 1 - number
        leg.ranks = ranks
        attempt = leg.start()
        step = next_step(leg, changes_left, every)
        moment = leg.sample.choice([STEP, SAVE])
        if not attempt.until_moment(moment, max(step, every), leg.sample):
            leg.end(attempt)
            leg.problem(f"was done before its last {changes_left} changes")
            return
        kill_whole(leg, attempt, RANKS, f"({ranks} -> {sizes[number + 1]} ranks)")
    leg.ranks = sizes[-1]
    leg.end(leg.start())

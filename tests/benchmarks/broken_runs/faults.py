"""The faults: kills, flipped bits, and a disk that fills up."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
from support.waiting import came_true

from broken_runs.attempt import Attempt
from broken_runs.jobs import POLL_S, exists, kill_job, send
from broken_runs.leg import FLIP, ONE, WHOLE, Fault, Leg, Record, step_of
from pretrain.checkpoint.find import newest_good
from pretrain.checkpoint.layout import saved_steps

SURVIVORS_S = 15.0  # in which all ranks end when one was killed
FULL_DISK_S = 60.0  # in which a run ends, or goes on, when its disk is full
STOPPED_S = 0.02  # a thread that is told to stop does once it has left the kernel
BLOCK_BYTES = 4096  # of the disk in memory


def kill_whole(leg: Leg, attempt: Attempt, kind: str = WHOLE, note: str = "") -> Record:
    """SIGKILL for launcher and ranks; then the flip, if it is one."""
    leg.note_published()
    loaded = attempt.has_loaded()
    began = time.monotonic()
    kill_job(attempt.job)
    seconds = time.monotonic() - began
    if kind == FLIP:
        flip_newest(leg)
    moment = attempt.moment(loaded)
    return leg.record(attempt, Fault(kind=kind, moment=moment, seconds=seconds, note=note))


def kill_one(leg: Leg, attempt: Attempt) -> Record | None:
    """SIGKILL for one rank; the others are to end. None if the launcher has not started any."""
    everyone = attempt.job.pids()
    ranks = attempt.job.ranks()
    if not ranks:
        return None
    leg.note_published()
    loaded = attempt.has_loaded()
    # only ranks that have met learn of each other's end; before, a launcher ends them
    is_helped = not attempt.has_met() and not attempt.job.has_launcher
    rank = leg.sample.randrange(len(ranks))
    began = time.monotonic()
    os.kill(ranks[rank], signal.SIGKILL)
    if is_helped:
        send([pid for pid in everyone if pid != ranks[rank]], signal.SIGTERM)
    await_the_others(leg, attempt, rank, everyone)
    seconds = time.monotonic() - began
    came_true(lambda: not attempt.job.is_running(), SURVIVORS_S, POLL_S)
    moment = attempt.moment(loaded)
    if attempt.job.ended_well():
        leg.problem(f"rank {rank} was killed, and the job ended well")
    fault = Fault(
        kind=ONE,
        moment=moment,
        seconds=seconds,
        ended_by_launcher=is_helped,
        note=f"(rank {rank}; {attempt.job.codes()})",
    )
    return leg.record(attempt, fault)


def await_the_others(leg: Leg, attempt: Attempt, rank: int, everyone: list[int]) -> None:
    """Wait until nothing of a job runs whose rank was killed; what stays is a problem, and goes."""

    def are_gone() -> bool:
        return not any(map(exists, everyone))

    if came_true(are_gone, SURVIVORS_S, POLL_S):
        return
    left = [pid for pid in everyone if exists(pid)]
    leg.problem(
        f"{SURVIVORS_S:.0f} s after rank {rank} was killed still there: "
        f"{left}\n{attempt.last_words()}"
    )
    send(everyone, signal.SIGKILL)
    came_true(are_gone, SURVIVORS_S, POLL_S)


def flip_newest(leg: Leg) -> None:
    """Flip a bit in a file of the newest checkpoint, where another is left."""
    newest, *older = leg.good_checkpoints()
    assert older
    file = leg.sample.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    content[leg.sample.randrange(len(content))] ^= 1 << leg.sample.randrange(8)
    file.write_bytes(content)
    leg.damaged.add((newest.name, newest.stat().st_ino))
    leg.published = step_of(older[0])
    taken, said = newest_good(leg.run_dir)
    if taken is None or taken.path != older[0] or not any(file.name in line for line in said):
        leg.problem(f"{file} was flipped, and {taken and taken.path} is taken: {said}")


def mounted(mount: Path, size: int) -> str | None:
    """Make a small disk in memory; what stands against it, or None."""
    mount.mkdir(parents=True)
    free = psutil.virtual_memory().available
    if size > free:
        return f"it would take {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    return made.stderr.strip() if made.returncode else None


def resize(mount: Path, size: int) -> bool:
    """Give the small disk another size; False if more than that lies on it."""
    command = ["mount", "-o", f"remount,size={size}", str(mount)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def used_bytes(mount: Path) -> int:
    """What lies on a disk."""
    disk = os.statvfs(mount)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize


def bytes_in(directories: list[Path]) -> int:
    """What the files of directories hold."""
    return sum(file.stat().st_size for path in directories for file in path.glob("*"))


def fill_disk(leg: Leg, attempt: Attempt, mount: Path) -> bool:
    """Have the disk be full while a save is being written; False if the save was faster."""
    pids = attempt.job.ranks()
    send(pids, signal.SIGSTOP)
    time.sleep(STOPPED_S)
    is_saving = attempt.is_saving()
    written = bytes_in(attempt.staging())
    good = leg.good_checkpoints()
    whole = bytes_in(good[:1]) if good else 2 * written
    left_to_write = max(0, whole - written)
    blocks = int(leg.sample.uniform(0, 0.95) * left_to_write) // BLOCK_BYTES
    is_full = is_saving and resize(mount, used_bytes(mount) + blocks * BLOCK_BYTES)
    send(pids, signal.SIGCONT)
    if not is_full:
        return False
    saved = {*saved_steps(leg.run_dir)}

    def has_reacted() -> bool:
        return not attempt.job.is_running() or not {*saved_steps(leg.run_dir)} <= saved

    if not came_true(has_reacted, FULL_DISK_S, POLL_S):
        leg.problem(
            f"{FULL_DISK_S:.0f} s after the disk was full still there:\n{attempt.last_words()}"
        )
        kill_job(attempt.job)
    return not attempt.job.is_running()

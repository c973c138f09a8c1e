"""The digests of the data under a run: checked once per run and node, while the model is built.

A disk or a copy that lost bytes shows neither in a file's size nor in its header, and the
fingerprint is that of the manifest: without this a run would train on zeros. The ranks of a node
share its files, each digests its part in threads, and no step is trained before all of them are
done. What a node has checked stands in

    RUN_DIR/checked_data/<host>.json

as one digest of size, time of change and inode of every file: as long as these stay as they are,
the next start of the run takes the files for good (`data.verify: once`). It is in the run's
directory because a data set may be read-only and may be shared, and because all ranks can write
there anyway: that is where checkpoints go.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import xxhash

from data_prep.errors import UserError
from data_prep.files import digest_file, write_durably
from data_prep.shards import ShardReader
from pretrain.config.recipe import DataRecipe
from pretrain.data.digests import check_file, digests_of, repair_advice
from pretrain.data.staging import copy_checked, is_ours
from pretrain.distributed.agree import gather, inform, say, together
from pretrain.distributed.world import World

CHECKED_NAME = "checked_data"
MOST_THREADS = 4  # of a rank: so many reads at once keep a disk busy
POLL_S = 0.05
# A check that takes this long is told of, and then every so often.
FIRST_LINE_AFTER_S = 2.0
LINE_EVERY_S = 15.0


def stamp_of(found: dict[str, os.stat_result], digests: dict[str, str]) -> str:
    """A digest of what the file system says of every file, and of what each is to hold."""
    lines = []
    for path, status in found.items():
        about = f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
        lines.append(f"{path} {about} {digests[path]}\n")
    return xxhash.xxh3_128_hexdigest("".join(lines).encode())


def read_stamp(path: Path) -> str | None:
    """The stamp that a node left, or None.

    One that can't be read has the data checked again, no more.
    """
    try:
        return str(json.loads(path.read_bytes())["stamp"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def largest_first(sizes: dict[str, int], part: int, parts: int) -> list[str]:
    """The files that one of several ranks takes, so that all have about as many bytes to read."""
    ordered = sorted(sizes, key=lambda path: (-sizes[path], path))
    return ordered[part::parts]


class Progress(NamedTuple):
    """How far a rank is with its part."""

    is_done: bool
    checked_bytes: int
    bytes: int


class DataCheck:
    """A rank's part in checking the data that it reads; on all ranks.

    It begins as its `with` block is entered, and is waited for in `finish`. `reader` reads the data
    set in `data_dir`, or a staged copy of it; a bad file of a copy of this user's is copied again.
    `on_file` is called as the check moves on, from one of its threads.
    """

    def __init__(
        self, reader: ShardReader, data_dir: Path, run_dir: Path, recipe: DataRecipe, world: World
    ) -> None:
        self.home = reader.data_dir  # which is `data_dir`, unless it was staged
        self.data_dir = data_dir
        self.world = world
        self.digests = digests_of(reader.manifest.shards)
        self.host = socket.gethostname()
        self.stamp_path = run_dir / CHECKED_NAME / f"{self.host}.json"
        self.is_copy = self.home != data_dir
        self.verify = recipe.verify
        if self.is_copy and not is_ours(self.home):
            # Whoever wants no check of what is theirs has not said so of what another user copied.
            self.verify = "once"
        self.on_file: Callable[[], None] = lambda: None
        self.mended: list[str] = []
        self._stamp = ""
        self._bytes = 0  # of this rank's part
        self._checked_bytes = 0
        self._waiting: deque[str] = deque()  # its files that no thread has taken yet
        self._sizes: dict[str, int] = {}
        self._failure: UserError | OSError | None = None

    def __enter__(self) -> Self:
        # The ranks that read the same files share the work.
        here = (self.host, str(self.home.resolve()))
        places = gather(here)
        readers = [rank for rank, place in enumerate(places) if place == here]
        self._part = readers.index(self.world.rank)
        self._parts = len(readers)
        self._thread = threading.Thread(target=self._run, name="data check", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._waiting.clear()  # its threads end with the files that they have begun

    def _run(self) -> None:
        """Body of the thread: see what there is to do, and do it with others."""
        try:
            self._plan()
        except FileNotFoundError as error:
            advice = repair_advice(self.data_dir)
            self._failure = UserError(
                f"{error.filename}: missing, but the manifest lists it; {advice}"
            )
        except OSError as error:
            self._failure = error
        cores = len(os.sched_getaffinity(0))
        own_cores = cores // max(1, self.world.local_world_size)
        threads = []
        for _ in range(min(MOST_THREADS, max(1, own_cores))):
            thread = threading.Thread(target=self._work, daemon=True)
            threads.append(thread)
            thread.start()
        for thread in threads:
            thread.join()

    def _plan(self) -> None:
        """Take this rank's files, unless there are none to check."""
        if self.verify == "never":
            return
        found = {path: (self.home / path).stat() for path in self.digests}
        self._stamp = stamp_of(found, self.digests)
        if self.verify == "once" and read_stamp(self.stamp_path) == self._stamp:
            return
        self._sizes = {path: status.st_size for path, status in found.items()}
        own = largest_first(self._sizes, self._part, self._parts)
        self._bytes = sum(self._sizes[path] for path in own)
        self._waiting.extend(own)

    def _work(self) -> None:
        """Body of each of its threads: check files until none is left, or one is bad."""
        while self._failure is None:
            try:
                path = self._waiting.popleft()
            except IndexError:
                return
            try:
                self._check(path)
            except (UserError, OSError) as error:
                self._failure = self._failure or error
            self._checked_bytes += self._sizes[path]
            self.on_file()

    def _check(self, path: str) -> None:
        """A file has its digest, or is copied again where it is a copy."""
        digest = self.digests[path]
        if not self.is_copy:
            check_file(self.home, path, digest, repair_advice(self.home))
        elif not is_ours(self.home):
            advice = "another user staged it: give another data.stage_dir"
            check_file(self.home, path, digest, advice)
        elif digest_file(self.home / path) != digest:
            copy_checked(self.data_dir, self.home, path, digest)
            self.mended.append(path)

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure

    def finish(self) -> None:
        """Wait until all ranks are done.

        Raises UserError on all of them for the first bad file of any.
        """
        next_line_at = time.monotonic() + FIRST_LINE_AFTER_S
        while True:
            is_done = not self._thread.is_alive()
            own = Progress(is_done, checked_bytes=self._checked_bytes, bytes=self._bytes)
            ranks = gather(own)
            together(self._raise_failure)
            if all(rank.is_done for rank in ranks):
                break
            if time.monotonic() > next_line_at:
                self._say_progress(ranks)
                next_line_at = time.monotonic() + LINE_EVERY_S
            time.sleep(POLL_S)
        self._conclude()

    def _say_progress(self, ranks: list[Progress]) -> None:
        """A line of the log on how far all ranks are."""
        checked = sum(rank.checked_bytes for rank in ranks)
        total = sum(rank.bytes for rank in ranks)
        inform(
            self.world,
            f"checking the digests of the data before the first step: {checked / 1e9:.1f} of "
            f"{total / 1e9:.1f} GB (--data.verify says whether, and how often)",
        )

    def _conclude(self) -> None:
        """Say what was mended, and leave a stamp where all was good as it was."""
        of_ranks = gather([str(self.home / path) for path in self.mended])
        mended = [path for paths in of_ranks for path in paths]
        if mended:
            say(
                self.world,
                f"warning: {mended[0]}: differed from its digest; {len(mended)} such files were "
                f"copied again from {self.data_dir}",
            )
        is_good = not mended and self._stamp != ""
        writes = is_good and self._part == 0
        together(lambda: self._write_stamp() if writes else None)

    def _write_stamp(self) -> None:
        """For the next start of this run on this node."""
        content = {"data_dir": str(self.home), "files": len(self.digests), "stamp": self._stamp}
        if read_stamp(self.stamp_path) != self._stamp:
            # Hosts may share their name, and then this file.
            suffix = f".{secrets.token_hex(8)}.tmp"
            write_durably(self.stamp_path, json.dumps(content).encode(), suffix)

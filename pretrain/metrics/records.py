"""Files of one record a line, each about a step: reading them, and cutting off a crash's end.

A kill tears the last line; a machine that loses its power may leave zeros where lines had been
promised. What was lost so was never counted on, if a checkpoint comes before it: the file is cut
there, in its place, so that whoever follows it (`tail -f`) goes on following. Damage before that is
for a person to look at.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic_core

from data_prep.errors import UserError, explained, naming, one_line
from data_prep.files import write_durably
from pretrain.checkpoint.patience import patiently, read_patiently

Line = dict[str, Any]
ADVICE = (
    "mend that line, or delete it alone and keep the file, which is the run's record; then the "
    "same command goes on"
)


@dataclass(frozen=True, kw_only=True)
class Records:
    """The lines of a file up to the first that is none, and what that is."""

    lines: list[Line]
    ends: list[int]  # the byte behind each line
    size: int  # of the whole file
    # What is wrong with the first line that is none; a torn last one is no damage.
    damage: str | None
    is_followed: bool  # whether good lines come after the damage
    # Whether the damage holds zero bytes, as a loss of power leaves them, and nobody writes.
    has_zeros: bool

    @property
    def end(self) -> int:
        """The byte behind the last good line."""
        return self.ends[-1] if self.ends else 0

    @property
    def loose_bytes(self) -> int:
        """How many bytes follow the last good line."""
        return self.size - self.end


def parse_line(content: bytes) -> Line:
    """One record. Raises ValueError for what is none."""
    try:
        line = json.loads(content)
    except json.JSONDecodeError as error:  # whose own text counts lines within this one
        raise ValueError(f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        raise ValueError("a line without a step")
    return line


def is_record(content: bytes) -> bool:
    """Whether a line is a record."""
    try:
        parse_line(content)
    except ValueError:
        return False
    return True


def read_records(path: Path) -> Records:
    """A file's lines as far as they are good; of a file that is not there, none."""
    content = read_patiently(path) if path.is_file() else b""
    lines: list[Line] = []
    ends: list[int] = []
    damage = None
    start = 0
    for own in content.split(b"\n")[:-1]:
        try:
            lines.append(parse_line(own))
        except ValueError as error:
            damage = f"line {len(lines) + 1}: {one_line(error)}"
            break
        start += len(own) + 1
        ends.append(start)
    rest = content[start:]
    return Records(
        lines=lines,
        ends=ends,
        size=len(content),
        damage=damage,
        is_followed=any(is_record(own) for own in rest.split(b"\n")[:-1]),
        has_zeros=b"\0" in rest,
    )


def read_lines(path: Path) -> list[Line]:
    """All whole lines of a `.jsonl` file; a kill can tear the last one. Raises UserError for a
    damaged one.
    """
    records = read_records(path)
    if records.damage:
        raise UserError(f"{path}: damaged ({records.damage}); {ADVICE}")
    return records.lines


def stream_lines(path: Path) -> Iterator[Line]:
    """As `read_lines`, a line at a time: the file of a million steps is never held as a whole."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, content in enumerate(file, start=1):
            if not content.endswith(b"\n"):
                return  # torn by a kill, or being written just now
            try:
                line = parse_quickly(content)
            except ValueError:
                # `explained` around every line would take a tenth of the time.
                with explained(ValueError, f"{path}: line {number}: damaged", ADVICE):
                    raise
            yield line


def parse_quickly(content: bytes) -> Line:
    """As `parse_line`, in less than half the time: pydantic's parser for lines that are good."""
    try:
        line = pydantic_core.from_json(content)
    except ValueError:
        return parse_line(content)  # which says in its own words what is wrong
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        raise ValueError("a line without a step")
    return line


def cut_at(path: Path, size: int) -> None:
    """Shorten a file in its place, on the disk when this returns."""

    def cut() -> None:
        with naming(path), path.open("r+b", buffering=0) as file:
            file.truncate(size)
            os.fsync(file.fileno())

    patiently(cut)


def cut_to_step(path: Path, step: int) -> tuple[list[Line], str | None]:
    """Keep the lines of the steps before one, and say what damage behind them went.

    A torn last line may be of one of those steps, where a loss of power took lines that had been
    flushed: the run goes on without them. Raises UserError where a line among those is damaged.
    """
    records = read_records(path)
    reaches = step == 0 or any(line["step"] >= step - 1 for line in records.lines)
    if records.damage and not reaches:
        raise UserError(f"{path}: damaged ({records.damage}); {ADVICE}")
    kept = [line for line in records.lines if line["step"] < step]
    if kept == records.lines[: len(kept)]:
        cut_at(path, records.ends[len(kept) - 1] if kept else 0)
    else:  # steps out of order, which no run of ours leaves
        write_durably(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    if records.loose_bytes == 0:
        return kept, None
    outcome = "those steps are trained again"
    if not reaches:
        lost = step - len({line["step"] for line in kept})
        outcome = (
            f"the lines of {lost} steps are lost; the checkpoint has these steps, so they are not "
            "trained again"
        )
    return kept, f"{path}: {words_on_end(records)}; {outcome}"


def words_on_end(records: Records) -> str:
    """What was cut off behind the last good line."""
    what = f"line {len(records.lines) + 1} is torn"
    if records.damage:
        what = f"damaged ({records.damage})"
    last = f"step {records.lines[-1]['step']}" if records.lines else "its beginning"
    return f"{what} after {last}: {records.loose_bytes:,} bytes cut off"


def cut_damaged_end(path: Path) -> tuple[list[Line], str | None]:
    """Cut off an end that a crash left, and say so where it is more than a torn line.

    Raises UserError for other damage, and where good lines follow.
    """
    records = read_records(path)
    if records.damage and (records.is_followed or not records.has_zeros):
        raise UserError(f"{path}: damaged ({records.damage}); {ADVICE}")
    if records.loose_bytes:
        cut_at(path, records.end)
    if not records.damage:
        return records.lines, None
    cut = f"{records.loose_bytes:,} bytes cut off"
    return records.lines, f"{path}: damaged at its end ({records.damage}): {cut}"

"""Which documents a finished build leaves out, and whether these are still single documents.

`on_bad_document: skip` is meant for some bad rows among many good ones. A file in which no row is
good, or a source with more than a share of bad ones, is something else: another format, a wrong
field, a broken download.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from data_prep.building.unit_records import UnitResult
from data_prep.errors import UserError
from data_prep.formats.json_lines import JSONL_FORMATS
from data_prep.formats.work_unit import WorkUnit
from data_prep.manifest import BadDocument, Origin, input_of

FIRST_BAD_SHOWN = 3
# Of a work unit's bytes; so many of them, and at least LARGE_BYTES, are no single documents.
MOST = 0.5
LARGE_BYTES = 1 << 20


class FinishedUnit(NamedTuple):
    """A work unit, and what it gave."""

    unit: WorkUnit
    result: UnitResult


@dataclass(kw_only=True)
class Tally:
    """What came of the rows of a source or a file."""

    documents: int = 0
    empty: int = 0
    bad: int = 0
    row_bytes: int = 0  # of all of them, as `Documents` counts
    bad_bytes: int = 0
    first_bad: list[str] = field(default_factory=list)  # where, and why

    @property
    def rows(self) -> int:
        """All that were read."""
        return self.documents + self.empty + self.bad

    def add_bad(self, line: str) -> None:
        """Count a bad row; the lines of the first ones are kept."""
        self.bad += 1
        if len(self.first_bad) < FIRST_BAD_SHOWN:
            self.first_bad.append(line)


class Tallies(NamedTuple):
    """What came of all rows."""

    of_sources: dict[str, Tally]
    of_files: dict[tuple[str, str], Tally]  # by source and file's name; none where files are rows


def first_rows(units: Sequence[FinishedUnit]) -> list[int]:
    """The row of its input file at which each unit starts; 0 where it has several files."""
    rows_before: Counter[tuple[str, str]] = Counter()
    found = []
    for unit, result in units:
        place = (unit.source, unit.files[0].name)
        found.append(rows_before[place])
        is_part_of_a_file = len(unit.files) == 1 and not unit.files_are_rows
        if is_part_of_a_file:
            rows_before[place] += result.rows
    return found


def bad_documents(units: Sequence[FinishedUnit]) -> Iterator[BadDocument]:
    """Every document that was left out as bad, in the order of the plan."""
    for (unit, result), first_row in zip(units, first_rows(units), strict=True):
        inputs = [file.name for file in unit.files]
        for row, reason in result.bad_documents:
            if unit.files_are_rows:
                origin = Origin(inputs[row], 0)
            else:
                origin = input_of(inputs, result.input_rows, first_row + row)
            yield BadDocument(source=unit.source, input=origin.input, row=origin.row, reason=reason)


def check_left_out(units: Sequence[FinishedUnit], max_bad_fraction: float) -> None:
    """Whether what is left out are single documents.

    Raises UserError for a file without one good row, and for a source with too large a share of bad
    ones.
    """
    tallied = tallies(units)
    for unit, result in units:
        check_unit(unit, result, max_bad_fraction)
    urls: dict[tuple[str, str], str] = {}
    for unit, _ in units:
        for file in unit.files:
            urls[unit.source, file.name] = file.url
    for place, tally in tallied.of_files.items():
        source, _ = place
        check_file(tally, f"source {source!r}: {urls[place]}")
    then = "build again: what is built stays"
    for source, tally in tallied.of_sources.items():
        check_source(tally, f"source {source!r}", max_bad_fraction, then)


def check_file(tally: Tally, where: str) -> None:
    """Raises UserError for a file without one good row."""
    if tally.bad and not tally.documents:
        problem = f"not one good row in it, bad: {tally.bad:,}, the first: {tally.first_bad[0]}"
        raise UserError(f"{where}: {problem}; see what the file is, mend it or leave it out")


def check_source(tally: Tally, where: str, max_bad_fraction: float, then: str) -> None:
    """Raises UserError for a source of whose rows, or of whose bytes, too large a share is bad.

    A single row may be most of a file: where its line ends are lost, or NULs took their place.
    """
    bad = tally.bad
    rows = tally.rows
    of_rows = f"{bad:,} of {rows:,} rows are bad"
    limit = f"max_bad_fraction: {max_bad_fraction:g}"
    first = "; ".join(tally.first_bad)
    advice = f"the first: {first}; mend them, or raise max_bad_fraction and {then}"
    if bad > max_bad_fraction * rows:
        share = bad / rows
        problem = f"{of_rows} ({share:.2%}, {limit})"
        raise UserError(f"{where}: {problem}, {advice}")
    if tally.bad_bytes > max_bad_fraction * tally.row_bytes:
        share = tally.bad_bytes / tally.row_bytes
        of_bytes = f"hold {tally.bad_bytes:,} of {tally.row_bytes:,} bytes"
        problem = f"{of_rows}, and {of_bytes} ({share:.2%}, {limit})"
        raise UserError(f"{where}: {problem}, {advice}")


def check_unit(unit: WorkUnit, result: UnitResult, max_bad_fraction: float) -> None:
    """Raises UserError for lines most of whose bytes are bad: a hole in a file, say."""
    limit = max(MOST, max_bad_fraction) * result.row_bytes
    is_mostly_bad = result.bad_bytes > max(limit, LARGE_BYTES)
    if is_mostly_bad and unit.format in JSONL_FORMATS:
        place = f"{unit.url}: bytes {unit.start:,} to {unit.stop:,}"
        where = f"source {unit.source!r}: {place}"
        _, reason = result.bad_documents[0]
        problem = f"{result.bad_bytes:,} of {result.row_bytes:,} are of bad rows ({reason})"
        raise UserError(f"{where}: {problem}; see what is there, mend it or fetch it again")


def tallies(units: Sequence[FinishedUnit]) -> Tallies:
    """What came of the rows of each source, and of each file."""
    tallied = Tallies({}, {})
    for unit, result in units:
        documents = documents_of_files(result)
        of_source = tallied.of_sources.setdefault(unit.source, Tally())
        of_source.documents += sum(documents)
        of_source.empty += result.empty_documents
        # Records of early versions hold no bytes of rows; those of a unit are about as many.
        of_source.row_bytes += result.row_bytes or unit.size_bytes
        of_source.bad_bytes += result.bad_bytes
        if unit.files_are_rows:
            continue
        for file, number in zip(unit.files, documents, strict=True):
            of_file = tallied.of_files.setdefault((unit.source, file.name), Tally())
            of_file.documents += number
    for bad in bad_documents(units):
        in_file = f"row {bad.row}: {bad.reason}"
        tallied.of_sources[bad.source].add_bad(f"{bad.input}, {in_file}")
        if (bad.source, bad.input) in tallied.of_files:
            tallied.of_files[bad.source, bad.input].add_bad(in_file)
    return tallied


def documents_of_files(result: UnitResult) -> tuple[int, ...]:
    """Documents of each file of a unit; of one file, or where files are rows, of all."""
    if result.input_documents:
        return result.input_documents
    return (sum(shard.documents for shard in result.shards),)

"""Which documents a finished build leaves out, and whether that is still a matter of single
documents.

`on_bad_document: skip` is meant for some bad rows among many good ones. A file in which no row is
good, or a source with more than a share of bad ones, is something else: another format, a wrong
field, a broken download.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from data_prep.building.unit_records import UnitResult
from data_prep.errors import UserError
from data_prep.formats.json_lines import JSONL_FORMATS
from data_prep.formats.work_unit import WorkUnit
from data_prep.manifest import BadDocument, input_of

FIRST_BAD_SHOWN = 3
# of a work unit's bytes, and at least so many of them, make bad rows more than single documents
MOST = 0.5
LARGE_BYTES = 1 << 20

Finished = Sequence[tuple[WorkUnit, UnitResult]]  # in the order of the plan


@dataclass(kw_only=True)
class Tally:
    """What came of the rows of a source or a file."""

    documents: int = 0
    empty: int = 0
    bad: int = 0
    row_bytes: int = 0  # of all of them, as `Documents` counts
    bad_bytes: int = 0
    first_bad: list[str] = field(default_factory=list)  # where, and why


def first_rows(units: Finished) -> list[int]:
    """The row of its input file at which each unit starts; 0 where it has several files."""
    rows_before: Counter[tuple[str, str]] = Counter()
    found = []
    for unit, result in units:
        place = unit.source, unit.files[0].name
        found.append(rows_before[place])
        rows_before[place] += result.rows if len(unit.files) == 1 and not unit.files_are_rows else 0
    return found


def bad_documents(units: Finished) -> Iterator[BadDocument]:
    """Every document that was left out as bad, in the order of the plan."""
    for (unit, result), first_row in zip(units, first_rows(units), strict=True):
        inputs = [file.name for file in unit.files]
        for row, reason in result.bad_documents:
            name, at = (
                (inputs[row], 0)
                if unit.files_are_rows
                else input_of(inputs, result.input_rows, first_row + row)
            )
            yield BadDocument(source=unit.source, input=name, row=at, reason=reason)


def check_left_out(units: Finished, max_bad_fraction: float) -> None:
    """Raises UserError for a file without one good row, and for a source with too large a share
    of bad ones.
    """
    of_sources, of_files = tallies(units)
    for unit, result in units:
        check_unit(unit, result, max_bad_fraction)
    urls = {(unit.source, file.name): file.url for unit, _ in units for file in unit.files}
    for (source, name), tally in of_files.items():
        check_file(tally, f"source {source!r}: {urls[source, name]}")
    for name, tally in of_sources.items():
        check_source(
            tally, f"source {name!r}", max_bad_fraction, "build again: what is built stays"
        )


def check_file(tally: Tally, where: str) -> None:
    """Raises UserError for a file without one good row."""
    if tally.bad and not tally.documents:
        problem = f"not one good row in it, bad: {tally.bad:,}, the first: {tally.first_bad[0]}"
        raise UserError(f"{where}: {problem}; see what the file is, mend it or leave it out")


def check_source(tally: Tally, where: str, max_bad_fraction: float, then: str) -> None:
    """Raises UserError for a source of whose rows, or of whose bytes, too large a share is bad.

    A single row may be most of a file: where its line ends are lost, or NULs took their place.
    """
    rows = tally.documents + tally.empty + tally.bad
    first = (
        f"the first: {'; '.join(tally.first_bad)}; mend them, or raise max_bad_fraction and {then}"
    )
    if tally.bad > max_bad_fraction * rows:
        share = f"{tally.bad / rows:.2%}, max_bad_fraction: {max_bad_fraction:g}"
        raise UserError(f"{where}: {tally.bad:,} of {rows:,} rows are bad ({share}), {first}")
    if tally.bad_bytes > max_bad_fraction * tally.row_bytes:
        share = f"{tally.bad_bytes / tally.row_bytes:.2%}, max_bad_fraction: {max_bad_fraction:g}"
        problem = (
            f"{tally.bad:,} of {rows:,} rows are bad, and hold {tally.bad_bytes:,} of "
            f"{tally.row_bytes:,} bytes"
        )
        raise UserError(f"{where}: {problem} ({share}), {first}")


def check_unit(unit: WorkUnit, result: UnitResult, max_bad_fraction: float) -> None:
    """Raises UserError for lines of a large source that are bad for the most part: a hole in a
    file, say.
    """
    limit = max(MOST, max_bad_fraction) * result.row_bytes
    if unit.format in JSONL_FORMATS and result.bad_bytes > max(limit, LARGE_BYTES):
        where = f"source {unit.source!r}: {unit.url}: bytes {unit.start:,} to {unit.stop:,}"
        problem = (
            f"{result.bad_bytes:,} of {result.row_bytes:,} are of bad rows "
            f"({result.bad_documents[0][1]})"
        )
        raise UserError(f"{where}: {problem}; see what is there, mend it or fetch it again")


def tallies(units: Finished) -> tuple[dict[str, Tally], dict[tuple[str, str], Tally]]:
    """By source, and by source and file; of text files, each of them a row, none by file."""
    of_sources: dict[str, Tally] = {}
    of_files: dict[tuple[str, str], Tally] = {}
    for unit, result in units:
        documents = result.input_documents or (sum(shard.documents for shard in result.shards),)
        tally = of_sources.setdefault(unit.source, Tally())
        tally.documents += sum(documents)
        tally.empty += result.empty_documents
        tally.row_bytes += result.row_bytes or unit.size_bytes
        tally.bad_bytes += result.bad_bytes
        if not unit.files_are_rows:
            for file, number in zip(unit.files, documents, strict=True):
                of_files.setdefault((unit.source, file.name), Tally()).documents += number
    for bad in bad_documents(units):
        by_file = of_files.get((bad.source, bad.input))
        for tally in (of_sources[bad.source], *([by_file] if by_file else [])):
            tally.bad += 1
            if len(tally.first_bad) < FIRST_BAD_SHOWN:
                where = f"row {bad.row}" if tally is by_file else f"{bad.input}, row {bad.row}"
                tally.first_bad.append(f"{where}: {bad.reason}")
    return of_sources, of_files

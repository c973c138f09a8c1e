"""The formats of input, a row each, and what is asked of all of them.

To add one: a module beside this one that reads its files, and a row of ROWS. (A format of token
ids: a module of `pretokenized`, and a row of its own table.)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.formats import arrow, csv_records, json_lines, parquet, saved, text
from data_prep.formats.documents import Documents, Reading, without_bad
from data_prep.formats.first_bytes import (
    BINARY_KINDS,
    BINARY_KINDS_BUT_NULS,
    JSON,
    JSON_KINDS,
    MARKUP_KINDS,
    FirstBytes,
    Kind,
    own_kind,
)
from data_prep.formats.pretokenized import decoded
from data_prep.formats.pretokenized.documents import ID_FORMATS, IdFormat, with_indexes
from data_prep.formats.work_unit import (
    Cutting,
    Range,
    WorkUnit,
    check_unchanged,
    row_of_file,
    whole_file,
)
from data_prep.inputs.sources import InputFile, find_inputs
from data_prep.tokenizer.load import LoadedTokenizer


@dataclass(frozen=True, kw_only=True)
class Format:
    """All that the rest of the line knows of a format."""

    name: str  # in mixtures, and in the manifest
    endings: tuple[str, ...] = ()  # of files' names, behind a dot
    # A unit's documents, batch by batch, bad and empty ones included. Rows count from the batch's
    # first.
    read: Callable[[WorkUnit, Reading], Iterator[Documents]]
    # The units of one file. Raises UserError if the file is seen not to be of the format.
    cut: Callable[[InputFile, Cutting], list[Range]] = whole_file
    place: Callable[[WorkUnit, int], str] = row_of_file  # of a row of a unit, for a message
    has_text_field: bool = True  # the text is in a column or field that has a name
    files_are_rows: bool = False  # a file is a document, and files are cut into units as rows are
    small_files_share_units: bool = False  # of many files; each has rows of its own
    is_folder: bool = False  # the file that is listed stands for a directory
    # The files that a path (relative to a directory) names. Raises UserError if there are none.
    find: Callable[[Path, str, str], list[InputFile]] = find_inputs
    # The files with what must lie beside each. Raises UserError if it doesn't.
    with_beside: Callable[[Path, Sequence[InputFile], str], list[InputFile]] | None = None
    # Raises UserError if a source's files, together, can't be of the format.
    check_files: Callable[[Sequence[InputFile], int, str], None] | None = None
    own_kind: Kind | None = None  # how its files begin, and those of no other format
    other_kinds: tuple[Kind, ...] = (*BINARY_KINDS, JSON, *MARKUP_KINDS)  # how they don't begin
    other_kinds_inside: tuple[Kind, ...] = ()  # the same of what a compressed file holds


def _of_ids(row: IdFormat) -> Format:
    """The row of a format of token ids."""
    return Format(
        name=row.name,
        read=decoded.read,
        cut=partial(decoded.cut, row.name),
        place=row.place,
        has_text_field=False,
        with_beside=partial(with_indexes, row),
        check_files=row.check_files,
        own_kind=row.own_kind,
    )


def _compressed_json_lines(packing: str, pattern: bytes, ending: str) -> Format:
    """The row of JSON lines packed in a way that its first bytes tell."""
    name = f"jsonl.{ending}"
    return Format(
        name=name,
        endings=(name, f"ndjson.{ending}", f"json.{ending}"),
        read=json_lines.read,
        place=json_lines.place,
        small_files_share_units=True,
        own_kind=own_kind(packing, pattern, name),
        other_kinds=(*BINARY_KINDS_BUT_NULS, JSON, *MARKUP_KINDS),
        other_kinds_inside=NOT_JSON_LINES,
    )


NOT_JSON_LINES = (*BINARY_KINDS, *MARKUP_KINDS, *JSON_KINDS)
ROWS = (
    Format(
        name="parquet",
        endings=("parquet",),
        cut=parquet.cut,
        read=parquet.read,
        place=parquet.place,
        own_kind=own_kind("parquet", rb"PAR1\x15", "parquet"),
    ),
    Format(
        name="jsonl",
        endings=("jsonl", "ndjson", "json"),
        cut=json_lines.cut,
        read=json_lines.read,
        place=json_lines.place,
        small_files_share_units=True,
        other_kinds=NOT_JSON_LINES,
    ),
    _compressed_json_lines("gzip", rb"\x1f\x8b", "gz"),
    _compressed_json_lines("zstd", rb"\x28\xb5\x2f\xfd", "zst"),
    Format(
        name="txt",
        endings=("txt",),
        read=text.read,
        place=text.place,
        has_text_field=False,
        files_are_rows=True,
        other_kinds=BINARY_KINDS,  # a page of HTML may well be a text
    ),
    Format(
        name="arrow",
        endings=("arrow",),
        read=arrow.read,
        own_kind=own_kind("arrow", rb"ARROW1\0\0|\xff\xff\xff\xff", "arrow"),
    ),
    Format(
        name="csv",
        endings=("csv",),
        read=csv_records.read,
        other_kinds=(*BINARY_KINDS, *MARKUP_KINDS),
    ),
    Format(
        name="save_to_disk",
        find=saved.find,
        cut=saved.cut,
        read=saved.read,
        is_folder=True,
    ),
    *(_of_ids(row) for row in ID_FORMATS.values()),
)
FORMATS = {row.name: row for row in ROWS}


def format_of(name: str, where: str) -> str:
    """The format that a file's name tells. Raises UserError if it tells none."""
    lower = name.lower()
    for row in FORMATS.values():
        if any(lower.endswith(f".{ending}") for ending in row.endings):
            return row.name
    raise UserError(
        f"{where}: the format of {name} is not known from its name; give one of "
        f"{', '.join(FORMATS)}"
    )


def text_field_of(format: str, text_field: str) -> str | None:
    """The field of the text, for a format whose texts are in one."""
    return text_field if FORMATS[format].has_text_field else None


def find_files(format: str | None, base: Path, pattern: str, where: str) -> list[InputFile]:
    """The files that a path or URL names, to be read in a format; None: their names tell it."""
    if format is None:
        return find_inputs(base, pattern, where)
    return FORMATS[format].find(base, pattern, where)


def with_files_beside(
    format: str | None, base: Path, files: list[InputFile], where: str
) -> list[InputFile]:
    """The files of a source, with what must lie beside each in its version.

    Raises UserError if that is missing, or can't be: of files that are not on a local disk.
    """
    with_beside = FORMATS[format].with_beside if format else None
    return with_beside(base, files, where) if with_beside else files


def first_bytes_of(row: Format) -> FirstBytes:
    """What the files of a format don't begin with: other formats' beginnings among it."""
    of_formats = [other.own_kind for other in FORMATS.values()]
    own_kinds = tuple(kind for kind in of_formats if kind is not None)
    others = tuple(kind for kind in own_kinds if kind.own_format != row.name)
    inside = (*own_kinds, *row.other_kinds_inside) if row.other_kinds_inside else ()
    return FirstBytes(format=row.name, kinds=(*others, *row.other_kinds), kinds_inside=inside)


def read_documents(unit: WorkUnit, tokenizer: LoadedTokenizer | None = None) -> Iterator[Documents]:
    """The documents of a unit, batch by batch, in order; ids are decoded.

    Raises UserError at the first bad one, unless the unit says to leave bad ones out.
    """
    row_of_table = FORMATS[unit.format]
    check_unchanged(unit, is_folder=row_of_table.is_folder)
    given = Reading(tokenizer=tokenizer, first_bytes=first_bytes_of(row_of_table))
    rows_before = 0  # of the unit, in the files before
    for number, part in enumerate(unit.parts()):
        row = 0
        for batch in row_of_table.read(part, given):
            documents = without_bad(batch, unit.text_field)
            if documents.bad and not unit.skip_bad:
                bad_row, reason = documents.bad[0]
                raise refusal(part, row + bad_row, reason)
            first = rows_before + row
            yield replace(
                documents,
                rows=documents.rows + np.uint64(first),
                bad=[(first + bad_row, reason) for bad_row, reason in documents.bad],
                file=number,
                rows_before=rows_before,
            )
            row += batch.rows_read
        rows_before += row


def refusal(unit: WorkUnit, row: int, reason: str) -> UserError:
    """The error of a bad document, which names its file and row."""
    advice = "mend or remove it, or leave it out: on_bad_document: skip, in a mixture file"
    return UserError(f"{place(unit, row)}: {reason}; {advice}")


def place(unit: WorkUnit, row: int) -> str:
    """File and row, or line, of a row of a unit, for a message."""
    return FORMATS[unit.format].place(unit, row)

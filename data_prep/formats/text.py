"""Text files: a file is a document, and small ones share a unit."""

from collections.abc import Iterator

from data_prep.formats import documents
from data_prep.formats.documents import Documents, Reading, Reasons, some_rows, too_long
from data_prep.formats.first_bytes import FIRST_BYTES, refuse_nuls
from data_prep.formats.work_unit import WorkUnit, runs_within
from data_prep.inputs.sources import open_input, reading


def read(unit: WorkUnit, given: Reading) -> Iterator[Documents]:
    """Several files at a time. One that is too long is not read: it may not fit in memory."""
    sizes = [file.size for file in unit.files]
    for start, stop, _ in runs_within(sizes, documents.BATCH_BYTES):
        good: list[tuple[int, bytes]] = []
        bad: Reasons = []
        bad_bytes = 0
        for row, file in enumerate(unit.files[start:stop]):
            if file.size > documents.MAX_DOCUMENT_BYTES:
                bad.append((row, too_long(file.size)))
                bad_bytes += file.size
                continue
            with reading(file), open_input(file) as stream:
                content = stream.read()
            given.first_bytes.check(file, content[:FIRST_BYTES])
            refuse_nuls(file, content)
            good.append((row, content))
        yield some_rows(good, bad, bad_bytes, stop - start)


def place(unit: WorkUnit, row: int) -> str:
    """Where a row of a unit lies, for a message: it is a file."""
    return unit.files[row].url

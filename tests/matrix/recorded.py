"""pretrain/engines.yaml: what exports were run in, for their cards. Written by what ran them, never by hand."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from conftest import REPOSITORY

FILE = REPOSITORY / "pretrain" / "engines.yaml"
HEADER = """\
# What exports were run in; each export's card shows the rows of its form. Nothing here is written by hand:
#   python tests/test_matrix.py --record           transformers
#   python tests/benchmarks/engines.py --record    the others
"""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One form of a small trained export in one release of an engine."""

    engine: str
    version: str
    form: str
    tried: str
    error: str | None  # None where all was as the training class has it
    by: str  # the program that ran it

    @property
    def result(self) -> str:
        """In words, as the card has it."""
        return "as trained" if self.error is None else f"not: {self.error}"


def read_records(path: Path = FILE) -> list[Record]:
    """All records, in order."""
    return [Record(**content) for content in yaml.safe_load(path.read_text(encoding="utf-8")) or []]


def replace_records(new: Sequence[Record], path: Path = FILE) -> None:
    """Put new records in the place of those of the same engines that the same program wrote."""
    kept = [old for old in read_records(path) if (old.engine, old.by) not in {(r.engine, r.by) for r in new}]
    content = [asdict(record) for record in sorted([*kept, *new], key=lambda r: (r.engine != "transformers", r.engine))]
    path.write_text(HEADER + yaml.safe_dump(content, sort_keys=False, width=1000), encoding="utf-8")

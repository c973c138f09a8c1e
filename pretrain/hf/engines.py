"""What exports were run in, by release of the engine and form.

That is engines.yaml, which the card of an export shows.

The file is written by what ran them (tests/pretrain/hf/matrix/recorded.py), never by hand.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

ENGINES_FILE = Path(__file__).with_name("engines.yaml")


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """One form of a small trained export in one release of an engine."""

    engine: str
    version: str
    form: str  # of the export: tablefree or gpt_neox
    tried: str
    error: str | None  # None where all was as the class that trained it has it, else what was not
    by: str  # the program that ran it


def read_engine_records(path: Path = ENGINES_FILE) -> list[EngineRecord]:
    """All records, in order."""
    return [EngineRecord(**content) for content in yaml.safe_load(path.read_text(encoding="utf-8"))]


def engines_of(form: str) -> list[EngineRecord]:
    """The records of one form of export."""
    return [record for record in read_engine_records() if record.form == form]

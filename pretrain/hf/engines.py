"""What exports were run in, by release of the engine, form and input code.

That is engines.yaml, which the card of an export and the table of pretrain/README.md show.

The file is written by what ran them (tests/benchmarks/engines.py --record), never by hand.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

ENGINES_FILE = Path(__file__).with_name("engines.yaml")


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """One form of small trained exports in one release of an engine."""

    engine: str
    version: str
    form: str  # of the export: tablefree, gpt_neox or gguf
    tried: str
    # By input code, such as binary_code: None where all was as the class that trained it has it,
    # else what was not. Codes that were not run are left out.
    errors: dict[str, str | None]
    modeling: str  # which modelling file trained and exported it: a digest of its code


def read_engine_records(path: Path = ENGINES_FILE) -> list[EngineRecord]:
    """All records, in order."""
    return [EngineRecord(**content) for content in yaml.safe_load(path.read_text(encoding="utf-8"))]


def engines_of(form: str, code: str) -> list[EngineRecord]:
    """The records of one form of export, of those engines that ran it with this input code."""
    return [
        record for record in read_engine_records() if record.form == form and code in record.errors
    ]

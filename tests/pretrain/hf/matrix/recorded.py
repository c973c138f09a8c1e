"""Writes pretrain/hf/engines.yaml, what exports were run in, for those who ran them."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from pretrain.hf.engines import ENGINES_FILE, EngineRecord, read_engine_records

HEADER = """\
# What exports were run in; the card of an export shows the rows of its form. Not written by hand:
#   python tests/pretrain/hf/test_matrix.py --record           transformers
#   python tests/benchmarks/engines.py --record    the others
"""


def place(record: EngineRecord) -> tuple[bool, str]:
    """Where a record stands: transformers first, then by name."""
    return record.engine != "transformers", record.engine.lower()


def replace_records(new: Sequence[EngineRecord], path: Path = ENGINES_FILE) -> None:
    """Put new records in the place of all that the file has of the same engines."""
    engines = {record.engine for record in new}
    kept = [old for old in read_engine_records(path) if old.engine not in engines]
    content = [asdict(record) for record in sorted([*kept, *new], key=place)]
    path.write_text(HEADER + yaml.safe_dump(content, sort_keys=False, width=1000), encoding="utf-8")

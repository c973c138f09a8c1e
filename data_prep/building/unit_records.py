"""The records of finished units: what a build that was killed goes on from."""

import hashlib
import json
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pydantic

from data_prep import layout
from data_prep.errors import explained
from data_prep.formats.documents import Reasons
from data_prep.formats.work_unit import WorkUnit
from data_prep.layout import SPLITS
from data_prep.manifest import FORMAT_VERSION, ShardFacts, TokenizerLoss, later, later_fields

SPACE = "make space or choose another --output-dir, and build again: finished units are kept"


@dataclass(frozen=True, kw_only=True)
class UnitResult:
    """A finished work unit."""

    rows: int
    empty_documents: int
    bad_documents: Reasons
    shards: tuple[ShardFacts, ...]
    loss: TokenizerLoss | None = None  # None in records of the earliest versions
    input_rows: tuple[int, ...] = later(())  # of several files of JSON lines, the rows of each
    input_documents: tuple[int, ...] = later(())  # and its documents
    # of all rows, as `Documents` counts them; 0 in records of earlier versions
    row_bytes: int = later(0)
    bad_bytes: int = later(0)  # of the bad ones


LATER_FACTS = later_fields(UnitResult).items()  # at their defaults they stay out of a record


def shard_path(split: str, unit: WorkUnit) -> str:
    """Where a unit's shard of a split lies in the data set."""
    return layout.shard_path(split, unit.source, unit.name)


def record_path(unit: WorkUnit) -> str:
    """Where the record of a finished unit lies in the data set."""
    return layout.record_path(unit.source, unit.name)


def unit_signature(unit: WorkUnit, tokenizer_sha256: str, validation_fraction: float) -> str:
    """All that the shards of a unit depend on, as a digest."""
    about = asdict(unit) | {
        "skip_bad": None,
        "tokenizer": tokenizer_sha256,
        "validation": validation_fraction,
    }
    del about["files_are_rows"]  # as the format tells
    for file in about["files"]:
        del file["secret_url"]  # another password leads to the same file
    return hashlib.sha256(json.dumps([FORMAT_VERSION, about], sort_keys=True).encode()).hexdigest()


def _seal(signature: str, content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([signature, content]).encode()).hexdigest()


def read_record(path: Path, signature: str) -> UnitResult | None:
    """The record of a finished unit; None if there is none, a damaged one, or one of other
    inputs.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        content: dict[str, Any] = json.loads(path.read_bytes())
        if content.pop("seal") == _seal(signature, content):
            result = pydantic.TypeAdapter(UnitResult).validate_python(content)
            splits = [shard.split for shard in result.shards]  # they name directories
            return result if splits == [split for split in SPLITS if split in splits] else None
    return None


def writing(output_dir: Path, what: str) -> AbstractContextManager[None]:
    """A full disk, or one that can't be written to, is a UserError that says how to go on."""
    return explained(OSError, f"{output_dir}: can't write {what}", SPACE)

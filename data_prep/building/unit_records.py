"""The records of finished units: what a build that was killed goes on from.

A record is sealed with a digest of itself and of all that the unit's shards depend on. So one that
is damaged, or of other inputs, is taken for none, and its unit is built again.
"""

import hashlib
import json
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pydantic

from data_prep import layout
from data_prep.errors import explained
from data_prep.files import write_durably
from data_prep.formats.documents import Reasons
from data_prep.formats.work_unit import WorkUnit
from data_prep.layout import SPLITS
from data_prep.manifest import FORMAT_VERSION, ShardFacts, TokenizerLoss, later, later_fields

SPACE = "make space or choose another --output-dir, and build again: finished units are kept"
# What Python raises on content that is no record: no JSON, other keys, other types, too deep.
NOT_A_RECORD = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


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
    # Of all rows, as `Documents` counts them; 0 in records of earlier versions.
    row_bytes: int = later(0)
    bad_bytes: int = later(0)  # of the bad ones

    @property
    def has_exact_loss(self) -> bool:
        """Whether the loss was counted in all documents, not only in the sampled ones."""
        tokens = sum(shard.tokens - shard.documents for shard in self.shards)
        return self.loss is not None and self.loss.tokens == tokens


def shard_path(split: str, unit: WorkUnit) -> str:
    """Where a unit's shard of a split lies in the data set."""
    return layout.shard_path(split, unit.source, unit.name)


def record_path(unit: WorkUnit) -> str:
    """Where the record of a finished unit lies in the data set."""
    return layout.record_path(unit.source, unit.name)


def unit_signature(unit: WorkUnit, tokenizer_sha256: str, validation_fraction: float) -> str:
    """All that the shards of a unit depend on, as a digest."""
    about = asdict(unit)
    about["tokenizer"] = tokenizer_sha256
    about["validation"] = validation_fraction
    # Good documents are the same whatever is done about bad ones: a unit that had none stays.
    about["skip_bad"] = None
    del about["files_are_rows"]  # as the format tells
    for file in about["files"]:
        del file["secret_url"]  # another password leads to the same file
    content = json.dumps([FORMAT_VERSION, about], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def write_record(path: Path, signature: str, result: UnitResult) -> None:
    """Write the record of a unit whose shards are on the disk."""
    content = asdict(result)
    for name, default in later_fields(UnitResult).items():
        if content[name] == default:
            del content[name]
    sealed = {"seal": _seal(signature, content), **content}
    text = json.dumps(sealed, indent=1)
    write_durably(path, f"{text}\n".encode())


def read_record(path: Path, signature: str) -> UnitResult | None:
    """The record of a finished unit.

    None if there is none, a damaged one, or one of other inputs.
    """
    with suppress(*NOT_A_RECORD):
        content: dict[str, Any] = json.loads(path.read_bytes())
        if content.pop("seal") != _seal(signature, content):
            return None
        result = pydantic.TypeAdapter(UnitResult).validate_python(content)
        splits = [shard.split for shard in result.shards]
        # They name directories: no others, none twice, in their order.
        if splits == [split for split in SPLITS if split in splits]:
            return result
    return None


def _seal(signature: str, content: dict[str, Any]) -> str:
    text = json.dumps([signature, content])
    return hashlib.sha256(text.encode()).hexdigest()


def writing(output_dir: Path, what: str) -> AbstractContextManager[None]:
    """A full disk, or one that can't be written to, is a UserError that says how to go on."""
    return explained(OSError, f"{output_dir}: can't write {what}", SPACE)

"""The file of texts that a model wrote: JSON lines, an object for each prompt.

No torch: where it is to lie is looked at before a model is loaded.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.errors import UserError
from data_prep.files import try_place, write_durably

SUFFIX = ".jsonl"
LONGEST_FIRST_LINE = 2**24  # bytes that are looked at of a file that is there


@dataclass(frozen=True, kw_only=True)
class WrittenText:
    """How a prompt was continued."""

    prompt: str
    text: str  # the continuation alone
    ids: list[int]
    bits_per_byte: float | None
    ended: str


def write_texts(path: Path, texts: Iterable[WrittenText]) -> None:
    """Write the file, or replace it. Raises OSError."""
    lines = [json.dumps(asdict(text), ensure_ascii=False).encode() + b"\n" for text in texts]
    write_durably(path, b"".join(lines))


def is_file_of_texts(path: Path) -> bool:
    """Whether a file was written here, by its first line; an empty file may be taken for one."""
    with path.open("rb") as file:
        first = file.readline(LONGEST_FIRST_LINE)
    if not first:
        return True
    try:
        content = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() == WrittenText.__annotations__.keys()


def check_output(path: Path) -> None:
    """Raise UserError, or OSError, unless the file can be written there, in the place of nothing
    but an earlier one.
    """
    if path.is_dir():
        raise UserError(f"--output {path}: is a directory; give the name of a file")
    if path.suffix != SUFFIX:
        raise UserError(f"--output {path}: holds JSON lines; give a name that ends in {SUFFIX}")
    if path.exists() and not is_file_of_texts(path):
        raise UserError(
            f"--output {path}: is there, and was not written by this command; give another name"
        )
    try_place(path)

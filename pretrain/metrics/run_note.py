"""The note of which run of a sink draws a run of ours: a small file in its directory.

Sinks that take no step back begin another run of theirs instead, which names the one before.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.errors import explained
from data_prep.files import write_durably


@dataclass(frozen=True, kw_only=True)
class RunNote:
    """A run of a sink."""

    project: str
    run: str  # its name or id there
    steps: int = 0  # from the first on, that it had when it was closed; none while it is drawn


def read_note(path: Path) -> RunNote | None:
    """The run that the start before drew in, if there was one. Raises UserError for a damaged
    note.
    """
    if not path.is_file():
        return None
    with explained((ValueError, KeyError, TypeError), f"{path}: damaged", "remove it"):
        content = json.loads(path.read_bytes())
        return RunNote(
            project=str(content["project"]),
            run=str(content["run"]),
            steps=int(content.get("steps", 0)),
        )


def write_note(path: Path, note: RunNote) -> None:
    """Keep a note. Raises OSError."""
    write_durably(path, json.dumps(asdict(note)).encode())

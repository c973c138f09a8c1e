"""Exports under the releases of transformers that people have, and the table of it.

What is tried is in rows.py. Each release has an environment of its own (support/environments.py),
made by pip once and kept; the newest is asked of the registry each time. A row is right in every
release and both forms, or stands in SHORTFALLS with the sentence that a user gets.
"""

import ast
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import NamedTuple

from support.environments import newest_version, prepare_environment
from support.runs import REPOSITORY, environment

from matrix.reference import FORMS

ROWS_PROGRAM = Path(__file__).with_name("rows.py")
NEWEST = "newest"
RELEASES = ("4.57.6", "5.0.0", "5.12.1", NEWEST)
BESIDE = "accelerate>=1.1"  # what Trainer and device_map want
ROWS_TIMEOUT_S = 600


class Shortfall(NamedTuple):
    """What a release can't do in some forms: what a user gets, and why, in a note below the
    table.
    """

    row: str
    releases: tuple[str, ...]
    forms: tuple[str, ...]
    sentence: str  # a regular expression for the whole error
    note: str


class Outcomes(NamedTuple):
    """What one release made of all rows: by form and row None where right, else the error in one
    line.
    """

    version: str
    forms: dict[str, dict[str, str | None]]


SHORTFALLS: tuple[Shortfall, ...] = (
    Shortfall(
        row="greedy, prompt in chunks (`prefill_chunk_size`)",
        releases=("5.0.0",),
        forms=FORMS,
        sentence="ValueError: Cannot use prefill chunking without a cache",
        note="5.0.0 refuses it for every model.",
    ),
    Shortfall(
        row="saved, loaded, the same",
        releases=("5.0.0",),
        forms=("gpt_neox",),
        sentence=r"AssertionError: [\d.]+ from the training class",
        note="5.0.0 saves a GPT-NeoX without `rotary_pct` and, loading it, takes 0.25: "
        'write `"rotary_pct": 1.0` into '
        "the config.json that it saved (`findings/transformers_5_0_gpt_neox_rotary.sh`).",
    ),
)


def rows_of(program: Path) -> list[str]:
    """The names of the rows of a program, in order, without running it."""
    functions = [
        node
        for node in ast.parse(program.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    ]
    calls = [
        call for node in functions for call in node.decorator_list if isinstance(call, ast.Call)
    ]
    return [
        ast.literal_eval(call.args[0])
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "row"
    ]


ROWS = rows_of(ROWS_PROGRAM)


def requirement_of(package: str) -> str:
    """What pyproject.toml says of a package."""
    dependencies = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]["dependencies"]
    (requirement,) = (text for text in dependencies if re.match(rf"{package}\b", text))
    return str(requirement)


def run_rows(release: str, home: Path) -> Outcomes:
    """Try every row under a release. Raises RegistryError."""
    version = newest_version(requirement_of("transformers")) if release == NEWEST else release
    python = prepare_environment([f"transformers=={version}", BESIDE])
    written = home / f"outcomes-{version}.json"
    # nothing of this project on its path
    command = [str(python), "-I", str(ROWS_PROGRAM), str(home), str(written)]
    env = environment(HF_HOME=str(home / f"hf-{version}"), HF_HUB_OFFLINE="1")
    result = subprocess.run(
        command,
        cwd=home,
        env=env,
        capture_output=True,
        text=True,
        timeout=ROWS_TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    content = json.loads(written.read_bytes())
    assert content["transformers"] == version
    return Outcomes(version, content["forms"])


def shortfall_of(row: str, release: str, form: str) -> Shortfall | None:
    """The entry of SHORTFALLS for a cell."""
    for shortfall in SHORTFALLS:
        if row == shortfall.row and release in shortfall.releases and form in shortfall.forms:
            return shortfall
    return None


def unexpected(outcomes: Outcomes, release: str) -> list[str]:
    """The cells of a release that are neither right nor as SHORTFALLS says, in a line each."""
    lines = []
    for form, by_row in outcomes.forms.items():
        for row, error in by_row.items():
            shortfall = shortfall_of(row, release, form)
            if shortfall is None:
                is_expected = error is None
            else:
                is_expected = bool(error and re.fullmatch(shortfall.sentence, error))
            if not is_expected:
                said = error or "works now, though it is in SHORTFALLS"
                lines.append(f"{outcomes.version}, {form}: {row}: {said}")
    return lines


def cell(row: str, release: str, notes: list[str]) -> str:
    """A cell of the table; a new note is added to the list."""
    refused = {form: shortfall for form in FORMS if (shortfall := shortfall_of(row, release, form))}
    marks = {}
    for form, shortfall in refused.items():
        if shortfall.note not in notes:
            notes.append(shortfall.note)
        marks[form] = f"no ({notes.index(shortfall.note) + 1})"
    if not refused:
        return "yes"
    if len(set(marks.values())) == 1 and len(marks) == len(FORMS):
        return next(iter(marks.values()))
    return ", ".join(f"`{form}` {marks.get(form, 'yes')}" for form in FORMS)


def rows_table(newest: str) -> str:
    """The table of pretrain/README.md. It tells SHORTFALLS, which the tests hold against what
    happens.
    """
    notes: list[str] = []
    lines = [f"| | {' | '.join(RELEASES)} |", "|---" * (1 + len(RELEASES)) + "|"]
    lines += [
        f"| {row} | {' | '.join(cell(row, release, notes) for release in RELEASES)} |"
        for row in ROWS
    ]
    lines += (
        [""] + [f"{number}. {note}" for number, note in enumerate(notes, 1)] + [""] * bool(notes)
    )
    return "\n".join([*lines, f"Newest when this was written: {newest}."])

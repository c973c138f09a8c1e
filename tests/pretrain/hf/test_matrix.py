"""Exports under the releases of transformers that people have: matrix/rows.py says what is tried.

    python tests/pretrain/hf/test_matrix.py --record

writes the tables of pretrain/README.md and pretrain/hf/engines.yaml.

Each release has an environment of its own (support/environments.py), made by pip once and kept; the
newest is asked of the registry each time, so a release that breaks something turns these tests red
on the day that it comes. A row is right in every release and both forms, or stands in SHORTFALLS
with the sentence that a user gets: nothing passes unseen, and a row that starts to work must leave
that list.
"""

import ast
import json
import re
import subprocess
import sys
import tomllib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

if __name__ == "__main__":  # by its path: the project, then what tests share
    sys.path[:0] = [str(Path(__file__).parents[3]), str(Path(__file__).parents[2])]

import pytest
from matrix.recorded import replace_records
from matrix.reference import ADDRESSES, CHARACTERS, FORMS, train_and_export, write_reference
from support.environments import newest_version, prepare_environment, skip_without_registry
from support.runs import REPOSITORY, environment, text_dataset

from pretrain.hf.engines import EngineRecord, engines_of, read_engine_records

ROWS_PROGRAM = Path(__file__).with_name("matrix") / "rows.py"
README = REPOSITORY / "pretrain" / "README.md"
TABLE_BEGINS, TABLE_ENDS = (
    "<!-- python tests/pretrain/hf/test_matrix.py --record -->",
    "<!-- end of the record -->",
)
NEWEST = "newest"
RELEASES = ("4.57.6", "5.0.0", "5.12.1", NEWEST)
BESIDE = "accelerate>=1.1"  # what Trainer and device_map want


SIDE_BY_SIDE = 2
ROWS_TIMEOUT_S = 300


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


def run_matrix(home: Path) -> dict[str, "Future[Outcomes]"]:
    """Train, export, and begin with every release."""
    run_dir = train_and_export(text_dataset(home, ADDRESSES, CHARACTERS), home)
    write_reference(run_dir, home)
    executor = ThreadPoolExecutor(SIDE_BY_SIDE)
    started = {release: executor.submit(run_rows, release, home) for release in RELEASES}
    executor.shutdown(wait=False)
    return started


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> dict[str, "Future[Outcomes]"]:
    """Every release at work on the same exports."""
    return run_matrix(tmp_path_factory.mktemp("matrix"))


def outcomes_of(matrix: dict[str, "Future[Outcomes]"], release: str) -> Outcomes:
    """What a release made of the rows."""
    with skip_without_registry():
        return matrix[release].result()


def shortfall_of(row: str, release: str, form: str) -> Shortfall | None:
    """The entry of SHORTFALLS for a cell."""
    for shortfall in SHORTFALLS:
        if row == shortfall.row and release in shortfall.releases and form in shortfall.forms:
            return shortfall
    return None


def test_every_shortfall_is_of_a_row_that_there_is() -> None:
    for shortfall in SHORTFALLS:
        assert shortfall.row in ROWS
        assert set(shortfall.releases) <= set(RELEASES)
        assert set(shortfall.forms) <= set(FORMS)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("release", RELEASES)
def test_a_row(release: str, form: str, row: str, matrix: dict[str, "Future[Outcomes]"]) -> None:
    outcomes = outcomes_of(matrix, release)
    assert list(outcomes.forms[form]) == ROWS
    wrong = outcomes.forms[form][row]
    shortfall = shortfall_of(row, release, form)
    where = f"{row}: {form} under transformers {outcomes.version}"
    if shortfall is None:
        assert wrong is None, f"{where}: {wrong}"
    else:
        assert wrong is not None, f"{where} works now: take it out of SHORTFALLS and --record"
        assert re.fullmatch(shortfall.sentence, wrong), (
            f"{where} is refused in other words: {wrong}"
        )


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


def table(newest: str) -> str:
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


def recorded_table() -> str:
    """The table as pretrain/README.md has it."""
    text = README.read_text(encoding="utf-8")
    return text.partition(TABLE_BEGINS)[2].partition(TABLE_ENDS)[0].strip()


def test_the_readme_holds_the_table() -> None:
    recorded = recorded_table()
    newest = re.search(r"Newest when this was written: (5[\d.]+\d)\.$", recorded)
    assert newest, f"{README} has no table; record it: {__doc__}"
    assert recorded == table(newest[1]), (
        "the table is another: python tests/pretrain/hf/test_matrix.py --record"
    )


def test_cards_say_of_every_release_what_the_table_says() -> None:
    newest = recorded_table().rpartition("written: ")[2].removesuffix(".")
    for form in FORMS:
        said = {
            record.version: record.error
            for record in engines_of(form)
            if record.engine == "transformers"
        }
        assert said == {
            newest if release == NEWEST else release: "; ".join(
                row for row in ROWS if shortfall_of(row, release, form)
            )
            or None
            for release in RELEASES
        }


def test_what_cards_say_names_no_place_of_a_machine_and_a_program_that_is_there() -> None:
    for record in read_engine_records():
        assert "/" not in (record.error or "").replace("https://", "")
        assert (REPOSITORY / record.by).is_file()


def engine_record(outcomes: Outcomes, form: str) -> EngineRecord:
    """What cards say of a release."""
    not_right = [row for row, error in outcomes.forms[form].items() if error]
    return EngineRecord(
        engine="transformers",
        version=outcomes.version,
        form=form,
        by="tests/pretrain/hf/test_matrix.py",
        tried=f"{len(ROWS)} uses: logits, caches, beams, padding, assistants, tokenizer, training, "
        "saving",
        error="; ".join(not_right) or None,
    )


def record() -> None:
    """Run the matrix; where it is as expected, write the table and what cards say."""
    with TemporaryDirectory() as directory:
        outcomes = {
            release: future.result() for release, future in run_matrix(Path(directory)).items()
        }
    wrong = 0
    for release, (version, forms) in outcomes.items():
        for form, by_row in forms.items():
            for row, error in by_row.items():
                shortfall = shortfall_of(row, release, form)
                if not (
                    error is None
                    if shortfall is None
                    else error and re.fullmatch(shortfall.sentence, error)
                ):
                    wrong += 1
                    print(
                        f"{version}, {form}: {row}: "
                        f"{error or 'works now, though it is in SHORTFALLS'}"
                    )
    if wrong:
        sys.exit(f"{wrong} cells are not as expected; nothing recorded")
    replace_records([engine_record(result, form) for result in outcomes.values() for form in FORMS])
    before, _, rest = README.read_text(encoding="utf-8").partition(TABLE_BEGINS)
    _, _, after = rest.partition(TABLE_ENDS)
    written = f"{TABLE_BEGINS}\n\n{table(outcomes[NEWEST].version)}\n\n{TABLE_ENDS}"
    README.write_text(before + written + after, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(__doc__)
    record()

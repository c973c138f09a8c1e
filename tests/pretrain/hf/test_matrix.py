"""Exports under the releases of transformers that people have: matrix/rows.py says what is tried.

    python tests/benchmarks/engines.py --record --only transformers

writes the table of pretrain/README.md and pretrain/hf/engines.yaml; without --only, all engines.

The newest release is asked of the registry each time, so one that breaks something turns these
tests red on the day that it comes. A row is right in every release and both forms, or stands in
SHORTFALLS (matrix/releases.py): nothing passes unseen, and a row that starts to work must leave
that list.
"""

import ast
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from matrix.recorded import (
    CODES,
    COMMAND,
    ENGINES_TABLE,
    README,
    ROWS_TABLE,
    code_digest,
    engines_table,
    recorded_table,
)
from matrix.reference import ADDRESSES, CHARACTERS, FORMS, train_and_export, write_reference
from matrix.releases import (
    NEWEST,
    RELEASES,
    ROWS,
    SHORTFALLS,
    Outcomes,
    rows_table,
    run_rows,
    shortfall_of,
)
from support.environments import skip_without_registry
from support.runs import REPOSITORY, text_dataset

from pretrain.hf.engines import read_engine_records

MODELING_FILE = REPOSITORY / "pretrain" / "modeling_tablefree.py"
SIDE_BY_SIDE = 2


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


def newest_recorded() -> str:
    """The release that was the newest when the table was written."""
    newest = re.search(
        r"Newest when this was written: (5[\d.]+\d)\.$", recorded_table(README, ROWS_TABLE)
    )
    assert newest, f"{README} has no table; record it: {COMMAND}"
    return newest[1]


def test_the_readme_holds_the_tables() -> None:
    assert recorded_table(README, ROWS_TABLE) == rows_table(newest_recorded()), COMMAND
    assert recorded_table(README, ENGINES_TABLE) == engines_table(read_engine_records()), COMMAND


def test_cards_say_of_every_release_what_the_table_says() -> None:
    for form in FORMS:
        said = {
            record.version: record.errors
            for record in read_engine_records()
            if record.engine == "transformers" and record.form == form
        }
        expected = {}
        for release in RELEASES:
            version = newest_recorded() if release == NEWEST else release
            wrong = "; ".join(row for row in ROWS if shortfall_of(row, release, form))
            expected[version] = dict.fromkeys(CODES, wrong or None)
        assert said == expected


def test_what_was_run_was_trained_and_exported_by_today_s_modelling_file() -> None:
    today = code_digest(MODELING_FILE)
    old = {record.engine for record in read_engine_records() if record.modeling != today}
    assert not old, f"the modelling file is another one since: {COMMAND} --only {','.join(old)}"


def test_the_digest_of_code_leaves_out_what_only_people_read(tmp_path: Path) -> None:
    said = tmp_path / "said.py"
    plain = tmp_path / "plain.py"
    other = tmp_path / "other.py"
    code = 'X = "# no comment"\ndef f():\n    return X\n'
    said.write_text(
        '"""About."""\n\nX = "# no comment"  # one\n\n\ndef f():\n    """Of f."""\n    return X\n'
    )
    plain.write_text(code)
    other.write_text(code.replace("no", "a"))
    assert code_digest(said) == code_digest(plain) != code_digest(other)


def test_every_engine_ran_every_input_code_and_its_error_names_no_place_of_a_machine() -> None:
    records = read_engine_records()
    assert {record.engine for record in records} == checked_engines()
    for record in records:
        assert tuple(record.errors) == CODES
        for error in record.errors.values():
            assert "/" not in (error or "").replace("https://", "")


def checked_engines() -> set[str]:
    """transformers, and what engine_checks.py has a check of."""
    program = Path(__file__).with_name("matrix") / "engine_checks.py"
    names = {"transformers"}
    for node in ast.parse(program.read_text(encoding="utf-8")).body:
        for call in getattr(node, "decorator_list", []):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "engine":
                names.add(ast.literal_eval(call.args[0]))
    return names

"""What documents, file names and records hold never reaches a terminal as something that it
would obey.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.prep_helpers import build, source, write_mixture, write_parquet
from support.runs import write_recipe

from data_prep import show, verify
from data_prep.commands import exit_code
from data_prep.errors import UserError, printable
from data_prep.shards import ShardReader
from pretrain import trace
from pretrain.config.load import load_recipe
from pretrain.data.loader import TrainingLoader
from pretrain.run.bad_steps import describe_rows

pytest_plugins = ("support.prep_fixtures",)

# a colour, a window's title, C1's CSI, a carriage return, delete, backspace, bell, text that turns
# round, a line's end
HOSTILE = (
    "\x1b[31mred \x1b]0;title\x07 \x9b2J \r over \x7f \x08 \u202eevird\u202c \u2066x\u2069 \u200f "
    "\u2028 \x85 \x00"
)
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def hostile_data(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A data set each of whose documents tries to steer the terminal, as does the name of its
    file.
    """
    base = tmp_path_factory.mktemp("hostile")
    write_parquet(base / "a\x1b[2J.parquet", [f"{HOSTILE} {number} " * 3 for number in range(40)])
    build(write_mixture(base, tokenizer_dir, [source("a", "a*.parquet")]), base / "dataset")
    return base / "dataset"


def test_show_and_its_trace_spell_controls_out(
    hostile_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = ShardReader(hostile_data).manifest.shards[0]
    for flags in (["--samples", "3"], ["--trace", f"{shard.path}:5"]):
        show.main([str(hostile_data), *flags])
        out = capsys.readouterr().out
        assert not OBEYED.search(out), flags
        assert "\\u001b[31m" in out or flags[0] == "--trace"
        assert "a\\u001b[2J.parquet, row" in out


def test_the_trace_of_a_step_spells_controls_out(
    hostile_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path / "r.yaml"))
    trace.main(["--recipe", recipe, "--data-dir", str(hostile_data), "--step", "0", "--row", "1"])
    out = capsys.readouterr().out
    assert not OBEYED.search(out)
    assert re.search(r"\\u00[0-9a-f]{2}|\\u20[0-9a-f]{2}", out)


def test_records_of_bad_steps_hold_the_text_and_no_raw_controls(
    hostile_data: Path, tmp_path: Path
) -> None:
    reader = ShardReader(hostile_data)
    recipe = load_recipe(str(write_recipe(tmp_path / "r.yaml")))
    loader = TrainingLoader(reader, seq_len=recipe.model.seq_len, seed=1)
    record = describe_rows(loader, reader, range(6), np.arange(6.0).tolist())
    line = printable(json.dumps(record, ensure_ascii=False))
    assert not OBEYED.search(line)
    assert json.loads(line) == json.loads(json.dumps(record))


def test_errors_spell_controls_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "no\x1b[2J\u202e"

    def command() -> None:
        verify.main([str(missing)])

    assert exit_code(command) == 2
    captured = capsys.readouterr()
    assert not OBEYED.search(captured.err.rstrip("\n"))
    assert "no\\u001b[2J\\u202e: no such directory" in captured.err
    with pytest.raises(UserError, match="no such directory"):
        command()


@given(st.text())
def test_what_is_no_control_stays_as_it_is(text: str) -> None:
    shown = printable(text)
    assert not OBEYED.search(shown)
    assert OBEYED.sub("", text) == re.sub(r"\\u[0-9a-f]{4}", "", shown) or "\\u" in text
    if not OBEYED.search(text):
        assert shown == text
    shown.encode()


def test_the_middle_of_a_very_long_error_is_left_out_and_that_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command() -> None:
        raise UserError(f"here: got {'0' * 100_000}, expected 2; build it again")

    assert exit_code(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 5_000
    assert line.startswith("error: here: got 000")
    assert line.endswith("000, expected 2; build it again")
    assert " [... 96,0" in line

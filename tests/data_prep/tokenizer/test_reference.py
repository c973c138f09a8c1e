"""The reference tokenizer in a process of its own: it does what the one here does, and its end
is no build's end.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.prep_helpers import NASTY_TEXTS, build, source, write_mixture, write_parquet

from data_prep.errors import UserError
from data_prep.tokenizer import reference_beside
from data_prep.tokenizer.load import LoadedTokenizer, load_tokenizer
from data_prep.tokenizer.reference import LocalReference
from data_prep.tokenizer.reference_beside import Process, ReferenceBeside

pytest_plugins = ("support.prep_fixtures",)


def process_of(tokenizer: LoadedTokenizer) -> Process:
    assert isinstance(tokenizer.by_reference, ReferenceBeside)
    process = tokenizer.by_reference._process
    assert process is not None
    return process


def test_it_answers_as_the_one_here(tokenizer_dir: Path) -> None:
    beside, here = load_tokenizer(tokenizer_dir, prefer="gigatoken"), load_tokenizer(tokenizer_dir)
    assert isinstance(here.by_reference, LocalReference)
    assert process_of(beside).poll() is None
    for question in (here.eos_token, "no token", None):
        assert beside.by_reference.traits(question) == here.by_reference.traits(question)
    rows = here.by_reference.encode(NASTY_TEXTS)
    assert beside.by_reference.encode(NASTY_TEXTS) == rows
    assert [beside.by_reference.decode(ids) for ids in rows] == [
        here.by_reference.decode(ids) for ids in rows
    ]


def test_one_that_is_killed_is_replaced_here_and_that_is_said(
    tokenizer_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(tokenizer_dir, prefer="gigatoken")
    expected = tokenizer.by_reference.encode(NASTY_TEXTS)
    process = process_of(tokenizer)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert tokenizer.by_reference.encode(NASTY_TEXTS) == expected
    assert tokenizer.by_reference.decode(expected[0]) == load_tokenizer(
        tokenizer_dir
    ).by_reference.decode(expected[0])
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("note: the process of the reference tokenizer has ended")


def test_a_build_goes_on_where_it_cannot_be_started(
    tmp_path: Path, tokenizer_dir: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "a.parquet", texts[:50])
    mixture = write_mixture(tmp_path, tokenizer_dir, [source("a", "a.parquet")])
    with_it = build(mixture, tmp_path / "with")
    monkeypatch.setattr(reference_beside.sys, "executable", str(tmp_path / "nothing"))
    assert build(mixture, tmp_path / "without") == with_it


def test_a_tokenizer_that_it_cannot_load_is_refused_here(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    for file in tokenizer_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "Unheard"}}')
    with pytest.raises(UserError, match=r"tokenizer\.json: not a loadable tokenizer"):
        load_tokenizer(tmp_path, prefer="gigatoken")


def test_it_ends_with_the_process_that_started_it(tokenizer_dir: Path) -> None:
    program = """
import sys, time
from data_prep.tokenizer.load import load_tokenizer
tokenizer = load_tokenizer(__import__("pathlib").Path(sys.argv[1]), prefer="gigatoken")
print(tokenizer.by_reference._process.pid, flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", program, str(tokenizer_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    until = time.monotonic() + 20
    while time.monotonic() < until and _is_alive(pid):
        time.sleep(0.05)
    assert not _is_alive(pid)


def _is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody waits for is over, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False

"""Findings have the form that their README asks for. They are not run: they show what releases of
other projects do.
"""

import re
from pathlib import Path

import pytest
from support.runs import REPOSITORY

SCRIPTS = sorted((REPOSITORY / "findings").glob("*.sh"))
PINNED = re.compile(r"\b[\w-]+==[\w.$\"]")
OWN_FILE = re.compile(r"\b(?:pretrain|data_prep|launch|tests|ds_configs)/[\w./-]*\w")
OWN_TEST = re.compile(r"::(test_\w+)")


def header_of(script: Path) -> str:
    """The comment on top, without its signs, as one line."""
    first, *lines = script.read_text(encoding="utf-8").splitlines()
    assert first in ("#!/usr/bin/env bash", "#!/bin/bash")
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment)


def test_there_are_findings() -> None:
    assert len(SCRIPTS) > 5


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_finding_has_the_form_that_the_readme_asks_for(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert " Here: " in header_of(script)
    assert "\nset -euo pipefail\n" in text
    assert "mktemp -d" in text
    assert "\ntrap " in text
    assert PINNED.search(text)
    assert "exit" in text.partition("set -euo pipefail")[2]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_a_finding_names_of_this_project_is_there(script: Path) -> None:
    header = header_of(script)
    files = [REPOSITORY / name for name in OWN_FILE.findall(header)]
    assert not [file for file in files if not file.exists()]
    tests = "".join(file.read_text(encoding="utf-8") for file in files if file.suffix == ".py")
    assert not [name for name in OWN_TEST.findall(header) if f"def {name}(" not in tests]

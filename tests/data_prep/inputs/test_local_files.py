"""Nothing that a glob leaves out goes unsaid, and nothing that is built is taken for input."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.prep_helpers import (
    build,
    run,
    source,
    speeches,
    stamps,
    write_jsonl,
    write_mixture,
    write_parquet,
)

from data_prep import train_tokenizer
from data_prep.errors import UserError
from data_prep.inputs.local_files import escaped, refuse_inside, warn_of_gaps
from data_prep.inputs.sources import find_inputs
from data_prep.manifest import load_manifest

pytest_plugins = ("support.prep_fixtures",)


def find_error(base: Path, pattern: str) -> str:
    with pytest.raises(UserError, match=r"^here: ") as caught:
        find_inputs(base, pattern, "here")
    return str(caught.value)


@pytest.mark.parametrize("pattern", ["*.txt", "a.txt", "?.txt", "**/*.txt", "../in/*.txt"])
@pytest.mark.parametrize("target", ["gone.txt", "a.txt", "/nowhere/a.txt"])
def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path, pattern: str, target: str) -> None:
    base = tmp_path / "in"
    base.mkdir()
    (base / "b.txt").write_text("b")
    (base / "a.txt").symlink_to(target)
    message = find_error(base, pattern)
    assert (
        f"a.txt: is a link that leads nowhere (to {target}); bring back what it leads to, or "
        "remove it" in message
    )


def test_a_folder_s_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    (tmp_path / "c").symlink_to(tmp_path / "gone")
    assert "c: is a link that leads nowhere" in find_error(tmp_path, "*/x.txt")
    assert len(find_inputs(tmp_path, "[ab]/x.txt", "here")) == 2
    (tmp_path / "c").unlink()
    (tmp_path / "c").symlink_to(tmp_path / "a")
    assert len(find_inputs(tmp_path, "*/x.txt", "here")) == 3


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_a_folder_that_may_not_be_listed_is_an_error(open_place: Path) -> None:
    for name in ("a", "b"):
        (open_place / name).mkdir()
        (open_place / name / "x.txt").write_text(name)
    (open_place / "b").chmod(0)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)  # root may list anything
    try:
        assert "b: may not be listed; check its permissions" in find_error(open_place, "*/x.txt")
        assert len(find_inputs(open_place, "a/*.txt", "here")) == 1
    finally:
        os.seteuid(me)
        (open_place / "b").chmod(0o755)


@pytest.mark.parametrize("kind", ["a file", "a folder", "the place itself"])
def test_names_that_are_not_utf8_are_refused_when_listed(tmp_path: Path, kind: str) -> None:
    strange = os.fsdecode(b"caf\xe9")
    base = tmp_path / strange if kind == "the place itself" else tmp_path
    folder = base / strange if kind == "a folder" else base
    folder.mkdir(exist_ok=True)
    (folder / (f"{strange}.txt" if kind == "a file" else "a.txt")).write_text("x")
    (folder / "b.txt").write_text("x")
    for pattern in ("**/*.txt", "*/*.txt" if kind == "a folder" else "*.txt"):
        message = find_error(base, pattern)
        assert "caf\\xe9" in message
        assert message.endswith("its name is not UTF-8; rename it")
        message.encode()
    if kind != "the place itself":
        assert "not UTF-8" in find_error(Path("/nowhere"), f"file://{tmp_path}/**/*.txt")


def test_names_of_any_alphabet_are_taken(tmp_path: Path) -> None:
    for name in ("日本語.txt", "naïve 🙂.txt", "a\nb.txt", "'\".txt"):
        (tmp_path / name).write_text("x")
    assert len(find_inputs(tmp_path, "*.txt", "here")) == 4
    assert escaped("日本語") == "日本語"


def test_a_command_prints_names_that_are_not_utf8(tmp_path: Path) -> None:
    """Of a directory given on the command line: no traceback at the end of the work."""
    write_jsonl(tmp_path / "a.jsonl", speeches(5))
    out = tmp_path / os.fsdecode(b"caf\xe9")
    flags = [
        "--vocab-size",
        "300",
        "--source",
        str(tmp_path / "a.jsonl"),
        "--output-dir",
        os.fsdecode(out),
    ]
    result = run([sys.executable, "-m", "data_prep.train_tokenizer", *flags])
    assert result.returncode == 0, result.stderr
    assert "caf\\udce9" in result.stdout
    assert (out / "tokenizer.json").is_file()
    assert os.fsencode(out) in os.fsencode(
        json.loads((out / "training.json").read_bytes())["command"]
    )


GAPS = {
    "a gap": (
        [0, 1, 3],
        5,
        "2 of 5 parts are not there: in/x-00002-of-00005.txt, in/x-00004-of-00005.txt; fetch them",
    ),
    "counted from 1": (
        [1, 2, 4, 5],
        5,
        "1 of 5 parts are not there: in/x-00003-of-00005.txt; fetch",
    ),
    "the first": (
        [1, 2, 3, 4, 6],
        7,
        "2 of 7 parts are not there: in/x-00000-of-00007.txt, in/x-00005-of-00007.txt;",
    ),
    "many": (
        [0],
        900,
        "899 of 900 parts are not there: in/x-00001-of-00900.txt, in/x-00002-of-00900.txt, "
        "in/x-00003-of-00900.txt and 896 more; fetch",
    ),
    "whole": (range(5), 5, ""),
    "whole, from 1": (range(1, 6), 5, ""),
}


@pytest.mark.parametrize("kind", GAPS)
def test_missing_parts_are_warned_of(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers, total, expected = GAPS[kind]
    (tmp_path / "in").mkdir()
    for number in numbers:
        (tmp_path / "in" / f"x-{number:05d}-of-{total:05d}.txt").write_text("x")
    (tmp_path / "in" / "y-00000-of-00001.txt").write_text("x")
    assert len(find_inputs(tmp_path, "in/*.txt", "here")) == len(numbers) + 1
    said = capsys.readouterr().err
    assert said.startswith(f"warning: here: {expected}") if expected else said == ""
    assert said.count("\n") == bool(expected)
    # named by itself: it is meant
    find_inputs(tmp_path, f"in/x-{next(iter(numbers)):05d}-of-{total:05d}.txt", "here")
    assert capsys.readouterr().err == ""


def test_parts_of_several_families_and_of_remote_files(capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        f"s3://bucket/{split}-0000{i}-of-00003.parquet"
        for split in ("train", "test")
        for i in (0, 2)
    ]
    warn_of_gaps([*names, "s3://bucket/other.parquet", "x-1-of-2"], "here")
    assert capsys.readouterr().err.splitlines() == [
        f"warning: here: 1 of 3 parts are not there: s3://bucket/{split}-00001-of-00003.parquet; "
        "fetch them unless that is meant"
        for split in ("train", "test")
    ]


def test_parts_with_hashes_of_their_own_are_one_family(capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        f"data/train-{i:05d}-of-00003-{'0123456789abcdef'[i:]}{'0' * i}.parquet" for i in range(3)
    ]
    warn_of_gaps(names, "here")
    assert capsys.readouterr().err == ""
    warn_of_gaps(names[1:], "here")
    expected = (
        "1 of 3 parts are not there: data/train-00000-of-00003-*.parquet; fetch them unless that "
        "is meant"
    )
    assert capsys.readouterr().err == f"warning: here: {expected}\n"


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_one_file_by_two_names_of_a_source_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], link: Callable[[Path, Path], None]
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    assert len(find_inputs(tmp_path, "*.txt", "here")) == 2
    assert capsys.readouterr().err == ""
    link(tmp_path / "a.txt", tmp_path / "c.txt")
    assert len(find_inputs(tmp_path, "*.txt", "here")) == 3
    expected = (
        "warning: here: c.txt and a.txt are one file (a link), so its text counts twice; "
        "name one of the two\n"
    )
    assert capsys.readouterr().err == expected


# Inputs inside of the output


@pytest.mark.parametrize(
    "kind", ["a glob", "a recursive glob", "a directory", "a tokenizer", "through a link"]
)
def test_inputs_inside_the_output_are_refused_and_a_complete_data_set_stays(
    tmp_path: Path, tokenizer_dir: Path, kind: str
) -> None:
    write_parquet(tmp_path / "a.parquet", speeches(20))
    write_jsonl(tmp_path / "b.json", speeches(20))
    good = write_mixture(tmp_path, tokenizer_dir, [source("a", "a.parquet")])
    out = tmp_path / "out"
    build(good, out)
    before = stamps(out)
    (tmp_path / "link").symlink_to(out)
    entry = {
        "a glob": source("a", "*/*.json", format="jsonl"),
        "a recursive glob": source("a", "**/*.json", format="jsonl"),
        "a directory": source("a", "out/units/a", format="save_to_disk"),
        "a tokenizer": source("a", "a.parquet"),
        "through a link": source("a", "link/manifest.json", format="jsonl"),
    }[kind]
    if kind == "a directory":
        for name in ("state.json", "data-00000-of-00001.arrow"):
            (out / "units" / "a" / name).write_text("{}")
        before = stamps(out)
    mixture = write_mixture(
        tmp_path, out / "tokenizer" if kind == "a tokenizer" else tokenizer_dir, [entry]
    )
    with pytest.raises(UserError) as caught:
        build(mixture, out)
    assert (
        f"lies inside --output-dir {out}, which holds what is built; name other files, or choose"
        in str(caught.value)
    )
    assert stamps(out) == before
    assert load_manifest(out)


def test_what_lies_beside_the_output_is_no_part_of_it(tmp_path: Path) -> None:
    refuse_inside(
        tmp_path / "out",
        [str(tmp_path / "out.txt"), str(tmp_path / "output" / "a"), "s3://out/a"],
        "here",
    )
    for inside in (tmp_path / "out" / "a", tmp_path / "out" / "deep" / "a"):
        for name in (str(inside), f"file://{inside}"):
            with pytest.raises(UserError, match="lies inside"):
                refuse_inside(tmp_path / "out", [name], "here")


def test_a_tokenizer_is_trained_on_all_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("gone")
    (tmp_path / "b.txt").write_text("text")
    flags = [
        "--vocab-size",
        "300",
        "--source",
        f"{tmp_path}/*.txt",
        "--output-dir",
        str(tmp_path / "tokenizer"),
    ]
    with pytest.raises(UserError, match="is a link that leads nowhere"):
        train_tokenizer.main(flags)

"""Many small files of JSON lines share work units; every document keeps its file and its line."""

import gzip
import json
from pathlib import Path

import pytest
from support.prep_helpers import build, contents, decoded, flip_byte, source, stamps, write_mixture

from data_prep import show, verify
from data_prep.building import work_units
from data_prep.building.build_plan import cut_as_before
from data_prep.building.mixture import load_mixture
from data_prep.building.work_units import FEW_FILES, apart, cut_units
from data_prep.formats.work_unit import WorkUnit
from data_prep.inputs.sources import find_inputs
from data_prep.manifest import Manifest, load_manifest
from data_prep.shards import ShardReader
from data_prep.verify import find_problems

pytest_plugins = ("support.prep_fixtures",)

FILES = 60  # more than FEW_FILES


def write_small_files(directory: Path, suffix: str = "jsonl") -> dict[tuple[str, int], str]:
    """Files of 0 to 4 lines, blank and empty ones among them; what is in them, by file and row."""
    directory.mkdir(exist_ok=True)
    found = {}
    for number in range(FILES):
        name, lines = f"{number:03}.{suffix}", []
        for row in range(number % 5):
            text = "" if (number, row) == (9, 1) else f"document {row} of file {number}, é"
            lines.append("" if (number, row) == (13, 1) else json.dumps({"text": text}))
            if lines[-1] and text:
                found[f"{directory.name}/{name}", row] = text
        content = "\n".join(lines).encode() + b"\n" * (number % 2)
        (directory / name).write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    return found


def small_mixture(base: Path, tokenizer_dir: Path, suffix: str = "jsonl", **more: object) -> Path:
    sources = [source("s", f"many/*.{suffix}", format=suffix)]
    return write_mixture(base, tokenizer_dir, sources, validation_fraction=0.2, **more)


def files_below(data_dir: Path) -> int:
    return len(stamps(data_dir))


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_documents_come_back_with_their_files_and_rows(
    tmp_path: Path, tokenizer_dir: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = write_small_files(tmp_path / "many", suffix)
    manifest = build(small_mixture(tmp_path, tokenizer_dir, suffix), tmp_path / "out")
    assert decoded(tmp_path / "out") == expected
    assert files_below(tmp_path / "out") < 12
    assert manifest.sources[0].empty_documents == 1
    (shard,) = manifest.shards_of("train")
    assert (shard.first_row, shard.rows, len(shard.inputs), len(shard.input_rows)) == (
        0,
        sum(shard.input_rows),
        60,
        60,
    )
    assert not list(find_problems(tmp_path / "out", manifest))
    reader = ShardReader(tmp_path / "out")
    starts = reader.documents(shard)[:, 0].tolist()
    for number in (0, len(starts) // 2, len(starts) - 1):
        capsys.readouterr()
        show.main([str(tmp_path / "out"), "--trace", f"{shard.path}:{starts[number]}"])
        name, row = reader.document(shard, number)[1]
        assert f"input        {name}, row {row}\n" in capsys.readouterr().out


def test_bad_documents_are_named_by_file_and_row(tmp_path: Path, tokenizer_dir: Path) -> None:
    expected = write_small_files(tmp_path / "many")
    with (tmp_path / "many" / "042.jsonl").open("ab") as file:
        file.write(b'\nnonsense\n{"text": null}\n{"text": "good"}\n')
    first = len((tmp_path / "many" / "042.jsonl").read_bytes().split(b"\n")) - 4
    strict = small_mixture(tmp_path, tokenizer_dir)
    with pytest.raises(Exception, match=rf"042\.jsonl: line {first + 1}: not valid JSON"):
        build(strict, tmp_path / "out")
    manifest = build(
        small_mixture(tmp_path, tokenizer_dir, on_bad_document="skip", max_bad_fraction=1),
        tmp_path / "out",
    )
    assert [(bad.input, bad.row) for bad in manifest.bad_documents] == [
        ("many/042.jsonl", first), ("many/042.jsonl", first + 1),
    ]  # fmt: skip
    assert decoded(tmp_path / "out") == expected | {("many/042.jsonl", first + 2): "good"}


def cut(directory: Path, unit_bytes: int | None = None) -> list[WorkUnit]:
    files = find_inputs(directory, "many/*", "here")
    return cut_units(files, source="s", format="jsonl", text_field="text", unit_bytes=unit_bytes)


def test_few_files_and_large_ones_keep_the_units_that_they_had(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for number in range(FEW_FILES):
        (tmp_path / "many" / f"{number:03}.jsonl").write_text('{"text": "x"}\n')
    few = cut(tmp_path)
    assert [unit.name for unit in few] == [
        f"{number:05d}-{number:03}-00000" for number in range(FEW_FILES)
    ]
    (tmp_path / "many" / "001.jsonl").write_text('{"text": "x"}\n' * 100)
    (tmp_path / "many" / "999.jsonl").write_text('{"text": "x"}\n')
    units = cut(tmp_path, unit_bytes=1000)
    assert [unit.name for unit in units] == [
        "00000-000-00000", "00001-001-00000", "00001-001-00001", "00002-002-00000",
    ]  # fmt: skip
    assert [len(unit.files) for unit in units] == [1, 1, 1, FEW_FILES - 1]
    assert units[0] == few[0]
    separate = apart(units)
    assert [unit.name for unit in separate[3:]] == [
        *(unit.name for unit in few[2:]), f"{FEW_FILES:05d}-999-00000",
    ]  # fmt: skip
    assert separate[3:-1] == few[2:]


@pytest.fixture
def built_before(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Manifest]:
    """A data set as it was built when each small file had a unit of its own; and its mixture."""
    write_small_files(tmp_path / "many")
    mixture = small_mixture(tmp_path, tokenizer_dir)
    with monkeypatch.context() as patch:
        patch.setattr(work_units, "FEW_FILES", FILES)
        manifest = build(mixture, tmp_path / "out")
    assert files_below(tmp_path / "out") > 2 * FILES
    return mixture, manifest


def test_a_data_set_built_before_stays_as_it_is(
    tmp_path: Path, built_before: tuple[Path, Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    """Complete, built anew, gone on with after a kill, and repaired."""
    mixture, manifest = built_before
    whole = contents(tmp_path / "out")
    build(mixture, tmp_path / "out")
    assert "already complete" in capsys.readouterr().out
    (tmp_path / "out" / "manifest.json").unlink()
    assert build(mixture, tmp_path / "out").fingerprint == manifest.fingerprint
    (tmp_path / "out" / "manifest.json").unlink()
    for record in sorted((tmp_path / "out" / "units" / "s").iterdir())[3:]:
        record.unlink()
    build(mixture, tmp_path / "out")
    flip_byte(tmp_path / "out" / manifest.shards[0].path)
    verify.main([str(tmp_path / "out"), "--repair"])
    assert contents(tmp_path / "out") == whole
    assert load_manifest(tmp_path / "out") == manifest


def test_elsewhere_the_same_files_share_units(
    tmp_path: Path, built_before: tuple[Path, Manifest]
) -> None:
    mixture, _ = built_before
    units = cut(tmp_path)
    tokenizer_sha256, fraction = (
        load_manifest(tmp_path / "out").tokenizer_sha256,
        load_mixture(mixture).validation_fraction,
    )
    assert cut_as_before(units, tmp_path / "elsewhere", tokenizer_sha256, fraction) == units
    manifest = build(mixture, tmp_path / "elsewhere")
    assert len(manifest.shards) == 2
    assert decoded(tmp_path / "elsewhere") == decoded(tmp_path / "out")
    flip_byte(tmp_path / "elsewhere" / manifest.shards[0].path)
    verify.main([str(tmp_path / "elsewhere"), "--repair"])
    assert not list(find_problems(tmp_path / "elsewhere", manifest))

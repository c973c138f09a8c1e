"""`verify` finds every kind of damage and names the file."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep import verify
from data_prep.errors import UserError
from data_prep.shards import Manifest, load_manifest

pytest_plugins = ("prep_fixtures",)


@pytest.fixture
def copy(tmp_path: Path, dataset: Path) -> Path:
    """A data set to damage."""
    shutil.copytree(dataset, tmp_path / "copy")
    return tmp_path / "copy"


def bad_lines(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    with pytest.raises(UserError) as caught:
        verify.main([str(data_dir)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bad: ")]
    assert f"{len(lines)} bad" in str(caught.value)
    assert lines[0].removeprefix("bad: ") in str(caught.value)
    return lines


def flip_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_good_data_set(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify.main([str(dataset)])
    out = capsys.readouterr().out
    assert out.startswith(f"OK: {dataset}: ")
    assert load_manifest(dataset).fingerprint in out


@pytest.mark.parametrize("at", [-1, 20, 200])
@pytest.mark.parametrize("suffix", [".npy", ".documents.npy"])
def test_one_flipped_byte(copy: Path, capsys: pytest.CaptureFixture[str], suffix: str, at: int) -> None:
    path = copy / load_manifest(copy).shards[0].path.replace(".npy", suffix)
    flip_byte(path, at)
    (line,) = bad_lines(copy, capsys)
    assert str(path) in line


@pytest.mark.parametrize("suffix", [".npy", ".documents.npy"])
def test_truncated_and_missing_files(copy: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    path = copy / load_manifest(copy).shards[-1].path.replace(".npy", suffix)
    path.write_bytes(path.read_bytes()[:-2])
    (line,) = bad_lines(copy, capsys)
    assert f"{path}: truncated or damaged" in line
    path.unlink()
    (line,) = bad_lines(copy, capsys)
    assert f"{path}: missing" in line


def test_every_bad_file_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *_, last = load_manifest(copy).shards
    flip_byte(copy / first.path, -1)
    flip_byte(copy / last.path, -1)
    (copy / "shards" / "stray.npy").write_bytes(b"")
    flip_byte(copy / "tokenizer" / "tokenizer.json", -1)
    lines = bad_lines(copy, capsys)
    assert [line.split(":")[1].strip() for line in lines] == [
        str(copy / "tokenizer"),
        str(copy / first.path),
        str(copy / last.path),
        str(copy / "shards" / "stray.npy"),
    ]


def rewrite(data_dir: Path, change: Callable[[dict], None]) -> Manifest:
    """Change the manifest's JSON, as a builder with a defect would have written it."""
    path = data_dir / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    (data_dir / "build.json").unlink(missing_ok=True)
    return load_manifest(data_dir)


def test_ids_beyond_the_vocabulary(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(copy, lambda content: content.update(vocab_size=300))
    assert "the vocabulary ends at 299" in bad_lines(copy, capsys)[0]


def test_documents_that_end_elsewhere(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = load_manifest(copy).shards[0]
    path = copy / shard.index_path
    index = np.load(path)
    index[1, 0] += 1
    np.save(path, index)
    rewrite(copy, lambda content: content["shards"][0].update(index_xxh3_128=verify.digest_file(path)))
    (line,) = bad_lines(copy, capsys)
    assert f"{copy / shard.path}: documents don't end where {shard.index_path} says" in line


def test_rows_out_of_order(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = load_manifest(copy).shards[0]
    path = copy / shard.index_path
    index = np.load(path)
    index[1, 1] = index[0, 1]
    np.save(path, index)
    rewrite(copy, lambda content: content["shards"][0].update(index_xxh3_128=verify.digest_file(path)))
    (line,) = bad_lines(copy, capsys)
    assert f"{path}: rows are not increasing" in line


def test_a_changed_figure_in_the_manifest(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "manifest.json"
    text = path.read_text(encoding="utf-8")
    old = load_manifest(copy).shards[0].text_bytes
    path.write_text(text.replace(f'"text_bytes": {old}', f'"text_bytes": {old + 1}', 1), encoding="utf-8")
    (line,) = bad_lines(copy, capsys)
    assert "is not the one in build.json" in line


@pytest.mark.parametrize("damage", ["a share", "an end"])
def test_a_manifest_that_no_builder_wrote(copy: Path, damage: str) -> None:
    path = copy / "manifest.json"
    text = path.read_text(encoding="utf-8")
    changed = re.sub(r'(?<="share": )\d', "9", text, count=1) if damage == "a share" else text + "\n"
    assert changed != text
    path.write_text(changed, encoding="utf-8")
    with pytest.raises(UserError, match="damaged manifest"):
        verify.main([str(copy)])


def test_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json, so the data set is not complete"):
        verify.main([str(tmp_path)])

"""`verify` finds every kind of damage and names the file."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.prep_helpers import (
    build,
    contents,
    flip_byte,
    source,
    stamps,
    write_jsonl,
    write_mixture,
)

from data_prep import verify
from data_prep.errors import UserError
from data_prep.files import digest_file
from data_prep.locks import lock
from data_prep.manifest import Manifest, load_manifest
from data_prep.shards import INDEX_DTYPE, SHARD_HEADER_BYTES, TOKEN_DTYPE, open_array

pytest_plugins = ("support.prep_fixtures",)


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


def test_a_good_data_set(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify.main([str(dataset)])
    out = capsys.readouterr().out
    assert out.startswith(f"OK: {dataset}: ")
    assert load_manifest(dataset).fingerprint in out


@pytest.mark.parametrize("at", [-1, 20, 200])
@pytest.mark.parametrize("suffix", [".npy", ".documents.npy"])
def test_one_flipped_byte(
    copy: Path, capsys: pytest.CaptureFixture[str], suffix: str, at: int
) -> None:
    path = copy / load_manifest(copy).shards[0].path.replace(".npy", suffix)
    flip_byte(path, at)
    (line,) = bad_lines(copy, capsys)
    assert str(path) in line


@pytest.mark.parametrize("suffix", [".npy", ".documents.npy"])
def test_every_flipped_bit_of_a_header(copy: Path, suffix: str) -> None:
    """NumPy's own reader raises four kinds of exceptions on these, or none."""
    shard = load_manifest(copy).shards[0]
    is_index = suffix != ".npy"
    name = shard.index_path if is_index else shard.path
    shape, dtype = (
        ((shard.documents, 2), INDEX_DTYPE) if is_index else ((shard.tokens,), TOKEN_DTYPE)
    )
    whole = (copy / name).read_bytes()
    assert open_array(copy, name, dtype, shape).shape == shape
    with (copy / name).open("r+b") as file:
        for bit in range(8 * SHARD_HEADER_BYTES):
            place = bit // 8
            file.seek(place)
            file.write(bytes([whole[place] ^ (1 << bit % 8)]))
            file.flush()
            with pytest.raises(
                UserError, match=r"truncated or damaged \(its header is not that of"
            ):
                open_array(copy, name, dtype, shape)
            file.seek(place)
            file.write(whole[place : place + 1])
    for place in (0, 8, 20, 70, 127):
        flip_byte(copy / name, place)
        assert repair(copy) == {shard.path, shard.index_path}
    assert (copy / name).read_bytes() == whole


@pytest.mark.parametrize("content", [b"\xff", b"", b"[" * 100_000, b'{"fingerprint": "\xe9"}'])
def test_a_damaged_build_json_says_that_it_can_go(
    copy: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (copy / "build.json").write_bytes(content)
    (line,) = bad_lines(copy, capsys)
    assert f"{copy / 'build.json'}: not valid JSON (" in line
    assert line.endswith("; remove it: it tells how the data set was made, and is no part of it")
    (copy / "build.json").unlink()
    verify.main([str(copy)])


@pytest.mark.parametrize("suffix", [".npy", ".documents.npy"])
def test_truncated_and_missing_files(
    copy: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    path = copy / load_manifest(copy).shards[-1].path.replace(".npy", suffix)
    path.write_bytes(path.read_bytes()[:-2])
    (line,) = bad_lines(copy, capsys)
    assert f"{path}: truncated or damaged" in line
    path.unlink()
    with pytest.raises(UserError) as caught:
        verify.main([str(copy)])
    advice = f"{path}: missing, but the manifest lists it; --repair builds bad files again"
    assert str(caught.value) == f"{copy}: 1 bad file, the first: {advice}"
    with pytest.raises(
        UserError, match=r"; python -m data_prep\.verify DATASET --repair builds it again"
    ):
        open_array(copy, path.relative_to(copy).as_posix(), TOKEN_DTYPE, (1,))
    (copy / "stray").touch()
    verify_and_repair = [str(copy), "--repair"]
    with pytest.raises(UserError, match=r"stray: not part of the data set; remove it$"):
        verify.main(verify_and_repair)


def test_every_bad_file_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *_, last = load_manifest(copy).shards
    flip_byte(copy / first.path, -1)
    flip_byte(copy / last.path, -1)
    (copy / "shards" / "stray.npy").write_bytes(b"")
    (copy / "units" / "more" / "stray.json.tmp").write_bytes(b"")
    flip_byte(copy / "tokenizer" / "tokenizer.json", -1)
    lines = bad_lines(copy, capsys)
    assert [line.split(":")[1].strip() for line in lines] == [
        str(copy / "tokenizer"),
        str(copy / first.path),
        str(copy / last.path),
        str(copy / "shards" / "stray.npy"),
        str(copy / "units" / "more" / "stray.json.tmp"),
    ]


def rewrite(data_dir: Path, change: Callable[[dict], None]) -> Manifest:
    """Change the manifest's JSON, as a builder with a defect would have written it."""
    path = data_dir / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(
        json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
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
    rewrite(copy, lambda content: content["shards"][0].update(index_xxh3_128=digest_file(path)))
    (line,) = bad_lines(copy, capsys)
    assert f"{copy / shard.path}: documents don't end where {shard.index_path} says" in line


def test_rows_out_of_order(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = load_manifest(copy).shards[0]
    path = copy / shard.index_path
    index = np.load(path)
    index[1, 1] = index[0, 1]
    np.save(path, index)
    rewrite(copy, lambda content: content["shards"][0].update(index_xxh3_128=digest_file(path)))
    (line,) = bad_lines(copy, capsys)
    assert f"{path}: rows are not increasing" in line


def test_a_changed_figure_in_the_manifest(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "manifest.json"
    text = path.read_text(encoding="utf-8")
    old = load_manifest(copy).shards[0].text_bytes
    path.write_text(
        text.replace(f'"text_bytes": {old}', f'"text_bytes": {old + 1}', 1), encoding="utf-8"
    )
    (line,) = bad_lines(copy, capsys)
    assert "is not the one in build.json; remove its manifest.json and run python -m" in line


def test_a_damaged_manifest_is_made_again_from_the_units(dataset: Path, copy: Path) -> None:
    """What the advice says."""
    flip_byte(copy / "manifest.json", 200)
    with pytest.raises(
        UserError,
        match=r"; remove its manifest\.json and run python -m data_prep\.build_shards again",
    ):
        verify.main([str(copy)])
    (copy / "manifest.json").unlink()
    before = stamps(copy)
    build(dataset.parent / "mixture.yaml", copy)
    assert contents(copy) == contents(dataset)
    assert all(
        stamps(copy)[name] == stamp
        for name, stamp in before.items()
        if name.startswith(("shards/", "units/"))
    )
    verify.main([str(copy)])


@pytest.mark.parametrize("damage", ["a share", "an end"])
def test_a_manifest_that_no_builder_wrote(copy: Path, damage: str) -> None:
    path = copy / "manifest.json"
    text = path.read_text(encoding="utf-8")
    changed = (
        re.sub(r'(?<="share": )\d', "9", text, count=1) if damage == "a share" else text + "\n"
    )
    assert changed != text
    path.write_text(changed, encoding="utf-8")
    with pytest.raises(UserError, match="damaged manifest"):
        verify.main([str(copy)])


def repair(data_dir: Path, *flags: str) -> set[str]:
    """Names of the files that a repair wrote again."""
    before = stamps(data_dir)
    verify.main([str(data_dir), "--repair", *flags])
    return {name for name, stamp in stamps(data_dir).items() if before.get(name) != stamp}


def test_repair_builds_the_bad_shards_and_nothing_else(
    dataset: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Many damages at once: flipped, truncated, missing; the tokenizer, and one more file in it."""
    first, second, *_, last = load_manifest(copy).shards
    flip_byte(copy / first.path, 200)
    flip_byte(copy / first.index_path, 200)
    os.truncate(copy / second.path, 300)
    (copy / last.index_path).unlink()
    flip_byte(copy / "tokenizer" / "tokenizer.json", 200)
    (copy / "tokenizer" / "special_tokens_map.json").write_text("{}")
    bad = [path for shard in (first, second, last) for path in (shard.path, shard.index_path)]
    assert repair(copy) == {*bad, "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    out = capsys.readouterr().out
    assert f"repaired: {copy / first.path}\n" in out
    assert "OK: " in out.splitlines()[-1]
    assert contents(copy) == contents(dataset)
    assert repair(copy) == set()


def test_repair_of_one_split_leaves_the_other_alone(dataset: Path, copy: Path) -> None:
    shard = load_manifest(copy).shards_of("validation")[0]
    shutil.rmtree((copy / shard.path).parent)
    assert shard.path in repair(copy)
    assert contents(copy) == contents(dataset)


def test_repair_leaves_strays_to_their_owner(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_byte(copy / load_manifest(copy).shards[0].path)
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(
        UserError,
        match=r"1 bad file, the first: .*notes\.txt: not part of the data set; remove it$",
    ):
        verify.main([str(copy), "--repair"])
    assert (copy / "notes.txt").read_text() == "mine"
    assert "repaired: " in capsys.readouterr().out


def test_repair_where_the_mixture_is_now(
    dataset: Path, tmp_path: Path, texts: list[str], tokenizer_dir: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    write_jsonl(base / "a.jsonl", texts)
    mixture = write_mixture(base, tokenizer_dir, [source("a", "a.jsonl", format="jsonl")])
    build(mixture, tmp_path / "out")
    shard = load_manifest(tmp_path / "out").shards[0]
    base.rename(tmp_path / "moved")
    flip_byte(tmp_path / "out" / shard.path)
    before = stamps(tmp_path / "out")
    with pytest.raises(
        UserError, match=r"base/mixture\.yaml: not there, .* say where it is with --mixture FILE"
    ):
        verify.main([str(tmp_path / "out"), "--repair"])
    assert stamps(tmp_path / "out") == before
    moved = ("--mixture", str(tmp_path / "moved" / "mixture.yaml"))
    assert repair(tmp_path / "out", *moved) == {shard.path, shard.index_path}
    flip_byte(tmp_path / "out" / shard.path)
    (tmp_path / "out" / "build.json").unlink()
    with pytest.raises(UserError, match="say where it is with --mixture FILE"):
        verify.main([str(tmp_path / "out"), "--repair"])
    assert repair(tmp_path / "out", *moved) == {shard.path, shard.index_path}


def test_a_repair_is_alone_in_its_directory(dataset: Path, copy: Path) -> None:
    """Beside a build or another repair; looking does no harm."""
    flip_byte(copy / load_manifest(copy).shards[0].path)
    with lock(copy, "at work", "--output-dir"):
        before = contents(copy)
        with pytest.raises(
            UserError, match="copy: another process is building or repairing it; wait for it"
        ):
            verify.main([str(copy), "--repair"])
        with pytest.raises(UserError, match="1 bad file"):
            verify.main([str(copy)])
        assert contents(copy) == before
    repair(copy)
    assert contents(copy) == contents(dataset)


def test_a_build_waits_for_a_repair(
    dataset: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_byte(copy / load_manifest(copy).shards[0].path)
    honest, messages = verify.make_plan, []

    def make_plan(*arguments: Any) -> Any:
        (manifest := copy / "manifest.json").rename(copy / "units" / "set-aside.json")
        with pytest.raises(UserError) as caught:
            build(dataset.parent / "mixture.yaml", copy)
        messages.append(str(caught.value))
        (copy / "units" / "set-aside.json").rename(manifest)
        return honest(*arguments)

    monkeypatch.setattr(verify, "make_plan", make_plan)
    repair(copy)
    assert len(messages) == 1
    assert (
        "another process is building or repairing it; wait for it, or give another --output-dir"
        in messages[0]
    )
    assert contents(copy) == contents(dataset)


def test_repair_takes_the_name_of_a_shipped_mixture(copy: Path) -> None:
    flip_byte(copy / load_manifest(copy).shards[0].path)
    with pytest.raises(UserError, match=r"mixtures/example\.yaml: source 'web': no file matches"):
        verify.main([str(copy), "--repair", "--mixture", "example"])
    with pytest.raises(
        UserError,
        match=r"--mixture exampel: no such mixture; give a \.yaml file or one of example, ",
    ):
        verify.main([str(copy), "--repair", "--mixture", "exampel"])


@pytest.mark.parametrize("change", ["another text", "fewer texts", "no file", "not JSON"])
def test_sources_that_are_not_what_they_were(
    tmp_path: Path, texts: list[str], tokenizer_dir: Path, change: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    build(
        write_mixture(tmp_path, tokenizer_dir, [source("a", "a.jsonl", format="jsonl")]),
        tmp_path / "out",
    )
    shard = load_manifest(tmp_path / "out").shards[0]
    flip_byte(tmp_path / "out" / shard.path)
    if change == "no file":
        path.unlink()
    elif change == "not JSON":
        path.write_text("nonsense")
    else:
        write_jsonl(path, texts[::-1] if change == "another text" else texts[:-9])
    before = stamps(tmp_path / "out")
    with pytest.raises(UserError) as caught:
        verify.main([str(tmp_path / "out"), "--repair"])
    rows = (
        f"a.jsonl: rows 0 to {len(texts) - 1}: not the text any more that {shard.path} was made "
        "of; bring it back"
    )
    expected = {
        "no file": "no file matches a.jsonl",
        "not JSON": "a.jsonl: line 1: not valid JSON",
    }.get(change, rows)
    assert expected in str(caught.value)
    assert stamps(tmp_path / "out") == before


def test_repair_of_a_data_set_of_another_tokenizer(copy: Path, tmp_path: Path) -> None:
    """Neither the data set's own copy nor the mixture's tokenizer is the one."""
    shutil.copytree(copy / "tokenizer", tmp_path / "other")
    flip_byte(copy / "tokenizer" / "tokenizer.json", -1)
    built = json.loads((copy / "build.json").read_bytes()) | {"tokenizer": str(tmp_path / "other")}
    (copy / "build.json").write_text(json.dumps(built))
    (tmp_path / "other" / "special_tokens_map.json").write_text("{}")
    with pytest.raises(UserError, match="other: not the tokenizer that made"):
        verify.main([str(copy), "--repair"])


def test_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json, so the data set is not complete"):
        verify.main([str(tmp_path)])

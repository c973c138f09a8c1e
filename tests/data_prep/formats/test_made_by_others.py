"""What datatrove's and dolma's own writers made comes back document for document; see
tests/data/make_tokenised.py.
"""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.files_of_ids import input_file
from support.prep_helpers import build, build_error, decoded, source, write_mixture
from support.runs import REPOSITORY

from data_prep.formats.pretokenized.documents import cut_ids, read_ids
from data_prep.shards import ShardReader
from data_prep.tokenizer.encode import reference_ids
from data_prep.tokenizer.load import load_tokenizer

TOKENISED = REPOSITORY / "tests" / "data" / "tokenised"
TEXTS = [
    json.loads(line)["text"]
    for line in (TOKENISED / "documents.jsonl").read_text(encoding="utf-8").splitlines()
]
MADE = {
    "datatrove": ("datatrove", "*.ds"), "datatrove_eos": ("datatrove", "*.ds"),
    "olmo": ("olmo", "*.npy"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("name", MADE)
def test_every_document_comes_back(tmp_path: Path, name: str, dtype: str) -> None:
    """Also those that spell the end-of-document token, whose id the writers put there: it is
    ordinary text to us.
    """
    format, pattern = MADE[name]
    shutil.copytree(TOKENISED / name, tmp_path / "in")
    (path,) = (tmp_path / "in").glob(pattern)
    # both write 4 bytes for larger vocabularies
    path.write_bytes(np.fromfile(path, "<u2").astype(dtype).tobytes())
    sources = [source("s", f"in/{pattern}", format=format)]
    manifest = build(write_mixture(tmp_path, TOKENISED / "tokenizer", sources), tmp_path / "out")
    found = decoded(tmp_path / "out")
    assert sorted(found.values()) == sorted(TEXTS)
    assert sorted(row for _, row in found) == [*range(len(TEXTS))]
    if format == "datatrove":  # dolma shuffles
        assert [found[place] for place in sorted(found, key=lambda place: place[1])] == TEXTS
    tokenizer, reader = load_tokenizer(TOKENISED / "tokenizer"), ShardReader(tmp_path / "out")
    assert sum(shard.tokens for shard in manifest.shards) == sum(
        len(reference_ids(tokenizer, t)) + 1 for t in TEXTS
    )
    assert all(reader.tokens(shard)[-1] == tokenizer.eos_id for shard in manifest.shards)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("unit_bytes", [1, 100, 1000])
def test_however_the_file_is_cut(name: str, unit_bytes: int) -> None:
    format, pattern = MADE[name]
    (path,) = (TOKENISED / name).glob(pattern)
    file = input_file(path)

    def documents(size: int) -> list[list[int]]:
        units = cut_ids(file, format, 0, size)
        batches = [
            batch for start, stop, _ in units for batch in read_ids(file, format, start, stop, 0)
        ]
        return [part.tolist() for ids, offsets in batches for part in np.split(ids, offsets[1:-1])]

    assert documents(unit_bytes) == documents(1 << 20)
    assert len(documents(unit_bytes)) == len(TEXTS)


def changed_index(directory: Path, format: str, ends: list[int]) -> None:
    if format == "datatrove":
        next(directory.glob("*.index")).write_bytes(np.array(ends, "<u8").tobytes())
    else:
        rows = "".join(
            f"{start},{end},id,file,0\n" for start, end in zip([0, *ends], ends, strict=False)
        )
        next(directory.glob("*.csv.gz")).write_bytes(gzip.compress(rows.encode()))


@pytest.mark.parametrize("name", ["datatrove", "olmo"])
def test_an_index_that_is_missing_or_of_another_file(tmp_path: Path, name: str) -> None:
    format, pattern = MADE[name]
    shutil.copytree(TOKENISED / name, tmp_path / "in")
    sources = [source("s", f"in/{pattern}", format=format)]
    mixture = write_mixture(tmp_path, TOKENISED / "tokenizer", sources)
    changed_index(tmp_path / "in", format, [10, 20])
    assert "says 20 ids of 2 or 4 bytes; copy both again" in build_error(mixture, tmp_path / "out")
    changed_index(tmp_path / "in", format, [10, 5, 20])
    assert "damaged, its borders don't increase; copy both again" in build_error(
        mixture, tmp_path / "out"
    )
    index = next(
        path for path in (tmp_path / "in").iterdir() if path.name.endswith((".index", ".csv.gz"))
    )
    index.write_bytes(index.read_bytes()[:-3])
    assert index.name in build_error(mixture, tmp_path / "out")
    index.unlink()
    assert f"no file matches in/{index.name}" in build_error(mixture, tmp_path / "out")


@pytest.mark.parametrize("format", ["megatron", "uint16", "datatrove", "olmo", "save_to_disk"])
def test_from_a_url_the_advice_helps(tmp_path: Path, format: str) -> None:
    """Nothing is asked of the network for the directory; a file there is listed first."""
    (tmp_path / "a.bin").write_bytes(b"\1\0\0\0")
    sources = [source("s", (tmp_path / "a.bin").as_uri(), format=format)]
    message = build_error(
        write_mixture(tmp_path, TOKENISED / "tokenizer", sources), tmp_path / "out"
    )
    assert f"{format} is read from local disks; copy it to one, name its path" in message

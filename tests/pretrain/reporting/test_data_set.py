"""What the report takes from the shards: document lengths, and the documents of steps."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.reports import Words, page_of

from data_prep.shards import ShardReader
from pretrain import trace
from pretrain.config.load import load_recipe
from pretrain.reporting import data_set
from pretrain.reporting.data_set import documents_of_steps, length_pieces, source_lengths


def lengths_by_hand(data: Path) -> list[int]:
    """Tokens of every document, found by the ids that end them."""
    reader = ShardReader(data)
    end = reader.manifest.eos_id
    lengths: list[int] = []
    for shard in reader.manifest.shards:
        ends = np.flatnonzero(reader.tokens(shard) == end)
        lengths += (np.diff(ends, prepend=-1) - 1).tolist()
    return lengths


def test_document_lengths_are_those_of_the_shards(text_data: Path) -> None:
    fingerprint = ShardReader(text_data).manifest.fingerprint
    (found,) = source_lengths(text_data, fingerprint)
    expected = lengths_by_hand(text_data)
    assert (found.name, found.documents, found.counted) == ("sotu", 30, 30)
    assert found.longest == max(expected)
    assert found.median == np.median(expected)
    bits = Counter(length.bit_length() for length in expected)
    assert {i: n for i, n in enumerate(found.by_bits) if n} == dict(bits)


def test_of_many_documents_pieces_are_looked_at_evenly(
    text_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a hundred million, with pieces of 4 instead of 65,536."""
    reader = ShardReader(text_data)
    shards = list(reader.manifest.shards)
    monkeypatch.setattr(data_set, "PIECE_DOCUMENTS", 4)
    every_one = np.concatenate(list(length_pieces(text_data, shards, 1)))
    assert every_one.tolist() == lengths_by_hand(text_data)
    pieces = list(length_pieces(text_data, shards, 3))
    assert [len(piece) for piece in pieces][:2] == [4, 4]
    assert pieces[1].tolist() == every_one[12:16].tolist()


def test_documents_of_a_step_are_those_that_trace_names(
    text_data: Path, text_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(str(text_run / "recipe.yaml"))
    documents = documents_of_steps(text_data, recipe, [3, 11])
    assert list(documents) == [3, 11]
    found = documents[11]
    assert (found.rows, found.of_rows) == (6, 6)
    for row in range(6):
        command = ["--run-dir", str(text_run), "--data-dir", str(text_data), "--step", "11"]
        trace.main([*command, "--row", str(row)])
    traced = capsys.readouterr().out
    headings = [line for line in traced.splitlines() if line.startswith("addresses.jsonl, row ")]
    assert len(found.named) + found.others == len(headings)
    for name in found.named:
        place, text = name.split(": ", 1)
        assert any(heading.startswith(f"{place}: ") for heading in headings)
        assert " ".join(text.split())[:20] in " ".join(traced.replace("⏎", " ").split())


def test_the_page_draws_lengths_and_names_documents(
    text_data: Path, text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(text_run, run_dir)
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    lines[11] = json.dumps({**json.loads(lines[11]), "loss": 88.5})
    metrics.write_text("\n".join(lines) + "\n")
    page = page_of(tmp_path / "report.html", run_dir)
    printed = capsys.readouterr().out
    words = Words(page)
    lengths = lengths_by_hand(text_data)
    assert "sotu: documents by their tokens" in words.cells
    assert f"longest {max(lengths):,}" in words.text
    common, documents = Counter(length.bit_length() for length in lengths).most_common(1)[0]
    row = words.cells.index(f"{1 << (common - 1):,} to {(1 << common) - 1:,}")
    assert f"{documents} ({documents / 30:.1%})" in words.cells[row : row + 4]
    assert '<span style="width: 100.0%">' in page
    assert "documents of its batch" in words.cells
    recipe = load_recipe(str(run_dir / "recipe.yaml"))
    named = documents_of_steps(text_data, recipe, [11])[11].named
    cell = words.cells[words.cells.index("88.5000") + 2]
    assert cell.splitlines()[: len(named)] == list(named)
    assert f"above those before; {named[0]}" in printed


def test_a_damaged_index_becomes_a_note(
    text_data: Path, text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    run_dir = tmp_path / "run"
    shutil.copytree(text_data, data)
    shutil.copytree(text_run, run_dir)
    index = next(data.rglob("*.documents.npy"))
    index.write_bytes(index.read_bytes()[:-8])
    for manifest in (run_dir / "checkpoints").glob("step-*/manifest.json"):
        content = manifest.read_text().replace(str(text_data), str(data))
        manifest.write_text(content)
    words = Words(page_of(tmp_path / "report.html", run_dir))
    noted = capsys.readouterr().err
    assert "not all that its shards tell is shown" in noted
    assert f"{index}: truncated or damaged" in noted
    assert "sotu: documents by their tokens" not in words.cells
    assert "epochs seen" in words.cells

"""Arrow arrays through their buffers: what pyarrow's own conversions give, without pandas."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from support.prep_helpers import source, write_jsonl, write_mixture, write_parquet
from support.runs import REPOSITORY

from data_prep.formats.flat_arrays import (
    arrow_ids,
    arrow_mask,
    byte_lengths,
    character_counts,
    large_strings,
    null_mask,
    text_bounds,
)  # fmt: skip

TEXTS = ["", "a", "naïve 日本語", None, "🙂" * 9, None, "", "b" * 70, *["ë"] * 20]
WHOLE = pa.array(TEXTS, pa.large_string())
BUILD = """
import sys
from data_prep import build_shards
build_shards.main(sys.argv[1:])
print("pandas" in sys.modules)
"""


@pytest.mark.parametrize(
    "texts",
    [
        WHOLE,
        WHOLE.slice(3),
        WHOLE.slice(2, 5),
        WHOLE.slice(9, 17),
        WHOLE.slice(3, 1),
        WHOLE.slice(4, 0),
        WHOLE[:0],
    ],
)
def test_texts_are_measured_as_pyarrow_measures_them(texts: pa.LargeStringArray) -> None:
    """Whole arrays, slices, nulls, no texts at all."""
    expected = pc.fill_null(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False)
    np.testing.assert_array_equal(byte_lengths(texts), expected)
    np.testing.assert_array_equal(null_mask(texts), texts.is_null().to_numpy(zero_copy_only=False))
    assert len(text_bounds(texts)) == len(texts) + 1
    present = texts.drop_null()
    np.testing.assert_array_equal(
        character_counts(present), [len(text) for text in present.to_pylist()]
    )


def test_a_null_that_hides_bytes_has_length_0() -> None:
    """Arrow allows them beneath a null."""
    offsets, data = pa.py_buffer(np.array([0, 2, 5])), pa.py_buffer(b"abcde")
    texts = pa.LargeStringArray.from_buffers(2, offsets, data, pa.py_buffer(b"\2"))
    assert byte_lengths(texts).tolist() == [0, 3]


@pytest.mark.parametrize("size", [0, 1, 8, 9, 64, 65])
def test_what_is_handed_to_arrow(size: int) -> None:
    """Masks, indices and texts of sizes around a byte of bits."""
    chosen = np.random.default_rng(size).random(size) < 0.5
    assert arrow_mask(chosen).to_pylist() == chosen.tolist()
    ids = np.arange(2 * size, dtype=np.uint32)[::2]
    assert arrow_ids(ids).to_pylist() == ids.tolist()
    texts = [f"ü{number}" * number for number in range(size)]
    assert large_strings([text.encode() for text in texts]).to_pylist() == texts


def test_a_build_does_not_import_pandas(
    tmp_path: Path, tokenizer_dir: Path, texts: list[str]
) -> None:
    """Of parquet and JSON lines with documents to leave out, and one that is cut to be proved."""
    write_parquet(tmp_path / "a.parquet", [*texts, None, ""])
    write_jsonl(tmp_path / "b.jsonl", [*texts, "long words " * 10_000, ""])
    sources = [source("a", "a.parquet"), source("b", "b.jsonl", format="jsonl")]
    mixture = write_mixture(
        tmp_path, tokenizer_dir, sources, on_bad_document="skip", max_bad_fraction=1
    )
    flags = ["--mixture", str(mixture), "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", BUILD, *flags],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False"

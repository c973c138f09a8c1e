"""The benchmark of generation: that it runs, and what it finds of memory. Speeds are for a
machine that rests.
"""

import re
import sys
from pathlib import Path

from generation_speed import FORMS, TINY, measure_memory, shape, write_exports
from support.runs import run_command

MOST_OF_THE_WEIGHTS = 1.05  # the highest memory of loading; imports and buffers are some MB


def test_loading_an_export_takes_the_memory_of_its_weights_and_no_more(tmp_path: Path) -> None:
    """The input codes are computed: no table of them, no second copy of the weights."""
    write_exports(TINY.model, tmp_path / "tiny")
    sizes = write_exports(shape(512, 2, 8, 128, prompt=8).model, tmp_path / "wide")
    assert sizes["tablefree"] == sizes["gpt_neox"] - 65_536 * 512 * 4  # the codes as a table
    for form in FORMS:
        added = measure_memory(tmp_path / "wide" / form, tmp_path / "tiny" / form)
        assert 0.95 * sizes[form] < added <= MOST_OF_THE_WEIGHTS * sizes[form], form


def test_the_benchmark_of_generation_runs() -> None:
    result = run_command(
        sys.executable, "tests/benchmarks/generation_speed.py", "--quick", "--rounds=1"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = re.findall(r"\| tiny, (.*?) \| ([\d.,]+) \| ([\d.,]+) \| ([\d.]+) \|", result.stdout)
    assert [row[0] for row in rows] == ["a prompt", "new tokens"]
    assert all(float(figure.replace(",", "")) > 0 for row in rows for figure in row[1:])


def test_a_shape_that_is_none_is_one_clear_line() -> None:
    result = run_command(sys.executable, "tests/benchmarks/generation_speed.py", "--shapes", "huge")
    assert result.returncode == 2
    assert result.stderr == "error: --shapes huge: no shape huge; there are quickstart, wide\n"

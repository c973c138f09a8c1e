"""Lines of the log: short, in columns, and when the recipe says."""

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.hand_made_runs import trained_step
from support.runs import REPOSITORY, train, write_recipe

from pretrain.config.recipe import LogRecipe
from pretrain.distributed.world import World
from pretrain.metrics.step_record import Sample
from pretrain.view.log_lines import LONGEST, LogLines, step_line

ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)
LINE = re.compile(r"step +(\d+)/20  loss")


def steps_said(output: str) -> list[int]:
    return [int(number) for number in LINE.findall(output)]


@pytest.mark.parametrize("total", [20, 12_000, 1_000_000, 20_000_000, 99_999_999])
def test_a_line_has_at_most_120_characters(total: int) -> None:
    longest = replace(
        trained_step(total - 1, loss=12_345.678),
        val_loss=11.0904,
        gradient_norm=123_456.7,
        tokens_per_s=12_345_678.0,
        mfu_of_matmul=0.987,
        peak_memory_bytes=138 * 10**9,
    )
    line = step_line(longest, total, 99 * 86_400)
    assert len(line) <= LONGEST
    assert line.endswith("eta 99d00h")
    assert ("138 GB" in line) == (total < 10**7)


def test_figures_stand_below_one_another() -> None:
    first = step_line(trained_step(0, loss=11.09), 20_000, None)
    validated = replace(trained_step(9_999), val_loss=3.5, mfu_of_matmul=0.2, tokens_per_s=1e6)
    second = step_line(validated, 20_000, 3_600.0)
    assert len(first) == second.index("  eta")
    for label in ("/20000", "loss ", "lr ", "norm ", " tok/s", "MFU* ", " GB"):
        assert first.index(label) == second.index(label), (first, second)
    assert "val 3.5000" in second
    assert "val" not in first


def test_the_star_tells_a_measured_peak_from_a_data_sheet_s() -> None:
    assert "MFU 41.2%" in step_line(replace(trained_step(0), mfu=0.412), 20, None)
    assert "MFU* 41.2%" in step_line(replace(trained_step(0), mfu_of_matmul=0.412), 20, None)
    # no wider above 100 %, which a yardstick that was measured amid others' work allows
    assert "MFU*  112%  " in step_line(replace(trained_step(0), mfu_of_matmul=1.123), 20, None)
    assert "MFU*  100%  " in step_line(replace(trained_step(0), mfu_of_matmul=0.9996), 20, None)


def test_a_sample_is_one_short_line_that_a_terminal_does_not_obey(
    capsys: pytest.CaptureFixture[str],
) -> None:
    hostile = "a\r\nb \u2028 \x1b[31m " + "long " * 100
    samples = (
        Sample(prompt="We must", text=" go\n", bits_per_byte=1.23456),
        Sample(prompt=hostile, text=hostile, bits_per_byte=None),
    )
    lines = LogLines(ALONE, LogRecipe(every_s=1e9), 20)
    lines.show(replace(trained_step(4), val_loss=1.0, samples=samples), None)
    _, first, second = capsys.readouterr().err.splitlines()
    assert first == "sample 0 (1.235 bits/byte): We must ->  go⏎"
    assert second.startswith("sample 1: a␍⏎b \\u2028 \\u001b[31m long")
    assert len(second) == LONGEST
    assert second.endswith("...")


def test_lines_come_every_so_many_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    lines = LogLines(ALONE, LogRecipe(every_s=0.2), 20)
    for step in range(5):
        lines.show(trained_step(step), None)
    time.sleep(0.25)
    for step in range(5, 8):
        lines.show(trained_step(step), None)
    lines.show(replace(trained_step(8), val_loss=1.0), None)
    lines.show(trained_step(19), None)
    assert steps_said(capsys.readouterr().err) == [1, 6, 9, 20]


def test_lines_come_every_so_many_steps_instead(capsys: pytest.CaptureFixture[str]) -> None:
    lines = LogLines(ALONE, LogRecipe(every_s=1e-9, every_steps=6), 20)
    for step in range(19):
        lines.show(trained_step(step), None)
    assert steps_said(capsys.readouterr().err) == [1, 6, 12, 18]


def test_the_readme_s_lines_and_commands(tiny_data: Path, tmp_path: Path) -> None:
    readme = (REPOSITORY / "pretrain" / "README.md").read_text(encoding="utf-8")
    samples = re.findall(r"^step .* tok/s .*$", readme, re.MULTILINE)
    ours = step_line(replace(trained_step(9), val_loss=1.0, mfu_of_matmul=0.1), 400, 60.0)
    assert len(samples) == 4
    for label in ("/400", "loss ", "lr ", "norm ", " tok/s", "MFU* ", " GB"):
        assert {sample.index(label) for sample in samples} == {ours.index(label)}
    assert {len(sample) for sample in samples[1:]} == {len(ours)}
    command = "python -m pretrain.train --recipe small --data-dir data/mine --run-dir runs/mine "
    found = re.findall(f"^{re.escape(command)}(.*)$", readme, re.MULTILINE)
    assert found == ["--log.every_steps=100", "--quiet"]
    recipe = write_recipe(tmp_path / "r.yaml")
    for number, flag in enumerate(found):
        ended = train(1, recipe, tiny_data, tmp_path / f"{number}", flag, "--stop-at-step=2")
        assert ("tok/s" in ended.stderr) == (flag != "--quiet")


def test_a_run_says_its_steps_in_columns(tiny_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    ended = train(1, recipe, tiny_data, tmp_path / "run", "--log.every_steps=2")
    lines = [line for line in ended.stderr.splitlines() if line.startswith("step ")]
    # the first, every second, and those with a validation
    assert [int(line[5:7]) for line in lines] == [1, 2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20]
    assert len({line.index("tok/s") for line in lines}) == 1
    assert max(map(len, lines)) <= LONGEST
    assert "\x1b" not in ended.stderr
    # a resumed run may choose anew
    train(1, recipe, tiny_data, tmp_path / "run", "--log.every_s=1")

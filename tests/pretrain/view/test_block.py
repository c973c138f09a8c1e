"""What the block of a run on a terminal tells, at the widths of terminals."""

import re
import time
from dataclasses import replace

import pytest
from support.hand_made_runs import trained_step

from pretrain.checkpoint.writer import Saved
from pretrain.distributed.agree import LOG
from pretrain.metrics.step_record import RankFigures, SkippedStep
from pretrain.view.block import About, Block, Look


def block_of(steps: int, *, bytes_per_token: float | None = 4.0, **look: bool) -> Block:
    """The block of a run of 1,000 steps that has gone so far."""
    about = About(
        name="runs/small",
        newest_save=lambda: Saved(step=5, at=time.time() - 180),
        bytes_per_token=bytes_per_token,
    )
    block = Block(about, 1000, Look(**look))
    for step in range(steps):
        block.show(replace(trained_step(step, loss=9.0 - 0.01 * step), mfu=0.412), 3_600.0)
    return block


@pytest.fixture(autouse=True)
def no_warnings_yet() -> None:
    LOG.warnings.clear()


@pytest.mark.parametrize("width", [79, 199, 300])
def test_every_figure_is_there_and_no_row_is_too_long(width: int) -> None:
    block = block_of(400)
    block.show(replace(trained_step(400, loss=5.0), mfu=0.412, val_loss=4.5), 3_600.0)
    rows = block.rows(width)
    assert max(map(len, rows)) <= min(width, 200)
    text = "\n".join(rows)
    for figure in (
        "runs/small",
        "step 401 of 1,000, 40.1%; 0s so far, 1h00m left",
        "loss           5.0000  █",
        "validation     loss 4.5000, step 401",
        "bits per byte  1.6230",
        "checkpoint     step 5, 3m ago",
        "tokens/s       384",
        "MFU            41.2%",
        "learning rate  1.00e-03",
        "gradient norm  0.5000",
        "memory         0.00 GB",
        "step           0.500 s, 20% data",
    ):
        assert figure in text, text
    assert len(rows) == (8 if width < 100 else 5)


@pytest.mark.parametrize("width", [1, 5, 20, 39, 40])
def test_a_terminal_that_is_too_narrow_has_rows_all_the_same(width: int) -> None:
    assert block_of(30).rows(width)


def test_before_the_first_step_the_block_says_so() -> None:
    (row,) = block_of(0).rows(79)
    assert row.endswith("the first step of 1,000 is under way")


def test_warnings_stay_in_sight_each_once_the_last_three() -> None:
    LOG.warnings.append("warning: said before the block was there")
    block = block_of(3)
    assert block.rows(79)[-1] == "warning: said before the block was there"
    for line in (
        "warning: one",
        "nothing to warn of",
        "a.py:3: UserWarning: two",
        "warning: one",
        "warning: \x1b[2J three",
    ):
        block.heard(line)
    assert block.rows(79)[-4:][1:] == [
        "a.py:3: UserWarning: two",
        "warning: one",
        "warning: \\u001b[2J three",
    ]


def test_skipped_steps_validations_and_slow_ranks_are_told() -> None:
    block = block_of(3)
    skipped = SkippedStep(
        step=3,
        loss=None,
        gradient_norm=None,
        learning_rate=1e-3,
        tokens=768,
        skipped="loss nan",
        val_loss=2.0,
    )
    block.show(skipped, None)
    assert "skipped        1, last step 3" in "\n".join(block.rows(79))
    assert "validation     loss 2.0000, step 4" in "\n".join(block.rows(79))
    block.validating(3, 4)
    assert "validation     under way, 75%" in "\n".join(block.rows(79))
    slowest = RankFigures(rank=5, seconds={}, peak_memory_bytes=1)
    block.show(replace(trained_step(4), slowest=slowest), None)
    assert "slowest rank   5" in "\n".join(block.rows(79))


def test_a_measured_peak_is_called_so() -> None:
    block = block_of(0)
    block.show(replace(trained_step(0), mfu_of_matmul=0.17), None)
    assert "MFU            17.0% of a matmul" in "\n".join(block.rows(79))


def test_bits_per_byte_are_of_data_sets_that_know_their_text() -> None:
    assert "bits per byte  none yet" in "\n".join(block_of(3).rows(79))
    assert "bits per byte  not known" in "\n".join(block_of(3, bytes_per_token=None).rows(79))


def test_colours_change_no_character() -> None:
    for width in (39, 79, 199):
        plain = block_of(400)
        block = block_of(400, has_colours=True)
        for each in (plain, block):
            each.heard("warning: " + "x" * 300)
        rows = block.rows(width)
        assert any("\x1b[33mwarning" in row for row in rows)
        assert [re.sub(r"\x1b\[\d+m", "", row).rstrip() for row in rows] == plain.rows(width)


def test_a_terminal_without_unicode_gets_signs_that_it_has() -> None:
    text = "\n".join(block_of(400, has_unicode=False).rows(79))
    assert text.isascii()
    assert "####---" in text

"""Rows that stay in place: on a real pseudo-terminal, through lines, resizes, signals and kills,
and under tmux.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs import REPOSITORY, environment, launch_training, run_command, write_recipe
from support.terminals import BARS, Screen, bars_on, running_on, screen
from support.waiting import wait_until

STEP = 6 * 32  # tokens
# A block of three rows, the first as wide as the terminal; each line that comes in goes above.
DRAWS = """
import logging, sys, warnings
from pretrain.view.terminal import Terminal

class Three:
    def rows(self, width):
        return ["=" * width, "two", "three"]
    def heard(self, line):
        pass

terminal = Terminal(sys.stderr, Three())
logging.basicConfig(format="%(levelname)s %(message)s")  # takes stderr as it is here
print("before", flush=True)
terminal.open()
for line in sys.stdin:
    if line == "end\\n":
        break
    if line.startswith("warn "):
        warnings.warn(line[5:-1])
    elif line.startswith("log "):
        logging.warning(line[4:-1])
    else:
        print(line, end="", file=sys.stderr)
print("unfinished", end="")
terminal.close()
print(flush=True)
logging.warning("below")
print("after", flush=True)
"""


def training(recipe: Path, data: Path, run_dir: Path, *more: str) -> list[str]:
    return launch_training(1, recipe, data, run_dir, *more)


@pytest.fixture
def long_recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "r.yaml", train_tokens=100_000 * STEP)


@pytest.fixture
def drawn(request: pytest.FixtureRequest) -> Iterator[tuple[Screen, subprocess.Popen[bytes]]]:
    """A screen of 40 columns and 12 lines with three rows on it, and what draws them."""
    with screen(40, 12) as there:
        job = subprocess.Popen(
            [sys.executable, "-c", DRAWS],
            cwd=REPOSITORY,
            env=environment(TERM="xterm"),
            stdin=subprocess.PIPE,
            stdout=there.side,
            stderr=there.side,
        )
        there.wait_for(lambda rows: rows[-1:] == ["three"], "three rows")
        yield there, job
        job.kill()
        job.communicate()


def send(job: subprocess.Popen[bytes], text: str) -> None:
    assert job.stdin
    job.stdin.write(text.encode())
    job.stdin.flush()


def test_lines_go_above_the_rows_which_stay(
    drawn: tuple[Screen, subprocess.Popen[bytes]],
) -> None:
    there, job = drawn
    three = ["=" * 39, "two", "three"]
    assert there.rows() == ["before", *three]
    send(job, "one\nlonger than the terminal is wide, which takes two rows\n")
    there.wait_for(lambda rows: len(rows) == 7, "the lines")
    assert there.rows()[1:4] == ["one", "longer than the terminal is wide, which", "takes two rows"]
    assert there.rows()[4:] == three
    send(job, "".join(f"line {number}\n" for number in range(20)))
    there.wait_for(lambda rows: rows[-4:] == ["line 19", *three], "twenty lines")
    send(job, "warn slow\nlog slower\n")
    there.wait_for(lambda rows: rows[-4:] == ["WARNING slower", *three], "a line of a logger")
    assert any(row.endswith("UserWarning: slow") for row in there.rows())
    send(job, "end\n")
    last = [*three, "unfinished", "WARNING below", "after"]
    there.wait_for(lambda rows: rows[-6:] == last, "the end")
    everything = [*there.history(), *there.rows()]
    assert [row for row in everything if row.startswith("line ")] == [
        f"line {number}" for number in range(20)
    ]
    assert everything.count("three") == 1


@pytest.mark.parametrize("size", [(80, 12), (20, 12), (40, 4), (40, 3), (7, 30), (200, 50)])
def test_after_a_resize_the_rows_stand_there_once(
    drawn: tuple[Screen, subprocess.Popen[bytes]], size: tuple[int, int]
) -> None:
    there, job = drawn
    columns, lines = size
    there.resize(columns, lines)
    wide = "=" * (columns - 1)
    # as many as there is room for above the cursor's line
    expected = [wide, "two", "three"][: lines - 1]
    there.wait_for(lambda rows: rows[-len(expected) :] == expected, "rows of the new width")
    send(job, "said\n")
    there.wait_for(lambda rows: "said" in [*there.history(), *rows], "a line")
    there.wait_for(lambda rows: rows[-len(expected) :] == expected, "the rows below it")
    assert there.rows().count("two") == 1


def test_a_kill_leaves_the_terminal_as_it_was(
    drawn: tuple[Screen, subprocess.Popen[bytes]],
) -> None:
    there, job = drawn
    job.kill()
    job.wait()
    os.write(there.side, b"$ the shell goes on\r\n")
    there.wait_for(lambda rows: rows[-1] == "$ the shell goes on", "the shell's line")
    assert there.rows()[-2] == "three"
    assert there.terminal.margins is None
    assert not there.terminal.cursor.hidden


@pytest.mark.parametrize("columns", [80, 200])
def test_a_run_shows_its_block_until_its_end(columns: int, tiny_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    run_dir = tmp_path / "run"
    command = training(recipe, tiny_data, run_dir)
    with screen(columns, 30) as there, running_on(there, command) as job:
        job.wait(timeout=100)
        there.wait_for(lambda rows: f"{run_dir}: finished after 20 steps" in "".join(rows), "end")
        text = "\n".join(there.rows())
        assert bars_on(there.rows()) == 1
        for figure in (
            "step 20 of 20, 100.0%",
            "loss   ",
            ", step 20",  # of the validation
            "checkpoint     step 20, ",
            " of a matmul",
            "gradient norm",
            "learning rate  1.00e-03",
        ):
            assert figure in text, text
        assert "tok/s" not in text  # nor a line of the log


def test_ctrl_c_leaves_one_block_and_says_once_what_happens(
    long_recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    command = training(long_recipe, tiny_data, tmp_path / "run")
    with screen(80, 30) as there, running_on(there, command) as job:
        there.wait_for(lambda rows: "checkpoint     step" in "".join(rows), "a checkpoint")
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=100) == 0
        there.wait_for(lambda rows: "the same command continues" in "".join(rows), "the end")
        text = "\n".join(there.rows())
        assert text.count("Ctrl-C (SIGINT): ending after this step") == 1
        assert bars_on(there.rows()) == 1, text


def test_an_error_stands_below_the_block_that_it_ends(tiny_data: Path, tmp_path: Path) -> None:
    # a loss that is no number at once: the learning rate sees to it
    recipe = write_recipe(
        tmp_path / "r.yaml",
        optimizer={"peak_learning_rate": 1e30},
        bad_steps={"policy": "stop"},
    )
    command = training(recipe, tiny_data, tmp_path / "run")
    with screen(120, 30) as there, running_on(there, command) as job:
        assert job.wait(timeout=100) == 2
        there.wait_for(lambda rows: "error: step " in "".join(rows), "the error")
        rows = there.rows()
        assert bars_on(rows) == 1
        bar = next(row for row in rows if not row.strip(BARS))
        error = next(row for row in rows if row.startswith("error: step "))
        assert rows.index(bar) < rows.index(error)


def test_a_terminal_that_can_do_nothing_gets_lines(tiny_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    command = training(recipe, tiny_data, tmp_path / "run")
    with screen(130, 40) as there, running_on(there, ["env", "TERM=dumb", *command]) as job:
        assert job.wait(timeout=100) == 0
        there.wait_for(lambda rows: "finished after" in "".join(rows), "the end")
        assert sum("tok/s" in row for row in there.rows()) == 5


def test_a_quiet_run_says_its_warnings_alone_and_records_all(
    tiny_data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", train_tokens=200 * STEP)
    command = training(recipe, tiny_data, tmp_path / "run", "--stop-at-step=10", "--quiet")
    ended = run_command(*command)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stderr.splitlines()
    assert lines
    assert all(line.startswith("warning: ") for line in lines), ended.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 10
    with screen(100, 30) as there, running_on(there, [*command, "--stop-at-step=12"]) as job:
        assert job.wait(timeout=100) == 0
        assert all(row.startswith("warning: ") for row in there.rows()), there.rows()


@pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed")
def test_under_tmux_the_block_stays_whole_through_resizes(
    long_recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    tmux = ["tmux", "-f", "/dev/null", "-S", str(tmp_path / "socket")]
    command = training(long_recipe, tiny_data, tmp_path / "run")

    def rows() -> list[str]:
        # What it breaks into more rows than the screen has, tmux moves to its history, where
        # nobody can take it back: only the screen is looked at.
        captured = run_command(*tmux, "capture-pane", "-p")
        return [row.rstrip() for row in captured.stdout.splitlines()]

    started = run_command(
        *tmux, "new-session", "-d", "-x", "200", "-y", "30", *command, LC_ALL="C.UTF-8"
    )
    assert started.returncode == 0, started.stderr
    try:
        for columns, lines in ((200, 30), (80, 24), (61, 24), (160, 40), (80, 20)):
            run_command(*tmux, "resize-window", "-x", str(columns), "-y", str(lines))

            def has_bar(width: int = columns - 1) -> bool:
                return any(len(row) == width and not row.strip(BARS) for row in rows())

            wait_until(has_bar, f"a block of {columns} columns")
            assert bars_on(rows()) == 1, "\n".join(rows())
            assert sum("gradient norm" in row for row in rows()) == 1
    finally:
        run_command(*tmux, "kill-server")

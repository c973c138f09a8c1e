"""Event files tell by themselves which steps they hold, also after a kill tore the last one."""

from functools import partial
from pathlib import Path

import pytest
from support.hand_made_runs import trained_step
from support.sink_readers import read_tensorboard

from pretrain.metrics.tensorboard_sink import TensorBoardSink, event_files, held_range
from pretrain.metrics.told import AboutRun, told


@pytest.fixture
def about(tmp_path: Path) -> AboutRun:
    config = {"recipe": {"model": {"d_model": 48}}, "note": None}
    return AboutRun(run_dir=tmp_path, config=config, restarts=frozenset(), bytes_per_token=None)


def write(about: AboutRun, begin: int, past_last: int, loss: float) -> int:
    """A start from a step on, killed before another; the first step that it wrote."""
    sink = TensorBoardSink(about)
    first = sink.begin(begin)
    for step in range(first, past_last):
        sink.write(told(trained_step(step, loss), about))
    return first


def drawn(about: AboutRun) -> list[tuple[int, float]]:
    (run,) = read_tensorboard(about.run_dir)
    return run.figures["train/loss"]


def test_what_a_kill_lost_is_written_again_and_what_follows_is_taken_back(about: AboutRun) -> None:
    assert write(about, 0, 25, loss=1.0) == 0
    assert write(about, 20, 30, loss=2.0) == 20
    assert drawn(about) == [(step, 1.0 if step < 20 else 2.0) for step in range(30)]
    # back behind an earlier start
    assert write(about, 10, 18, loss=3.0) == 10
    assert drawn(about) == [(step, 1.0 if step < 10 else 3.0) for step in range(18)]
    # more was trained than is drawn
    assert write(about, 40, 45, loss=4.0) == 18
    assert drawn(about)[17:20] == [(17, 3.0), (18, 4.0), (19, 4.0)]
    assert [step for step, _ in drawn(about)] == list(range(45))


@pytest.mark.parametrize("lost", [1, 4, 100, 1500])
def test_a_torn_file_is_read_as_far_as_it_is_whole(lost: int, about: AboutRun) -> None:
    write(about, 0, 25, loss=1.0)
    (path,) = event_files(about.run_dir / "tensorboard")
    path.write_bytes(path.read_bytes()[:-lost])
    held = held_range(path)
    assert held is not None
    assert held.start == 0
    assert 15 < held.stop < 25
    assert [step for step, _ in drawn(about)] == list(held)
    assert write(about, 25, 30, loss=2.0) == held.stop
    assert [step for step, _ in drawn(about)] == list(range(30))


def test_what_is_taken_back_is_in_no_file_any_more(about: AboutRun) -> None:
    """The server of data that TensorBoard starts by itself would show it."""
    for begin, past_last in ((0, 25), (20, 30), (28, 33), (10, 12)):
        write(about, begin, past_last, loss=1.0)
    held = [held_range(path) for path in event_files(about.run_dir / "tensorboard")]
    assert held == [range(10), range(10, 12)]


def test_a_file_without_its_beginning_is_passed_over(about: AboutRun) -> None:
    write(about, 0, 25, loss=1.0)
    write(about, 25, 25, loss=1.0)  # killed before its first step
    (_, newer) = event_files(about.run_dir / "tensorboard")
    assert held_range(newer) == range(25, 25)
    newer.write_bytes(newer.read_bytes()[:50])  # a version, and half of what follows
    assert held_range(newer) is None
    assert write(about, 20, 30, loss=2.0) == 20
    assert drawn(about) == [(step, 1.0 if step < 20 else 2.0) for step in range(30)]


def test_files_are_read_in_order_also_where_the_clock_went_back(
    about: AboutRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    for begin, now in ((0, 2e9), (20, 1e9), (10, 1e9)):
        monkeypatch.setattr(f"{TensorBoardSink.__module__}.time.time", partial(float, now))
        write(about, begin, begin + 15, loss=float(begin))
    expected = [(step, 0.0 if step < 10 else 10.0) for step in range(25)]
    assert drawn(about) == expected


def test_hyperparameters_are_what_the_page_of_them_reads(about: AboutRun) -> None:
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

    write(about, 0, 3, loss=1.0)
    reader = EventAccumulator(str(about.run_dir / "tensorboard"))
    reader.Reload()
    content = reader.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    told_there = parse_session_start_info_plugin_data(content).hparams
    assert told_there["recipe.model.d_model"].number_value == 48
    assert "note" not in told_there
    # the reader of TensorBoard's own pages purges as well
    assert [event.step for event in reader.Tensors("train/loss")] == [0, 1, 2]

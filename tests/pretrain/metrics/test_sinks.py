"""Sinks show every step of a run once, whatever happened to it, and never harm it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.forked_ranks import (
    arguments_of,
    be_a_rank,
    end_of,
    logs_of,
    run_ranks,
    start_ranks,
    train_on,
)
from support.hand_made_runs import trained_step
from support.poisoned_ranks import poisoned_run
from support.runs import environment, free_port, losses, run_command, steps_of, write_recipe
from support.sink_readers import Drawn, lines_of, newest
from support.waiting import wait_until

from data_prep.shards import ShardReader
from pretrain.config.recipe import SINKS
from pretrain.data.text_size import bytes_per_token
from pretrain.evaluation.result import read_result
from pretrain.metrics import sinks
from pretrain.metrics.metrics_file import MetricsFile
from pretrain.metrics.sinks import OPENERS, Sinks
from pretrain.metrics.told import AboutRun, ToldStep, told, validation_figures

ALL = f"--log.sinks=[{','.join(SINKS)}]"
STEPS = 60
# Steps of a tenth of a second or so: sinks that take long to begin are there when a run is killed.
TOKENS_A_STEP = 24 * 32
LONG = f"--train_tokens={STEPS * TOKENS_A_STEP}"
HIDDEN = "0123456789" * 4  # in the place of a key of W&B

each_sink = pytest.mark.parametrize("sink", SINKS)


@pytest.fixture(scope="module", autouse=True)
def of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Sinks keep what is theirs in directories of the tests, and send nothing anywhere."""
    home = tmp_path_factory.mktemp("home")
    changes = {
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": HIDDEN,
        "WANDB_CONFIG_DIR": str(home / "wandb_config"),
        "WANDB_CACHE_DIR": str(home / "wandb_cache"),
        "WANDB_DATA_DIR": str(home / "wandb_data"),
        "TRACKIO_DIR": str(home / "trackio"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setenv(name, value)
        yield


def variables() -> dict[str, str]:
    """What a forked rank is to have of the above: it inherits what the fork server has."""
    return {name: os.environ[name] for name in os.environ if name.startswith(("WANDB", "TRACKIO"))}


def train_told(recipe: Path, data: Path, run_dir: Path, *more: str) -> str:
    ended = run_ranks(1, recipe, data, run_dir, ALL, *more, **variables())
    assert ended.exit_codes == [0], ended.output
    assert "warning: log.sinks" not in ended.output
    assert "Trackio" not in ended.output  # which would greet, on stdout
    return ended.output


def expect_drawn_as_recorded(drawn: Drawn, run_dir: Path) -> None:
    """Every figure of metrics.jsonl stands at its step, once, and no other does."""
    lines = lines_of(run_dir)
    assert [line["step"] for line in lines] == list(range(len(lines)))
    of_lines = {
        "train/loss": "loss",
        "train/gradient_norm": "gradient_norm",
        "train/learning_rate": "learning_rate",
        "train/tokens": "tokens",
        "validation/loss": "val_loss",
        "speed/tokens_per_s": "tokens_per_s",
        "speed/mfu_of_matmul": "mfu_of_matmul",  # which a CPU has
        "memory/peak_bytes": "peak_memory_bytes",
    }
    assert lines[-1].get("mfu_of_matmul")
    for name, key in of_lines.items():
        recorded = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        assert [step for step, _ in drawn.figures[name]] == [step for step, _ in recorded], name
        for (_, shown), (_, value) in zip(drawn.figures[name], recorded, strict=True):
            assert shown == pytest.approx(value, rel=1e-6)  # TensorBoard's are fp32
    assert {"split/data_s", "split/forward_s", "split/optimizer_s"} <= drawn.figures.keys()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough to be killed amid it; a checkpoint every ten steps."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    batch = {"global_batch_tokens": TOKENS_A_STEP}
    return write_recipe(path, checkpoints={"every_steps": 10}, batch=batch)


@pytest.fixture(scope="module")
def killed(recipe: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed behind its second checkpoint, and then went on to its end."""
    run_dir = tmp_path_factory.mktemp("killed") / "run"
    logs = logs_of(1, run_dir)
    flags = arguments_of(recipe, tiny_data, run_dir, ALL, LONG)
    (rank,) = start_ranks(flags, logs, **variables())

    def is_drawn() -> bool:
        files = run_dir.glob("wandb/offline-run-*/*.wandb")
        return steps_of(run_dir) >= 25 and any(path.stat().st_size > 10_000 for path in files)

    wait_until(is_drawn, "25 steps that are drawn", every_s=0.002)
    rank.kill()
    assert end_of([rank], logs).exit_codes == [-signal.SIGKILL]
    assert steps_of(run_dir) < STEPS
    # fewer validations from here on: one of a step that was taken back is not drawn over
    output = train_told(recipe, tiny_data, run_dir, LONG, "--validation.every_steps=20")
    assert "continuing from" in output
    return run_dir


def restart_of(run_dir: Path) -> int:
    """The step that the second start of a run went on from."""
    starts = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts[:1]] == [0]
    return int(starts[1]["step"])


@each_sink
def test_a_run_killed_and_resumed_is_drawn_once(sink: str, killed: Path) -> None:
    drawn = newest(sink, killed)
    assert len(drawn.figures["train/loss"]) == STEPS
    expect_drawn_as_recorded(drawn, killed)
    restart = restart_of(killed)
    assert 0 < restart < STEPS
    assert drawn.figures["marks/restart"] == [(restart, 1.0)]


@each_sink
def test_the_config_tells_recipe_data_and_versions(sink: str, killed: Path) -> None:
    config = newest(sink, killed).config
    for told_there in ("peak_learning_rate", "fingerprint", "deepspeed", "input_embedding"):
        assert told_there in config


def test_a_key_of_wandb_is_in_no_file_or_log_of_a_run(killed: Path) -> None:
    files = [path for path in killed.parent.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if HIDDEN.encode() in path.read_bytes()]


@each_sink
def test_a_branch_has_the_steps_before_it_too(sink: str, branched: Path) -> None:
    drawn = newest(sink, branched)
    assert len(drawn.figures["train/loss"]) == 25
    expect_drawn_as_recorded(drawn, branched)
    # and the run that it was taken from is what it was
    trunk = branched.with_name("trunk")
    assert len(newest(sink, trunk).figures["train/loss"]) == 15
    expect_drawn_as_recorded(newest(sink, trunk), trunk)


@pytest.fixture(scope="module")
def branched(killed: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A longer run than the one it branched off from, with a constant rate."""
    home = tmp_path_factory.mktemp("branch")
    constant = {"kind": "constant", "warmup_steps": 2}
    recipe = write_recipe(home / "recipe.yaml", schedule=constant)
    train_told(recipe, tiny_data, home / "trunk", "--stop-at-step", "15")
    checkpoint = home / "trunk" / "checkpoints" / "step-00000015"
    longer = f"--train_tokens={25 * 6 * 32}"
    train_told(recipe, tiny_data, home / "branch", longer, "--branch-from", str(checkpoint))
    return home / "branch"


@pytest.fixture(scope="module")
def rewound(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went back from a step that it then skipped."""
    home = tmp_path_factory.mktemp("rewound")
    recipe = write_recipe(home / "recipe.yaml", bad_steps={"policy": "rewind"})
    ended = poisoned_run(1, "12", recipe, tiny_data, home / "run", ALL, **variables())
    assert ended.exit_codes == [0], ended.output
    assert "rewinding from step 12" in ended.output
    assert "warning: log.sinks" not in ended.output
    return home / "run"


@each_sink
def test_a_rewound_run_is_drawn_once_and_its_skipped_step_is_marked(
    sink: str, rewound: Path
) -> None:
    drawn = newest(sink, rewound)
    expect_drawn_as_recorded_but_skipped(drawn, rewound, skipped=12)


def expect_drawn_as_recorded_but_skipped(drawn: Drawn, run_dir: Path, skipped: int) -> None:
    """As recorded; of the skipped step there are marks, and no loss that is no number."""
    expect_drawn_as_recorded(drawn, run_dir)
    assert drawn.figures["marks/skipped"] == [(skipped, 1.0)]
    (note,) = drawn.notes
    assert note[0] == skipped
    assert "gradient norm" in note[1]


# Refusals


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("tensorbord", "log.sinks: unknown sink 'tensorbord'; did you mean tensorboard?"),
        ("3", "log.sinks: got 3; give a list of sinks: tensorboard, trackio, wandb"),
    ],
)
def test_what_is_no_sink_is_refused_in_a_line(
    given: str, says: str, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    ended = run_ranks(1, recipe, tiny_data, tmp_path / "run", f"--log.sinks={given}")
    assert ended.exit_codes == [2]
    (line,) = ended.output.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not (tmp_path / "run").exists()


def test_a_mode_that_wandb_does_not_know_is_refused_before_anything_is_written(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    flags = (recipe, tiny_data, tmp_path / "run", "--log.sinks=wandb")
    ended = run_ranks(1, *flags, **{**variables(), "WANDB_MODE": "ofline"})
    assert ended.exit_codes == [2]
    (line,) = ended.output.splitlines()
    says = "log.sinks: wandb: the variable WANDB_MODE is 'ofline'; did you mean offline?"
    assert line == f"error: {says}"
    assert not (tmp_path / "run").exists()


@each_sink
def test_a_sink_whose_package_is_missing_is_refused_before_anything_is_written(
    sink: str, recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """In an interpreter that finds all packages but one."""
    program = (
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        f"without = lambda name, *more: None if name == {sink!r} else find(name, *more)\n"
        "importlib.util.find_spec = without\n"
        "sys.argv[0] = 'pretrain.train'\n"
        "runpy.run_module('pretrain.train', run_name='__main__', alter_sys=True)\n"
    )
    flags = arguments_of(recipe, tiny_data, tmp_path / "run", f"--log.sinks={sink}")
    result = run_command(sys.executable, "-c", program, *flags)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert f"the package {sink} is not installed; pip install 'tablefree[{sink}]'" in line
    assert not (tmp_path / "run").exists()


def test_without_sinks_no_package_of_one_is_imported(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    program = (
        "import sys\n"
        "from pretrain.train import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        f"print('IMPORTED', sorted(set(sys.modules) & set({SINKS!r})))\n"
    )
    flags = arguments_of(recipe, tiny_data, tmp_path / "run", "--stop-at-step", "1")
    result = run_command(sys.executable, "-c", program, *flags)
    assert result.returncode == 0, result.stderr
    assert "IMPORTED []" in result.stdout
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_of_several_ranks_the_first_alone_tells_its_sinks(tiny_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml")
    train_on(2, recipe, tiny_data, tmp_path / "run", "--log.sinks=tensorboard")
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    expect_drawn_as_recorded(newest("tensorboard", tmp_path / "run"), tmp_path / "run")


def test_every_sink_of_the_recipe_has_its_row() -> None:
    assert set(OPENERS) == set(SINKS)


# What fails later


def test_a_sink_that_cannot_write_is_warned_of_once_and_the_next_start_fills_it(
    recipe: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """A file lies where its directory is to be."""
    run_dir = tmp_path / "run"
    in_the_way = run_dir / "tensorboard"
    run_dir.mkdir()
    in_the_way.touch()
    ended = run_ranks(
        1, recipe, tiny_data, run_dir, "--log.sinks=tensorboard", "--stop-at-step", "2"
    )
    assert ended.exit_codes == [0], ended.output
    (warning,) = [line for line in ended.output.splitlines() if line.startswith("warning: log.")]
    assert "tensorboard: FileExistsError: " in warning
    assert len(losses(run_dir)) == 2
    in_the_way.unlink()
    ended = run_ranks(1, recipe, tiny_data, run_dir, "--log.sinks=tensorboard")
    assert ended.exit_codes == [0], ended.output
    expect_drawn_as_recorded(newest("tensorboard", run_dir), run_dir)


def test_what_failed_in_a_run_s_last_start_is_drawn_by_the_same_command(
    tiny_data: Path, tmp_path: Path
) -> None:
    """Without training, and once: then nothing is lacking any more."""
    recipe = write_recipe(tmp_path / "r.yaml")
    run_dir = tmp_path / "run"
    in_the_way = run_dir / "tensorboard"
    run_dir.mkdir()
    in_the_way.touch()
    flags = (recipe, tiny_data, run_dir, "--log.sinks=tensorboard")
    advice = "the same command brings it up to date later"
    for says in ("finished after 20 steps", "this run is finished"):
        ended = run_ranks(1, *flags)
        assert ended.exit_codes == [0], ended.output
        assert says in ended.output
        (warning,) = [line for line in ended.output.splitlines() if "log.sinks" in line]
        assert warning.endswith(advice)
    in_the_way.unlink()
    recorded = (run_dir / "metrics.jsonl").read_bytes()
    # and those that are named only now
    output = train_told(recipe, tiny_data, run_dir)
    assert "run: drawn to its end now: tensorboard, trackio, wandb\n" in output
    assert "this run is finished" in output
    for sink in SINKS:
        expect_drawn_as_recorded(newest(sink, run_dir), run_dir)
    assert (run_dir / "metrics.jsonl").read_bytes() == recorded
    kept = sorted(path for path in run_dir.rglob("*") if path.is_file())
    assert "drawn" not in train_told(recipe, tiny_data, run_dir)
    assert sorted(path for path in run_dir.rglob("*") if path.is_file()) == kept


class Recorder:
    """A sink that keeps what it is told, and waits where it is to."""

    def __init__(self) -> None:
        self.told: list[ToldStep] = []
        self.begun: list[int] = []
        self.goes_on = threading.Event()
        self.fails_at = -1

    def holds(self, steps: int) -> bool:
        return len(self.told) == steps

    def begin(self, step: int) -> int:
        self.goes_on.wait()
        self.begun.append(step)
        self.told = [told for told in self.told if told.step < step]
        return min(step, len(self.told))

    def write(self, told: ToldStep) -> None:
        if told.step == self.fails_at:
            raise OSError(28, "No space left on device")
        self.told.append(told)

    def close(self) -> None:
        pass


def about(run_dir: Path) -> AboutRun:
    return AboutRun(run_dir=run_dir, config={}, restarts=frozenset({20}), bytes_per_token=4.0)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setitem(OPENERS, "tensorboard", lambda about: found)
    return found


def test_a_slow_sink_holds_nothing_up_and_lacks_nothing_in_the_end(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its queue is full long before it looks: the rest comes out of the file."""
    monkeypatch.setattr(sinks, "QUEUED", 10)
    file = MetricsFile(tmp_path, 0)
    told_all = Sinks(["tensorboard"], about(tmp_path), 0, pytest.fail)
    for step in range(500):
        file.append(trained_step(step))
        told_all.add(trained_step(step))
    assert told_all.feeds[0].waiting.qsize() <= 10
    assert recorder.told == []
    recorder.goes_on.set()
    told_all.close(500, 30.0)
    assert [each.step for each in recorder.told] == list(range(500))


def test_a_run_that_goes_back_while_its_sink_sleeps_is_drawn_once(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "QUEUED", 10)
    file = MetricsFile(tmp_path, 0)
    told_all = Sinks(["tensorboard"], about(tmp_path), 0, pytest.fail)
    for step in range(25):
        file.append(trained_step(step, loss=1.0))
        told_all.add(trained_step(step, loss=1.0))
    file.close()
    file = MetricsFile(tmp_path, 20)
    told_all.go_back(20)
    for step in range(20, 40):
        file.append(trained_step(step, loss=2.0))
        told_all.add(trained_step(step, loss=2.0))
    recorder.goes_on.set()
    told_all.close(40, 30.0)
    drawn = [(each.step, each.figures["train/loss"]) for each in recorder.told]
    assert drawn == [(step, 1.0 if step < 20 else 2.0) for step in range(40)]
    assert recorder.begun == [0, 20]
    assert recorder.told[20].figures["marks/restart"] == 1


def test_a_sink_that_fails_is_warned_of_once(recorder: Recorder, tmp_path: Path) -> None:
    recorder.goes_on.set()
    recorder.fails_at = 3
    warnings: list[str] = []
    file = MetricsFile(tmp_path, 0)
    told_all = Sinks(["tensorboard"], about(tmp_path), 0, warnings.append)
    for step in range(50):
        file.append(trained_step(step))
        told_all.add(trained_step(step))
    told_all.close(50, 30.0)
    (warning,) = warnings
    assert warning.startswith("warning: log.sinks: tensorboard: OSError: ")
    assert "No space left on device" in warning
    assert [each.step for each in recorder.told] == [0, 1, 2]


def test_a_sink_that_hangs_is_not_waited_for(recorder: Recorder, tmp_path: Path) -> None:
    warnings: list[str] = []
    told_all = Sinks(["tensorboard"], about(tmp_path), 0, warnings.append)
    told_all.add(trained_step(0))
    began = time.monotonic()
    told_all.close(1, 0.2)
    assert time.monotonic() - began < 5
    (warning,) = warnings
    assert "has 0 of 1 steps, 0.2 s after the last; not waited for any longer" in warning
    recorder.goes_on.set()


# What waits for the device

WAITS = "WAITS FOR THE DEVICE"


def be_a_rank_that_counts_waits(arguments: list[str], variables: dict[str, str], log: Path) -> None:
    """Body of a forked rank that counts each value fetched from a device, and says how many."""
    import torch

    counts: Counter[str] = Counter()

    def counting(owner: object, name: str) -> None:
        known = getattr(owner, name)

        def counted(*given: object, **named: object) -> object:
            counts[name] += 1
            return known(*given, **named)

        setattr(owner, name, counted)

    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__"):
        counting(torch.Tensor, name)
    counting(torch.cuda, "synchronize")
    try:
        be_a_rank(arguments, variables, log)
    finally:
        print(WAITS, dict(sorted(counts.items())), flush=True)


def test_who_observes_waits_for_the_device_no_more_often(tiny_data: Path, tmp_path: Path) -> None:
    """A run that all sinks and its log are told of fetches as few values as one that is quiet."""
    recipe = write_recipe(tmp_path / "r.yaml")
    waits = []
    for name, flags in {"observed": [ALL, "--log.every_steps=1"], "quiet": ["--quiet"]}.items():
        run_dir = tmp_path / name
        body = be_a_rank_that_counts_waits
        ended = run_ranks(1, recipe, tiny_data, run_dir, *flags, body=body, **variables())
        assert ended.exit_codes == [0], ended.output
        waits += [line for line in ended.output.splitlines() if line.startswith(WAITS)]
    observed, quiet = waits
    assert observed == quiet
    assert "'item': " in observed


# What is told


def test_bits_per_byte_is_told_where_the_text_of_the_data_is_known(
    text_data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", validation={"eval_tokens": 10**9})
    train_told(recipe, text_data, tmp_path / "run")
    result = run_command(sys.executable, "-m", "pretrain.evaluate", "--run-dir", f"{tmp_path}/run")
    assert result.returncode == 0, result.stderr
    evaluated = read_result(tmp_path / "run", 20)
    assert evaluated is not None
    for sink in SINKS:
        figures = newest(sink, tmp_path / "run").figures
        (last_step, shown) = figures["validation/bits_per_byte"][-1]
        # a whole split validated is a whole split evaluated, but for its last window
        assert shown == pytest.approx(evaluated.whole_split.bits_per_byte, rel=0.02)
        (loss_step, loss) = figures["validation/loss"][-1]
        assert (last_step, loss_step) == (19, 19)
        per_loss = evaluated.whole_split.bits_per_byte / evaluated.whole_split.loss
        assert shown / loss == pytest.approx(per_loss, rel=1e-6)


def test_a_data_set_of_ids_alone_has_no_bits_per_byte(tiny_data: Path) -> None:
    manifest = ShardReader(tiny_data).manifest
    assert bytes_per_token(manifest) is not None
    of_ids = [replace(shard, text_bytes=0) for shard in manifest.shards]
    assert bytes_per_token(replace(manifest, shards=tuple(of_ids))) is None
    assert validation_figures(2.0, None)["validation/bits_per_byte"] is None


def test_what_is_not_known_is_not_told(tmp_path: Path) -> None:
    figures = told(trained_step(0), about(tmp_path)).figures
    assert "speed/mfu" not in figures
    assert "validation/loss" not in figures
    assert figures["train/tokens"] == 192


# The tools themselves


def test_tensorboard_itself_shows_a_resumed_run_once(killed: Path, tmp_path: Path) -> None:
    """The command of the README, with the server of data that it takes by itself."""
    port = free_port()
    command = ["tensorboard", "--logdir", str(killed.parent), "--port", str(port)]
    points: list[list[float]] = []  # of time, step, value

    def fetch(tag: str) -> None:
        query = urllib.parse.urlencode({"run": f"{killed.name}/tensorboard", "tag": tag})
        url = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?{query}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            points[:] = json.load(answer)

    def has_all() -> bool:
        with contextlib.suppress(OSError):
            fetch("train/loss")
        return len(points) >= STEPS

    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=environment(), stdout=output, stderr=output)
    try:
        wait_until(has_all, "all steps", every_s=0.5, job=server, log=log)
        assert [step for _, step, _ in points] == list(range(STEPS))
        recorded = [line["loss"] for line in lines_of(killed)]
        assert [loss for _, _, loss in points] == pytest.approx(recorded, rel=1e-6)
        fetch("validation/loss")
        validated = [line["step"] for line in lines_of(killed) if "val_loss" in line]
        assert [step for _, step, _ in points] == validated
    finally:
        server.terminate()
        server.wait()

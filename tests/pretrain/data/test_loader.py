import hashlib
import re
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.hand_made_shards import write_dataset, write_source
from support.runs import run_command, write_recipe

from data_prep.errors import UserError
from data_prep.manifest import BLOCK_SAMPLES, MANIFEST_NAME
from data_prep.shards import ShardReader
from pretrain.data.batches import Prefetch, StepBatches, widened
from pretrain.data.loader import TrainingLoader, ValidationWindows
from pretrain.data.permutation import permute
from pretrain.data.stream import READ_AHEAD_WINDOWS, TokenStream
from pretrain.distributed.world import World
from pretrain.engine.engine import Engine
from pretrain.run.prepare import prepare

Streams = dict[str, list[int]]  # the lengths of each source's shards

shard_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def count_up(
    data_dir: Path, streams: Streams, weights: list[float] | None = None, split: str = "train"
) -> ShardReader:
    """A data set whose ids count 0, 1, 2, ... through the first source, on through the next, and
    so on.
    """
    written, first = [], 0
    for name, lengths in streams.items():
        for unit, length in enumerate(lengths):
            ids = list(range(first, first + length))
            written.append(
                write_source(data_dir, split, name, [ids[:-1]], ids[-1], unit=f"{unit:05d}")
            )
            first += length
    named = dict(zip(streams, weights or [1.0] * len(streams), strict=True))
    return ShardReader(write_dataset(data_dir, written, named, vocab_size=65_536))


def first_ids(streams: Streams) -> dict[str, int]:
    """The id at which each source starts to count."""
    ends = np.cumsum([sum(lengths) for lengths in streams.values()]).tolist()
    return dict(zip(streams, [0, *ends], strict=False))


# Epochs and shares


@settings(max_examples=25)
@given(
    up=shard_lengths,
    more=shard_lengths,
    seq_len=st.integers(1, 8),
    weight=st.integers(1, 9),
    seed=st.integers(0),
)
def test_each_epoch_of_a_source_draws_every_window_exactly_once(
    up: list[int], more: list[int], seq_len: int, weight: int, seed: int
) -> None:
    streams = {"up": up, "more": more}
    assume(min(sum(up), sum(more)) > seq_len)
    with TemporaryDirectory() as directory:
        loader = TrainingLoader(
            count_up(Path(directory), streams, [1, weight]), seq_len=seq_len, seed=seed
        )
        rows = loader.samples(np.arange(BLOCK_SAMPLES)).astype(int)
    # consecutive ids, across shards too
    assert (rows == rows[:, :1] + np.arange(seq_len + 1)).all()
    for name, first in first_ids(streams).items():
        tokens = sum(streams[name])
        starts = rows[(rows[:, 0] >= first) & (rows[:, 0] < first + tokens), 0] - first
        every_window = list(range(0, tokens - seq_len, seq_len))
        orders = [
            starts[i : i + len(every_window)].tolist()
            for i in range(0, len(starts), len(every_window))
        ]
        assert len(orders) > 1
        for order in orders[:-1]:
            assert sorted(order) == every_window
        if len(every_window) > 8 and len(orders) > 3:  # 9! orders: three equal ones are no accident
            assert len(set(map(tuple, orders[:-1]))) > 1
            assert orders[0] != every_window


@settings(max_examples=15)
@given(
    weights=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4),
    block=st.integers(0, 1000),
    seed=st.integers(0),
)
def test_every_block_holds_exactly_the_shares_of_its_sources(
    weights: list[float], block: int, seed: int
) -> None:
    streams = {f"source-{i}": [20 + i] for i in range(len(weights))}
    with TemporaryDirectory() as directory:
        reader = count_up(Path(directory), streams, weights)
        rows = TrainingLoader(reader, seq_len=4, seed=seed).samples(
            np.arange(block * BLOCK_SAMPLES, (block + 1) * BLOCK_SAMPLES)
        )
    source_of = np.searchsorted(list(first_ids(streams).values()), rows[:, 0], side="right") - 1
    shares = [source.share for source in reader.manifest.sources]
    assert np.bincount(source_of, minlength=len(weights)).tolist() == shares
    assert sum(shares) == BLOCK_SAMPLES
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - weight / sum(weights) * BLOCK_SAMPLES) < 1


def test_sources_are_mixed_within_a_block_not_one_after_another(tmp_path: Path) -> None:
    loader = TrainingLoader(count_up(tmp_path, {"a": [50], "b": [50]}, [3, 1]), seq_len=4, seed=1)
    from_b = loader.samples(np.arange(BLOCK_SAMPLES))[:, 0] >= 50
    sixteenths = from_b.reshape(16, 256).sum(1)  # 64 of 256 expected in each, standard deviation 7
    assert ((sixteenths > 64 - 42) & (sixteenths < 64 + 42)).all()


def test_windows_overlap_by_one_id_and_cross_shards(tmp_path: Path) -> None:
    loader = TrainingLoader(count_up(tmp_path, {"up": [3, 1, 5, 2]}), seq_len=4, seed=1)
    rows = loader.samples(np.arange(2)).tolist()
    assert sorted(rows) == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert loader.unseen_tail_tokens() == {"up": 2}  # ids 9 and 10


@settings(max_examples=25)
@given(lengths=shard_lengths, seq_len=st.integers(1, 12))
def test_only_a_tail_shorter_than_a_window_is_never_seen(lengths: list[int], seq_len: int) -> None:
    assume(sum(lengths) > seq_len)
    with TemporaryDirectory() as directory:
        loader = TrainingLoader(count_up(Path(directory), {"up": lengths}), seq_len=seq_len, seed=1)
        seen = np.unique(loader.samples(np.arange(loader.window_counts[0])))
    tail = loader.unseen_tail_tokens()["up"]
    assert 0 <= tail < seq_len
    assert seen.tolist() == list(range(sum(lengths) - tail))


# A pure function of (fingerprint, seed, n)

DIGEST = """
import hashlib, sys
from pathlib import Path
import numpy as np
from data_prep.shards import ShardReader
from pretrain.data.loader import TrainingLoader
loader = TrainingLoader(ShardReader(Path(sys.argv[1])), seq_len=32, seed=3)
print(hashlib.sha256(loader.samples(np.arange(5000, 5400)).tobytes()).hexdigest())
"""


def test_a_sample_is_the_same_in_another_process_and_after_any_other_calls(tiny_data: Path) -> None:
    loader = TrainingLoader(ShardReader(tiny_data), seq_len=32, seed=3)
    numbers = np.arange(5000, 5400)
    before = loader.samples(numbers)
    loader.samples(np.arange(100_000, 100_500))
    loader.place(7)
    np.testing.assert_array_equal(loader.samples(numbers), before)
    elsewhere = run_command(sys.executable, "-c", DIGEST, str(tiny_data))
    assert elsewhere.stdout.strip() == hashlib.sha256(before.tobytes()).hexdigest(), (
        elsewhere.stderr
    )


@settings(max_examples=30)
@given(numbers=st.lists(st.integers(0, 10**9), min_size=1, max_size=12))
def test_a_sample_does_not_depend_on_what_is_asked_for_with_it(
    numbers: list[int], tiny_data: Path
) -> None:
    loader = TrainingLoader(ShardReader(tiny_data), seq_len=32, seed=3)
    together = loader.samples(np.array(numbers))
    for number, row in zip(numbers, together, strict=True):
        np.testing.assert_array_equal(loader.samples(np.array([number]))[0], row)
        place = loader.place(number)
        stream = TokenStream(
            ShardReader(tiny_data), loader.manifest.shards_of("train", place.source)
        )
        np.testing.assert_array_equal(stream.read(place.start, 33), row)


def test_seed_and_data_set_each_change_the_order(tmp_path: Path) -> None:
    first, longer = (
        count_up(tmp_path / "a", {"up": [400]}),
        count_up(tmp_path / "b", {"up": [400, 1]}),
    )
    loaders = [
        TrainingLoader(reader, seq_len=4, seed=seed)
        for reader, seed in ((first, 1), (first, 2), (longer, 1))
    ]
    orders = [loader.samples(np.arange(99))[:, 0].tolist() for loader in loaders]
    assert sorted(orders[0]) == sorted(orders[1])
    assert len(set(map(tuple, orders))) == 3


@settings(max_examples=60)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation_of_any_size(size: int, key: int) -> None:
    images = permute(np.arange(size, dtype=np.uint64), size, np.array(key, np.uint64))
    assert sorted(images.tolist()) == list(range(size))


@settings(max_examples=30)
@given(size=st.integers(1, 2**48), key=st.integers(0, 2**64 - 1), data=st.data())
def test_permute_stays_inside_and_apart_at_sizes_no_memory_holds(
    size: int, key: int, data: st.DataObject
) -> None:
    ordinals = data.draw(st.lists(st.integers(0, size - 1), unique=True, min_size=1, max_size=50))
    images = permute(np.array(ordinals, np.uint64), size, np.array(key, np.uint64)).tolist()
    assert all(0 <= image < size for image in images)
    assert len(set(images)) == len(ordinals)


def test_permute_takes_a_key_for_each_ordinal() -> None:
    keys = np.array([1, 2, 3], np.uint64)
    together = permute(np.full(3, 5, np.uint64), 1000, keys)
    apart = [int(permute(np.array([5], np.uint64), 1000, key)[0]) for key in keys]
    assert together.tolist() == apart
    assert len(set(apart)) == 3


# Ranks


def batch_over_ranks(arguments: list[str], ranks: int, step: int) -> list[np.ndarray]:
    """What each rank takes in each micro-step of a step: the training command's own arithmetic,
    without a launch.
    """
    taken: dict[tuple[int, int], np.ndarray] = {}
    for rank in range(ranks):
        world = World(rank=rank, world_size=ranks, local_rank=rank, local_world_size=ranks)
        run = prepare(arguments, world)
        batches = StepBatches(run.loader, run.recipe, world, pinned=False)
        assert batches.micro_steps == run.engine_config["gradient_accumulation_steps"]
        for micro_step, ids in enumerate(batches.of_step(step)):
            taken[micro_step, rank] = ids
    return [taken[place] for place in sorted(taken)]


@pytest.mark.parametrize("step", [0, 700])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_1_2_and_4_ranks_consume_the_batch_that_the_sample_numbers_say(
    step: int, micro_batch_size: int, tiny_data: Path, tmp_path: Path
) -> None:
    batch = {"global_batch_tokens": 8 * 32, "micro_batch_size": micro_batch_size}
    recipe = write_recipe(tmp_path / "r.yaml", batch=batch, seed=5)
    arguments = [
        "--recipe",
        str(recipe),
        "--data-dir",
        str(tiny_data),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    expected = TrainingLoader(ShardReader(tiny_data), seq_len=32, seed=5).samples(
        np.arange(step * 8, (step + 1) * 8)
    )
    for ranks in (1, 2, 4):
        pieces = batch_over_ranks(arguments, ranks, step)
        assert {len(piece) for piece in pieces} == {micro_batch_size}
        np.testing.assert_array_equal(np.concatenate(pieces), expected)


def test_ids_where_integers_turn_over_survive_from_shard_to_device(tmp_path: Path) -> None:
    document = [0, 32_767, 32_768, 65_535, 1, 65_534, 32_766, 32_769]
    written = write_source(tmp_path, "train", "edge", [document], eos_id=65_535)
    assert np.load(tmp_path / written.path).dtype == np.dtype("<u2")
    reader = ShardReader(write_dataset(tmp_path, [written], {"edge": 1.0}, vocab_size=65_536))
    ids = TrainingLoader(reader, seq_len=8, seed=1).samples(np.array([0, 1]))
    engine = Engine.__new__(Engine)
    engine.device = torch.device("cpu")
    inputs, targets = engine.to_device(widened(ids, pinned=False))
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.tolist() == [document] * 2
    assert targets.tolist() == [[*document[1:], 65_535]] * 2


# Validation


@settings(max_examples=30)
@given(lengths=shard_lengths, seq_len=st.integers(1, 12))
def test_validation_windows_hold_every_id_after_the_first_as_a_target_once(
    lengths: list[int], seq_len: int
) -> None:
    assume(sum(lengths) >= 2)
    with TemporaryDirectory() as directory:
        reader = count_up(Path(directory), {"up": lengths}, split="validation")
        validation = ValidationWindows(reader, seq_len=seq_len)
        count = -(-validation.targets // seq_len)
        windows = [validation.window(i).tolist() for i in range(count)]
        whole = validation.windows(np.arange(validation.whole_windows)).tolist()
    assert [target for window in windows for target in window[1:]] == list(range(1, sum(lengths)))
    assert all(window[0] == i * seq_len for i, window in enumerate(windows))
    assert whole == windows[: validation.whole_windows]
    assert all(len(window) == seq_len + 1 for window in whole)


# Bad data sets


def test_a_source_shorter_than_one_window_is_refused_by_name(tmp_path: Path) -> None:
    reader = count_up(tmp_path, {"long": [50], "short": [4, 4]})
    with pytest.raises(
        UserError, match="source short has 8 training tokens, fewer than one window of 9"
    ):
        TrainingLoader(reader, seq_len=8, seed=1)


def test_a_data_set_without_validation_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="fewer than two validation tokens; raise validation_fraction"
    ):
        ValidationWindows(count_up(tmp_path, {"up": [50]}), seq_len=8)


@settings(max_examples=10)
@given(cut=st.integers(1, 200))
def test_a_truncated_shard_is_found_before_training(cut: int) -> None:
    with TemporaryDirectory() as directory:
        reader = count_up(Path(directory), {"up": [50, 60]})
        reader.check_files()
        path = Path(directory) / reader.manifest.shards[1].path
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(
            UserError, match=r"00001\.npy: .* bytes, expected 248: truncated or damaged; python -m"
        ):
            reader.check_files()  # 248 = 128 of header + 2 x 60


def test_a_missing_shard_and_a_missing_manifest_are_found_before_training(tmp_path: Path) -> None:
    reader = count_up(tmp_path, {"up": [50]})
    (tmp_path / reader.manifest.shards[0].path).unlink()
    with pytest.raises(UserError, match="missing, but the manifest lists it"):
        reader.check_files()
    (tmp_path / MANIFEST_NAME).unlink()
    with pytest.raises(UserError, match=r"no manifest\.json, so the data set is not complete"):
        ShardReader(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        ShardReader(tmp_path / "absent")


@settings(max_examples=10)
@given(cut=st.integers(1, 200))
def test_a_shard_cut_short_after_the_check_is_refused_when_it_is_read(cut: int) -> None:
    with TemporaryDirectory() as directory:
        reader = count_up(Path(directory), {"up": [50, 60]})
        path = Path(directory) / reader.manifest.shards[1].path
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(UserError, match=r"00001\.npy: truncated or damaged"):
            TrainingLoader(reader, seq_len=8, seed=1).samples(np.arange(100))


# Many shards, many windows

READ_ALL = """
import resource, sys
from pathlib import Path
import numpy as np
from data_prep.errors import UserError
from data_prep.shards import ShardReader
from pretrain.data import stream
from pretrain.data.loader import TrainingLoader
soft, hard = int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
stream.OTHER_OPEN_FILES = 20
try:
    reader = ShardReader(Path(sys.argv[1]))
    rows = TrainingLoader(reader, seq_len=4, seed=1).samples(np.arange(400))
    print(len(np.unique(rows[:, 0])))
except UserError as error:
    print(error)
"""


def test_more_shards_than_a_process_may_open_by_default(tmp_path: Path) -> None:
    count_up(tmp_path, {"up": [5] * 60})
    raised = run_command(sys.executable, "-c", READ_ALL, str(tmp_path), "40", "80")
    assert raised.stdout.strip() == "74", raised.stderr  # every window, of all 60 shards
    too_many = run_command(sys.executable, "-c", READ_ALL, str(tmp_path), "40", "70")
    assert (
        "60 shards to keep open, and this process may open 70 files at most; allow it 80"
        in too_many.stdout
    )


def test_a_window_is_the_same_among_few_and_among_more_than_are_read_ahead(tmp_path: Path) -> None:
    stream = TrainingLoader(count_up(tmp_path, {"up": [2000, 3, 3000]}), seq_len=8, seed=1).corpus
    starts = np.arange(0, 4990)
    assert len(starts) > READ_AHEAD_WINDOWS
    rows = stream.windows(starts, 9)
    np.testing.assert_array_equal(rows, starts[:, None] + np.arange(9))
    for some in np.array_split(starts, 10):
        np.testing.assert_array_equal(stream.windows(some, 9), rows[some])


def test_the_benchmark_of_the_loader_runs() -> None:
    result = run_command(sys.executable, "tests/benchmarks/loader.py", "--quick")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^\| the loader \| [\d,]+ \| [\d,]+ \|$", result.stdout, re.MULTILINE)
    assert re.search(
        r"^\| then its first batch, 512 windows \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$",
        result.stdout,
        re.MULTILINE,
    )
    assert re.search(r"waited \d+\.\d+% of its time for its batch", result.stdout)


def test_the_benchmark_of_the_first_step_runs() -> None:
    result = run_command(sys.executable, "tests/benchmarks/first_step.py", "--quick")
    assert result.returncode == 0, result.stderr
    rows = [line.split(" | ")[0] for line in result.stdout.splitlines() if line.startswith("| ")][
        1:
    ]
    assert rows[0] == "| launcher, interpreter"
    assert rows[-2:] == ["| first step", "| from the command to the end of the first step"]


# Prefetch


def test_prefetch_gives_what_is_asked_for_and_makes_the_next_meanwhile() -> None:
    made: list[tuple[int, str]] = []
    ahead = threading.Event()

    def make(step: int) -> int:
        made.append((step, threading.current_thread().name))
        if step == 6:
            ahead.set()
        return 10 * step

    batches = Prefetch(make, stop_at_step=8)
    assert batches.take(5) == 50
    assert ahead.wait(10)  # nobody has asked for step 6 yet
    assert [batches.take(step) for step in (6, 7)] == [60, 70]
    batches.close()
    assert [step for step, _ in made] == [5, 6, 7]  # each once, and none beyond the last
    assert all(name.startswith("prefetch") for _, name in made[1:])


def test_prefetch_passes_an_error_on_at_its_step() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise OSError("disk gone")
        return step

    batches = Prefetch(make, stop_at_step=9)
    assert batches.take(0) == 0
    with pytest.raises(OSError, match="disk gone"):
        batches.take(1)
    batches.close()

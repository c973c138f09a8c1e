"""The loader: windows a second, warm and cold; what a far step costs; what a training step waits
for its batch.

    python tests/benchmarks/loader.py [--rounds 7] [--quick]

Windows of 1,025 uint16 ids (seq_len 1,024), random ones as training draws them, one thread. Beside
the loader stands what a plain one does: draw the window from a permutation array, slice it out of
its np.memmap, one after another.

Warm: shards in the page cache; windows per CPU second of the thread, so that other work on the
machine counts little; contestants take turns, medians over rounds. Cold: shards dropped from the
page cache before each round; wall seconds. Far: a data set of 10^12 tokens in 4,000 sparse shards;
in a fresh process each, what opening it takes (manifest, sizes of all files, loader), and after
that the first batch of step 10^9, wall seconds and growth of resident memory; holes of a sparse
file are read without a disk. Share of a step: `seconds.data` over `step_s` of a real run's
metrics.jsonl.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))

from data_prep.files import digest_file, write_durably
from data_prep.manifest import MANIFEST_NAME, Manifest, Shard, Source, integer_shares
from data_prep.shards import (
    INDEX_DTYPE,
    TOKEN_DTYPE,
    ShardReader,
    Tokens,
    shard_header,
    write_array,
)
from pretrain.data.loader import TrainingLoader

SEQ_LEN = 1_024
FAR_STEP = 10**9
DOCUMENT_TOKENS = 1_000
WEIGHTS = {"web": 0.6, "books": 0.2, "code": 0.15, "papers": 0.05}
Fetch = Callable[[int, int], Tokens]  # first sample and number of samples to rows


def write_shard(
    data_dir: Path, source: str, unit: int, tokens: int, split: str, ids: Tokens | None
) -> Shard:
    """One shard: of these ids repeated, or a sparse one."""
    path = f"shards/{split}/{source}/{unit:05d}.npy"
    (data_dir / path).parent.mkdir(parents=True, exist_ok=True)
    with (data_dir / path).open("wb") as file:
        file.write(shard_header(tokens))
        if ids is not None:
            file.write(np.resize(ids, tokens).astype(TOKEN_DTYPE).data)
        file.truncate(len(shard_header(tokens)) + tokens * TOKEN_DTYPE.itemsize)
    documents = tokens // DOCUMENT_TOKENS
    shard = Shard(
        split=split,
        source=source,
        path=path,
        tokens=tokens,
        documents=documents,
        text_bytes=4 * tokens,
        text_characters=4 * tokens,
        inputs=(f"{source}/{unit:05d}.parquet",),
        first_row=0,
        rows=documents,
        xxh3_128=f"{unit:032x}",
        index_xxh3_128=f"{unit:032x}",
    )
    if ids is None:  # nothing is trained on it, so nobody asks for its digests
        return shard
    index = np.stack([np.arange(documents) * DOCUMENT_TOKENS, np.arange(documents)], axis=1).astype(
        INDEX_DTYPE
    )
    digests = {
        "xxh3_128": digest_file(data_dir / path),
        "index_xxh3_128": write_array(data_dir / shard.index_path, index),
    }
    return replace(shard, **digests)


def synthetic_dataset(
    data_dir: Path, shards: int, tokens: int, vocab_size: int, *, sparse: bool = False
) -> Path:
    """A data set of so many shards over the sources of WEIGHTS, of random ids or none; one
    validation shard.
    """
    ids = (
        None
        if sparse
        else np.random.default_rng(1).integers(0, vocab_size, 1_000_003).astype(TOKEN_DTYPE)
    )
    names = list(WEIGHTS)
    written = [
        write_shard(data_dir, names[i % len(names)], i, tokens, "train", ids) for i in range(shards)
    ]
    written.append(write_shard(data_dir, names[0], 0, 20_000, "validation", ids))
    sources = tuple(
        Source(
            name=n, share=s, weight=w, origin=n, format="parquet", text_field="text", revision=None
        )
        for (n, w), s in zip(WEIGHTS.items(), integer_shares(list(WEIGHTS.values())), strict=True)
    )
    manifest = Manifest(
        vocab_size=vocab_size,
        eos_id=0,
        eos_token="<|endoftext|>",
        tokenizer_sha256="",
        validation_fraction=0.01,
        sources=sources,
        shards=tuple(written),
    )
    write_durably(data_dir / MANIFEST_NAME, manifest.to_bytes())
    return data_dir


def plain_loader(data_dir: Path) -> Fetch:
    """A permutation of all windows in memory, and a slice of a np.memmap for each."""
    manifest = ShardReader(data_dir).manifest
    maps = [np.load(data_dir / shard.path, mmap_mode="r") for shard in manifest.shards_of("train")]
    windows = (len(maps[0]) - 1) // SEQ_LEN  # in each; all are of one size
    order = np.random.default_rng(1).permutation(windows * len(maps))

    def fetch(first: int, count: int) -> Tokens:
        rows = np.empty((count, SEQ_LEN + 1), np.uint16)
        for row, draw in enumerate(range(first, first + count)):
            shard, window = divmod(int(order[draw % len(order)]), windows)
            rows[row] = maps[shard][window * SEQ_LEN : window * SEQ_LEN + SEQ_LEN + 1]
        return rows

    return fetch


def our_loader(data_dir: Path) -> Fetch:
    """The loader, by sample numbers."""
    loader = TrainingLoader(ShardReader(data_dir), seq_len=SEQ_LEN, seed=1)
    return lambda first, count: loader.samples(np.arange(first, first + count))


def in_turns(contestants: dict[str, Fetch], size: int, calls: int, rounds: int) -> dict[str, float]:
    """Windows per CPU second of this thread, `size` at a time; the first round, which warms up,
    is not kept.
    """
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(rounds + 1):
        for name, fetch in contestants.items():
            started = time.thread_time()
            for call in range(round_number * calls, (round_number + 1) * calls):
                fetch(call * size, size)
            rates[name].append(calls * size / (time.thread_time() - started))
    return {name: statistics.median(values[1:]) for name, values in rates.items()}


def warm(data_dir: Path, rounds: int, *, quick: bool) -> Iterator[str]:
    """The table of warm rates."""
    for path in data_dir.rglob("*.npy"):
        path.read_bytes()
    contestants = {
        "the loader": our_loader(data_dir),
        "memmap slices, permutation array": plain_loader(data_dir),
    }
    sizes = {16: 8 if quick else 1_000, 4_096: 1 if quick else 5}
    rates = [in_turns(contestants, size, calls, rounds) for size, calls in sizes.items()]
    yield "| warm, windows per CPU second | 16 a call | 4,096 a call |"
    yield "|---|---:|---:|"
    for name in contestants:
        yield f"| {name} | {rates[0][name]:,.0f} | {rates[1][name]:,.0f} |"


def drop_from_page_cache(data_dir: Path) -> None:
    """Have the next reads come from the disk."""
    for path in data_dir.rglob("*.npy"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_from_disk() -> int:
    """What this process has had read from a disk so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def cold(data_dir: Path, rounds: int, calls: int) -> Iterator[str]:
    """The table of cold rates, 16 windows a call."""
    yield "| cold, 16 windows a call | windows a second | KiB read from disk a window of 2 KiB |"
    yield "|---|---:|---:|"
    makers = {"the loader": our_loader, "memmap slices, permutation array": plain_loader}
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    for round_number in range(rounds):
        for name, make in makers.items():
            drop_from_page_cache(data_dir)  # before the files are mapped: mapped pages would stay
            fetch = make(data_dir)
            before, started = bytes_from_disk(), time.perf_counter()
            for call in range(calls):
                fetch((round_number * calls + call) * 16, 16)
            seconds, read = time.perf_counter() - started, bytes_from_disk() - before
            figures[name].append((calls * 16 / seconds, read / 1024 / (calls * 16)))
            del fetch
    for name, values in figures.items():
        rate, read = (statistics.median(column) for column in zip(*values, strict=True))
        yield f"| {name} | {rate:,.0f} | {read:,.1f} |"


def resident_bytes() -> int:
    """Memory of this process that is in RAM, mapped pages of shards included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_far_step(data_dir: Path, windows: int) -> dict[str, float]:
    """In this process: open the data set, then fetch the first batch of a far step."""
    figures = {}
    memory, started = resident_bytes(), time.perf_counter()
    reader = ShardReader(data_dir)
    reader.check_files()
    loader = TrainingLoader(reader, seq_len=SEQ_LEN, seed=1)
    figures["open_s"], figures["open_bytes"] = (
        time.perf_counter() - started,
        resident_bytes() - memory,
    )
    memory, started, cpu = resident_bytes(), time.perf_counter(), time.thread_time()
    loader.samples(np.arange(FAR_STEP * windows, (FAR_STEP + 1) * windows))
    figures["batch_cpu_s"] = time.thread_time() - cpu
    figures["batch_s"], figures["batch_bytes"] = (
        time.perf_counter() - started,
        resident_bytes() - memory,
    )
    return figures


def far(data_dir: Path, shards: int, rounds: int) -> Iterator[str]:
    """The table of a far step, each row from fresh processes, medians."""
    tokens = ShardReader(data_dir).manifest.tokens("train")
    yield (
        f"| step 10^9 of {tokens:.3g} tokens in {shards:,} shards | wall ms | CPU ms | MB more "
        "memory |"
    )
    yield "|---|---:|---:|---:|"
    for windows in (16, 512):
        command = [sys.executable, __file__, "--far", str(data_dir), "--windows", str(windows)]
        runs = [
            json.loads(subprocess.check_output(command, env=one_thread())) for _ in range(rounds)
        ]
        middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        if windows == 16:
            yield (
                f"| open the data set | {middle['open_s'] * 1e3:,.0f} | | "
                f"{middle['open_bytes'] / 1e6:.1f} |"
            )
        row = f"| then its first batch, {windows} windows | {middle['batch_s'] * 1e3:,.1f} "
        yield f"{row}| {middle['batch_cpu_s'] * 1e3:,.1f} | {middle['batch_bytes'] / 1e6:.1f} |"
    count = min(tokens // SEQ_LEN, 1_000_000)
    started = time.perf_counter()
    order = np.random.default_rng(1).permutation(count)
    scale = tokens / SEQ_LEN / count
    seconds, size = (time.perf_counter() - started) * scale * 1e3, order.nbytes * scale / 1e6
    yield (
        f"| a permutation array instead, scaled up from {count:,} windows | {seconds:,.0f} | | "
        f"{size:,.0f} |"
    )


def one_thread(**variables: str) -> dict[str, str]:
    """The environment of a child."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **variables}


def share_of_step(scratch: Path, *, quick: bool) -> str:
    """How long the steps of a real run, at the quick start's shape, waited for their batches."""
    vocab_size, steps = (512, 4) if quick else (65_536, 16)
    data_dir = synthetic_dataset(scratch / "small", 4, 100_000, vocab_size)
    command = [
        sys.executable,
        "-m",
        "pretrain.train",
        "--recipe",
        "quickstart",
        "--engine=zero2_fp32",
    ]
    command += [
        "--data-dir",
        str(data_dir),
        "--run-dir",
        str(scratch / "run"),
        "--stop-at-step",
        str(steps),
    ]
    command += ["--validation.eval_tokens=128", f"--model.vocab_size={vocab_size}"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, check=True, env=environment, cwd=scratch, stderr=subprocess.DEVNULL)
    lines = [
        json.loads(line) for line in (scratch / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    shares = [line["seconds"]["data"] / line["step_s"] for line in lines[1:]]
    return (
        f"A step of the quick start's shape waited {statistics.median(shares):.3%} of its time "
        f"for its batch (median of {len(shares)} steps; most: {max(shares):.3%})"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a smoke test of a few seconds; its figures mean little",
    )
    parser.add_argument("--far", type=Path, help=argparse.SUPPRESS)  # a child of `far`
    parser.add_argument("--windows", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.far:
        print(json.dumps(measure_far_step(flags.far, flags.windows)))
        return
    rounds = 1 if flags.quick else flags.rounds
    with tempfile.TemporaryDirectory(prefix="loader.") as name:
        scratch = Path(name)
        data_dir = synthetic_dataset(
            scratch / "warm", 8, 300_000 if flags.quick else 12_500_000, 65_536
        )
        print("\n".join(warm(data_dir, rounds, quick=flags.quick)), flush=True)
        print("\n" + "\n".join(cold(data_dir, rounds, 2 if flags.quick else 16)), flush=True)
        shards = 40 if flags.quick else 4_000
        vast = synthetic_dataset(scratch / "far", shards, 250_000_000, 65_536, sparse=True)
        print("\n" + "\n".join(far(vast, shards, rounds)), flush=True)
        print("\n" + share_of_step(scratch, quick=flags.quick))


if __name__ == "__main__":
    main()

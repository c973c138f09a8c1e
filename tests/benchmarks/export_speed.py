"""What an export takes: time beside plain reading and writing of the same bytes, and memory.

    python tests/benchmarks/export_speed.py [--rounds 4] [--layers 32] [--directory DIR] [--cold]
        [--proof] [--quick]

The checkpoint is one of the paper's size (470 M parameters at 32 layers, 5.6 GB with moments), of
random weights, saved as training saves them, in DIR (which disk matters). Export and plain copy
take turns: the plain one reads each file of the checkpoint once and writes as many bytes as the
export's weights have, to the disk. The export is what `pretrain.export_hf` does up to the proof: it
finds the checkpoint good (digests, numbers) and writes model and tokenizer. Memory is how far the
resident set of a process of its own grows above what it was after its imports. With --cold the
checkpoint is dropped from the cache before each of the two. With --proof the
last round of each form goes on to its proof, which needs the model in memory, here and in the clean
process.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from checkpoint_speed import BLOCK_BYTES, plain_read, resident_bytes

from data_prep.commands import exit_code

WIDTH, HEADS, SEQ_LEN, VOCAB_SIZE = 1_024, 32, 1_024, 65_536
# 96 MB in 24 layers, so that what holds them all at once shows beside the largest, of 17 MB.
QUICK = {"d_model": 256, "num_heads": 4, "seq_len": 64, "vocab_size": 16_384}
QUICK_LAYERS = 24
FORMS = ("tablefree", "gpt_neox")
TOKENIZER = REPOSITORY / "tests" / "data" / "witness" / "dataset" / "tokenizer"


def save_run(home: Path, layers: int, *, quick: bool) -> Path:
    """A run's directory with a checkpoint of random weights, and a tokenizer."""
    from support.untrained_runs import save_untrained_run

    paper = {
        "d_model": WIDTH,
        "num_heads": HEADS,
        "seq_len": SEQ_LEN,
        "vocab_size": VOCAB_SIZE,
    }
    sizes = QUICK if quick else paper
    run_dir = home / "run"
    save_untrained_run(run_dir, TOKENIZER, "binary_code", noise=0.02, num_layers=layers, **sizes)
    return run_dir


def plain(run_dir: Path, copy: Path, written: int) -> None:
    """Read every file of a run's checkpoint; write so many bytes to the disk."""
    block = bytearray(BLOCK_BYTES)
    for path in sorted(run_dir.glob("checkpoints/*/*.safetensors")):
        plain_read(path, block)
    with copy.open("wb", buffering=0) as file:
        for start in range(0, written, BLOCK_BYTES):
            file.write(memoryview(block)[: min(BLOCK_BYTES, written - start)])
        os.fsync(file.fileno())


def drop_from_cache(run_dir: Path) -> None:
    """Have the disk give a run's checkpoint anew."""
    os.sync()  # what is not on the disk yet stays in the cache
    for path in run_dir.glob("checkpoints/*/*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def export_as_child(run_dir: Path, form: str, output: Path, *, proves: bool, cold: bool) -> None:
    """In a process of its own: write model and tokenizer, prove them if asked; print figures."""
    from pretrain.hf.export import open_asked, subject_of, write_model_and_tokenizer
    from pretrain.hf.proof.prove import prove

    output.mkdir()
    if cold:
        drop_from_cache(run_dir)
    base = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest starts anew
    began = time.perf_counter()
    asked = open_asked(run_dir, None, form, "float32")
    tokenizer = write_model_and_tokenizer(asked, output)
    figures = {"write_s": time.perf_counter() - began}
    figures["write_bytes"] = resident_bytes("VmHWM") - base
    if proves:
        began = time.perf_counter()
        proof = prove(output, subject_of(asked, tokenizer), output)
        figures["proof_s"] = time.perf_counter() - began
        figures["proof_bytes"] = resident_bytes("VmHWM") - base
        figures["windows"] = proof.windows.number
        figures["relative"] = proof.logits.relative
    print(json.dumps(figures))


def measure(run_dir: Path, form: str, home: Path, *, proves: bool, cold: bool) -> dict[str, float]:
    """The figures of one export, which is removed."""
    output = home / form
    command = [sys.executable, __file__, "--as-child", str(run_dir), form, str(output)]
    command += ["--proves"] if proves else []
    command += ["--cold"] if cold else []
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    figures["weights"] = (output / "model.safetensors").stat().st_size
    shutil.rmtree(output)
    return figures


def row(form: str, rounds: list[tuple[float, dict[str, float]]], largest: int) -> str:
    """A line of the table."""
    ratios = [figures["write_s"] / plain_s for plain_s, figures in rounds]
    memory = max(figures["write_bytes"] for _, figures in rounds)
    last = rounds[-1][1]
    proof = "not measured"
    if "proof_s" in last:
        proof = (
            f"{last['proof_s'] / last['write_s']:.1f} times that, {last['windows']:.0f} windows, "
            f"{last['proof_bytes'] / last['weights']:.2f} of the weights in memory"
        )
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return (
        f"| `{form}` | {statistics.median(ratios):.2f} ({spread}) | {memory / 1e6:,.0f} MB | "
        f"{1.15 * largest / 1e6 + 200:,.0f} MB | {proof} |"
    )


def report(run_dir: Path, rounds: int, home: Path, *, proves: bool, cold: bool) -> str:
    """The table as Markdown."""
    import torch

    from pretrain.checkpoint.reader import Checkpoint

    (path,) = run_dir.glob("checkpoints/step-*")
    sizes = [torch.Size(shape).numel() for shape in Checkpoint(path).shapes.values()]
    lines = [
        "| form | time, of plain reading and writing | memory above the imports | at most | the "
        "proof after it |",
        "|---|---:|---:|---:|---:|",
    ]
    for form in FORMS if rounds > 1 else FORMS[:1]:
        found = []
        for number in range(rounds):
            is_last = number == rounds - 1
            figures = measure(run_dir, form, home, proves=proves and is_last, cold=cold)
            copy = home / "plain"
            if cold:
                drop_from_cache(run_dir)
            began = time.perf_counter()
            plain(run_dir, copy, int(figures["weights"]))
            plain_s = time.perf_counter() - began
            copy.unlink()
            print(f"{form}: {figures}, plain {plain_s:.1f} s", file=sys.stderr, flush=True)
            if number or rounds == 1:  # the first of several warms caches
                found.append((plain_s, figures))
        lines.append(row(form, found, 4 * max(sizes)))
    about = f"{sum(sizes):,} parameters, the largest of {4 * max(sizes) / 1e6:,.0f} MB"
    cores = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    where = "from the disk" if cold else "files in the cache"
    return "\n".join([*lines, "", f"{about}; {cores}; medians of {len(found)}, {where}"])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--directory", type=Path, help="where; default: that of temporary files")
    parser.add_argument("--cold", action="store_true", help="read from the disk, not its cache")
    parser.add_argument("--proof", action="store_true", help="measure the proof too")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: a small model, one form, once"
    )
    parser.add_argument("--as-child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--proves", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.as_child:
        run_dir, form, output = flags.as_child
        export_as_child(Path(run_dir), form, Path(output), proves=flags.proves, cold=flags.cold)
        return
    rounds = 1 if flags.quick else flags.rounds
    layers = QUICK_LAYERS if flags.quick else flags.layers
    with tempfile.TemporaryDirectory(prefix="export_speed.", dir=flags.directory) as name:
        run_dir = save_run(Path(name) / "run", layers, quick=flags.quick)
        print(report(run_dir, rounds, Path(name), proves=flags.proof, cold=flags.cold))


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""The first steps of a tiny run, digit for digit: what a refactor must not change.

    python tests/test_golden.py --record        writes this build's figures into tests/golden.json

See WHEN_IT_FAILS before you do.

The record holds the figures of several builds (torch, system, processor). On each of these they are
exact; on any other they agree to 1e-5, since matrix products come from libraries that choose their
kernels by the processor.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from support.builds import this_build
from support.forked_ranks import run_ranks
from support.hand_made_shards import write_dataset, write_source

from pretrain.modeling_tablefree import INPUT_EMBEDDINGS

RECORD = Path(__file__).parent / "golden.json"
STEPS = 4
# torch's own kernels for any x86_64; read at its first operation
FIXED_KERNELS = {"ATEN_CPU_CAPABILITY": "default"}
RECIPE = """
model: {vocab_size: 512, d_model: 48, num_layers: 2, num_heads: 4, seq_len: 32,
        input_embedding: binary_code, code_bits: 16, code_seed: 3}
batch: {global_batch_tokens: 192, micro_batch_size: 2}
optimizer: {peak_learning_rate: 2.0e-3, beta1: 0.9, beta2: 0.95, eps: 1.0e-8,
            weight_decay: 0.1, gradient_clipping: 0.5}
schedule: {warmup_fraction: 0.5, final_fraction: 0.1}
validation: {every_steps: 4, eval_tokens: 64}
checkpoints: {every_steps: 4}
train_tokens: 768
seed: 1
engine: zero2_fp32
"""
Figures = dict[str, list[float]]  # loss and gradient norm, by step

WHEN_IT_FAILS = f"""
The first {STEPS} steps of a {{}} run are not what they were:
  recorded {{}}
  now      {{}}
A step is a function of recipe, engine, data set, seed and step number, so something changed what it
computes.
- If you did not mean that (a refactor, an option, a speed-up, a new DeepSpeed): it is a bug. Find
  it; record nothing.
- If you did (initial weights, order of samples, loss, optimizer, schedule, the manifest that the
  fingerprint digests): make it a commit of its own, say there why the figures move, and record them
  in it:
      python tests/test_golden.py --record
- If only torch or the processor is new, figures agree to 1e-5 and this test passes; record when the
  pin in .ci/constraints.txt moves, or to hold that build exactly too."""


def counting(first: int, stride: int) -> list[int]:
    """A document of 40 ids; only arithmetic, so that no library's random numbers are in the
    figures.
    """
    return [1 + (first + stride * i) % 511 for i in range(40)]


def first_steps(input_embedding: str, home: Path) -> Figures:
    """Train a few steps in a process of its own, one thread, fixed kernels."""
    data = home / "data"
    ups = write_source(data, "train", "up", [counting(17 * i, 1) for i in range(40)], eos_id=0)
    threes = write_source(
        data, "train", "by-threes", [counting(29 * i, 3) for i in range(20)], eos_id=0
    )
    held_out = write_source(
        data, "validation", "up", [counting(31 * i, 1) for i in range(4)], eos_id=0
    )
    write_dataset(data, [ups, threes, held_out], {"up": 2.0, "by-threes": 1.0}, vocab_size=512)
    recipe = home / "golden.yaml"
    recipe.write_text(RECIPE)
    ended = run_ranks(
        1, recipe, data, home / "run", f"--model.input_embedding={input_embedding}", **FIXED_KERNELS
    )
    assert ended.exit_codes == [0], ended.output
    lines = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines] for name in ("loss", "gradient_norm")}


@pytest.mark.parametrize("input_embedding", INPUT_EMBEDDINGS)
def test_the_first_steps_are_what_they_were(input_embedding: str, tmp_path: Path) -> None:
    # A build that has not been at hand since an input came has no figures of it.
    records = [
        record for record in json.loads(RECORD.read_text()) if input_embedding in record["figures"]
    ]
    assert records
    of_this_build = [record for record in records if record["build"] == this_build()]
    now = first_steps(input_embedding, tmp_path)
    for record in of_this_build or records:
        recorded: Figures = record["figures"][input_embedding]
        for name, expected in recorded.items():
            agree = now[name] == (expected if of_this_build else pytest.approx(expected, rel=1e-5))
            assert agree, WHEN_IT_FAILS.format(input_embedding, recorded, now)


def agrees(record: dict[str, Any], figures: dict[str, Figures]) -> bool:
    """Whether another build's record is of the same steps: up to the order of float sums, it is."""
    return all(
        values == pytest.approx(figures[embedding][name], rel=1e-5)
        for embedding, by_name in record["figures"].items()
        for name, values in by_name.items()
    )


def record() -> None:
    """Write this build's figures into tests/golden.json; records of other builds stay where they
    agree.
    """
    figures = {}
    for input_embedding in INPUT_EMBEDDINGS:
        with TemporaryDirectory() as directory:
            figures[input_embedding] = first_steps(input_embedding, Path(directory))
    others = [each for each in json.loads(RECORD.read_text()) if each["build"] != this_build()]
    kept = [each for each in others if agrees(each, figures)]
    RECORD.write_text(
        json.dumps([*kept, {"build": this_build(), "figures": figures}], indent=1) + "\n"
    )
    print(f"wrote {RECORD}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(__doc__)
    record()

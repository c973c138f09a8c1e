"""Training on a CPU beside peers: tokens/s, peak memory and first step of the commands themselves.

    python tests/benchmarks/training_peers.py [--peers DIR] [--rounds 5] [--steps 24] [--threads N]
        [--quick] [--dotted.key=value ...]

Same shape, tokens a step, micro-batch, fp32, AdamW, clipping, thread count and text (random ids of
a Zipf law), one rank, every step logged. Each turn is a process of its own; contestants take turns,
another one first in each round. A turn's tokens/s is that of the median step after the first 4;
ratios are medians over rounds. Peak memory is the whole process's (Linux shows no less than the
0.24 GB of the process that starts it); the first step ends so many seconds after its command began.

DIR holds the peers, which run on this environment's Python and torch; one that is not there is left
out:

    pip install --no-deps --target DIR/trainer accelerate==1.15.0
    pip install --no-deps --target DIR/litgpt litgpt==0.5.13 lightning==2.6.6 \\
        pytorch-lightning==2.6.6 lightning-utilities==0.15.3 torchmetrics==1.9.0 \\
        jsonargparse==4.41.0 docstring-parser==0.18.0 typeshed-client==2.14.0
    git clone https://github.com/karpathy/nanoGPT DIR/nanoGPT        (seen at commit 3adf61e1)

What differs, besides initial weights and the order of the windows:

ours      `python -m pretrain.train`: no input table, chunked loss; validation and a checkpoint at
the end trainer   Hugging Face's Trainer with our DeepSpeed JSON (ZeRO-2), the same fused AdamW, and
a stock
          GPTNeoXForCausalLM: the same blocks, an input table (V x d parameters more), whole logits,
          127 targets in a window of 128. As in ours, DeepSpeed is kept from compiling a CPU
          extension
nanoGPT   its `train.py` as it is, `--compile=False` as its manual asks for on a CPU: learned
positions, an input table
          that is the output's too, whole logits, AdamW not fused; it scores two micro-batches
          before the first step
litgpt    its `pretrain.setup`, a pythia of the same blocks: an input table (V x d parameters more),
AdamW not fused
          and with decay on everything, a checkpoint at the end. It always compiles the whole model,
          which is most of its first step; the row of ours to hold beside it is the compiled one,
          whose blocks are
"""

import argparse
import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
import yaml

REPOSITORY = Path(__file__).parent.parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
from benchmark_recipes import load_for_benchmark
from support.hand_made_shards import write_dataset, write_source

from data_prep.commands import CommandParser, exit_code
from data_prep.errors import UserError
from pretrain.config.load import load_recipe, recipe_to_dict
from pretrain.config.recipe import Recipe
from pretrain.distributed.rendezvous import free_port

WARM_UP_STEPS = 4
NEVER = 10**6
LOSS = re.compile(r"\bloss\b\D+([\d.]+)")
QUICK = ["--model.vocab_size=512", "--model.num_layers=1", "--batch.global_batch_tokens=384"]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to train: its command, which is given a new directory, and how its steps show."""

    name: str
    command: Callable[[Path], list[str]]
    # what a line of stdout that ends a step holds; none: metrics.jsonl has the steps
    mark: str = ""
    cwd: Path = REPOSITORY
    variables: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one process of a contestant took."""

    tokens_per_s: float
    peak_bytes: int
    first_step_s: float
    losses: tuple[str, str]  # of the first and the last step, as printed


def write_inputs(recipe: Recipe, steps: int, home: Path) -> Recipe:
    """The recipe of so many steps, and the ids as everybody wants them."""
    content = recipe_to_dict(recipe) | {"train_tokens": steps * recipe.batch.global_batch_tokens}
    content["engine"] = "zero2_fp32"
    content["validation"] |= {"every_steps": NEVER, "eval_tokens": recipe.model.seq_len}
    content["checkpoints"]["every_steps"] = NEVER
    (home / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    uniform = np.random.default_rng(0).random((200, 2_000))
    ids = ((recipe.model.vocab_size - 1) ** uniform).astype(int)  # 1 and up; 0 ends a document
    written = [
        write_source(home / "data", split, "zipf", ids.tolist(), 0)
        for split in ("train", "validation")
    ]
    write_dataset(home / "data", written, {"zipf": 1.0}, recipe.model.vocab_size)
    for name in ("train.bin", "val.bin"):
        ids.astype("<u2").tofile(home / name)
    (home / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": recipe.model.vocab_size}))
    return load_recipe(str(home / "recipe.yaml"), [])


def ours(home: Path, name: str, *overrides: str) -> Contestant:
    """The training command."""
    flags = ["--recipe", str(home / "recipe.yaml"), "--data-dir", str(home / "data"), *overrides]
    return Contestant(
        name=name,
        command=lambda run_dir: [
            sys.executable,
            "-m",
            "pretrain.train",
            *flags,
            "--run-dir",
            str(run_dir),
        ],
        variables={},
    )


def own_loop(home: Path, name: str, job: str, peer: Path, mark: str) -> Contestant:
    """A peer that is a library: a job of training_peer_jobs.py calls its training loop."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("training_peer_jobs.py")),
        job,
        str(home),
    ]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    variables = {"PYTHONPATH": str(peer), "MASTER_PORT": str(free_port()), **alone}
    return Contestant(
        name=name, command=lambda run_dir: [*command, str(run_dir)], mark=mark, variables=variables
    )


def nanogpt(recipe: Recipe, home: Path, peer: Path) -> Contestant:
    """Its script, by its own flags; it reads its configuration from its own directory."""
    model, optimizer, size = recipe.model, recipe.optimizer, recipe.batch.micro_batch_size
    flags: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "compile": False,
        "dataset": home,
        "eval_interval": NEVER,
        "eval_iters": 1,
        "log_interval": 1,
        "max_iters": recipe.total_steps - 1,
        "bias": True,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_embd": model.d_model,
        "block_size": model.seq_len,
        "batch_size": size,
        "gradient_accumulation_steps": recipe.global_batch_size // size,
        "learning_rate": optimizer.peak_learning_rate,
        "weight_decay": optimizer.weight_decay,
        "beta1": optimizer.beta1,
        "beta2": optimizer.beta2,
        "grad_clip": optimizer.gradient_clipping,
        "warmup_iters": recipe.schedule.warmup(recipe.total_steps),
        "lr_decay_iters": recipe.total_steps,
        "min_lr": optimizer.peak_learning_rate * recipe.schedule.final_fraction,
    }
    command = [sys.executable, "train.py", *(f"--{key}={value}" for key, value in flags.items())]
    return Contestant(
        name="nanoGPT",
        command=lambda run_dir: [*command, f"--out_dir={run_dir}"],
        mark="iter ",
        cwd=peer,
        variables={},
    )


def contestants(recipe: Recipe, home: Path, peers: Path | None) -> list[Contestant]:
    """Ours, and whoever is there. Raises UserError if there are no peers."""
    field = [ours(home, "ours")]
    if peers is None:
        return field
    if not peers.is_dir():
        raise UserError(f"--peers {peers}: no such directory; --help says how to fill it")
    field.append(ours(home, "ours, `compile: true`", "--compile=true"))
    all_peers = {
        "trainer": own_loop(
            home, "Hugging Face Trainer, DeepSpeed", "trainer", peers / "trainer", "'loss'"
        ),
        "nanoGPT": nanogpt(recipe, home, peers / "nanoGPT"),
        "litgpt": own_loop(home, "litgpt, which compiles", "litgpt", peers / "litgpt", "(step)"),
    }
    for name, peer in all_peers.items():
        if (peers / name).is_dir():
            field.append(peer)
        else:
            print(
                f"{peers / name}: not there, so left out; --help says how to get it",
                file=sys.stderr,
            )
    return field


def printed_steps(process: subprocess.Popen[str], mark: str) -> tuple[list[float], list[str]]:
    """When each step ended, and its line of output."""
    ends, lines = [], []
    for line in process.stdout or ():
        if mark in line:
            ends.append(time.monotonic())
            lines.append(line)
    return ends, lines


def recorded_steps(process: subprocess.Popen[str], metrics: Path) -> tuple[list[float], list[str]]:
    """The same out of metrics.jsonl, the end of the first step seen from here."""
    running = os.WEXITED | os.WNOHANG | os.WNOWAIT  # look, but leave its exit to be waited for
    while not (metrics.exists() and metrics.stat().st_size) and not os.waitid(
        os.P_PID, process.pid, running
    ):
        time.sleep(0.02)
    first = time.monotonic()
    if process.stdout:
        process.stdout.read()  # until it ends
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    seconds = [json.loads(line)["step_s"] for line in lines]
    return [first + sum(seconds[1 : i + 1]) for i in range(len(seconds))], lines


def take_turn(contestant: Contestant, recipe: Recipe, threads: int, home: Path) -> Turn:
    """Run the contestant once, from its start to its end."""
    run_dir = Path(mkdtemp(dir=home))
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        **contestant.variables,
    }
    said = run_dir.with_suffix(".log")
    started = time.monotonic()
    process = subprocess.Popen(
        contestant.command(run_dir),
        stdout=subprocess.PIPE, stderr=said.open("w"), text=True, cwd=contestant.cwd, env=variables,
    )  # fmt: skip
    metrics = run_dir / "metrics.jsonl"
    ends, lines = (
        printed_steps(process, contestant.mark)
        if contestant.mark
        else recorded_steps(process, metrics)
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or len(ends) != recipe.total_steps:
        raise SystemExit(
            f"{contestant.name}: exit code {process.returncode}, {len(ends)} "
            f"steps\n{said.read_text()}"
        )
    first_loss, *_, last_loss = (str(LOSS.findall(line)[0]) for line in lines)
    return Turn(
        tokens_per_s=recipe.batch.global_batch_tokens
        / float(np.median(np.diff(ends)[WARM_UP_STEPS - 1 :])),
        peak_bytes=usage.ru_maxrss * 1024,
        first_step_s=ends[0] - started,
        losses=(first_loss, last_loss),
    )


def measure(
    field: list[Contestant], recipe: Recipe, rounds: int, threads: int, home: Path
) -> dict[str, list[Turn]]:
    """The turns of each contestant, one a round."""
    turns: dict[str, list[Turn]] = {contestant.name: [] for contestant in field}
    for number in range(rounds):
        start = number % len(field)
        for contestant in field[start:] + field[:start]:
            turn = take_turn(contestant, recipe, threads, home)
            turns[contestant.name].append(turn)
            print(f"round {number + 1}, {contestant.name}: {turn}", file=sys.stderr)
    return turns


def table(turns: dict[str, list[Turn]]) -> str:
    """The figures as Markdown: medians over rounds."""
    base = next(iter(turns.values()))
    lines = [
        "| | tokens/s | ratio to ours | peak memory, MB | to ours | first step, s | loss, first "
        "and last step |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, own in turns.items():
        rate, peak, first = (
            statistics.median(getattr(turn, key) for turn in own)
            for key in ("tokens_per_s", "peak_bytes", "first_step_s")
        )
        faster = statistics.median(
            a.tokens_per_s / b.tokens_per_s for a, b in zip(own, base, strict=True)
        )
        larger = statistics.median(
            a.peak_bytes / b.peak_bytes for a, b in zip(own, base, strict=True)
        )
        losses = " → ".join(f"{float(loss):.2f}" for loss in own[-1].losses)
        lines.append(
            f"| {name} | {rate:,.0f} | {faster:.2f} | {peak / 1e6:,.0f} | {larger:.2f} | "
            f"{first:.1f} | {losses} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument(
        "--peers", type=Path, metavar="DIR", help="where the peers are (default: ours alone)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24, help="steps of a turn, 6 or more")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: ours alone, a tiny vocabulary"
    )
    flags, overrides = parser.parse_known_args()
    if flags.steps < WARM_UP_STEPS + 2 or flags.rounds < 1:
        raise UserError(
            f"--rounds {flags.rounds} --steps {flags.steps}: expected 1 and {WARM_UP_STEPS + 2}, "
            "or more"
        )
    if flags.quick:
        overrides, flags.peers, flags.rounds, flags.steps = (
            QUICK + overrides,
            None,
            1,
            WARM_UP_STEPS + 2,
        )
    with TemporaryDirectory() as place:
        home = Path(place)
        recipe = write_inputs(load_for_benchmark(flags.recipe, overrides), flags.steps, home)
        field = contestants(recipe, home, flags.peers and flags.peers.resolve())
        turns = measure(field, recipe, flags.rounds, flags.threads, home)
    model = recipe.model
    print(
        f"{flags.recipe}: width {model.d_model}, {model.num_layers} layers, vocabulary "
        f"{model.vocab_size:,}, {recipe.batch.global_batch_tokens:,} tokens a step, fp32, "
        f"{flags.threads} threads\n\n{table(turns)}"
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))

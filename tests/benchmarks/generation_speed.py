"""Speed and memory of an export: the class that it ships beside stock GPT-NeoX, with the same
weights.

    python tests/benchmarks/generation_speed.py [--rounds 7] [--shapes quickstart,wide]
        [--cpu-seconds] [--quick]

Both forms are written as export_hf writes them, with random weights, and loaded by
`from_pretrained`, in fp32; on the first GPU if there is one (CUDA_VISIBLE_DEVICES= for the CPU).
They take turns in one run, the first to go changing with each round; ratios are medians over
rounds. Measured is `generate` itself, one text at a time: a prompt and its first token, then tokens
one by one with the KV cache. Memory is that of a process of its own for each form: what
`from_pretrained` adds at its highest, over the bytes of the weights. Both forms must generate the
same ids. --cpu-seconds counts CPU seconds of the process (all threads) in place of the clock's:
where others use the machine too.
"""

import argparse
import gc
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from data_prep.commands import exit_code
from data_prep.errors import UserError
from pretrain.config.recipe import ModelRecipe
from pretrain.hf.architectures import ARCHITECTURES, config_json
from pretrain.hf.names import MODELING_FILE
from pretrain.model.build import model_config
from pretrain.modeling_tablefree import (
    TableFreeForCausalLM,
    checkpoint_parameters,
    initialise_parameters,
)

Clock = Callable[[], float]  # seconds
FORMS = ("tablefree", "gpt_neox")
SPECIAL_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SHORT_PROMPT = 8  # tokens, before those that are counted


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and what it is asked for: tokens of a long prompt, tokens to generate."""

    model: ModelRecipe
    prompt: int
    new_tokens: int


def shape(
    width: int, layers: int, heads: int, seq_len: int, prompt: int, vocab_size: int = 65_536
) -> Shape:
    """A shape that fills half of its context with new tokens, at most 64."""
    model = ModelRecipe(
        vocab_size=vocab_size, d_model=width, num_layers=layers, num_heads=heads, seq_len=seq_len,
        input_embedding="binary_code", code_bits=16,
    )  # fmt: skip
    return Shape(model=model, prompt=prompt, new_tokens=min(64, seq_len // 2))


SHAPES = {
    "quickstart": shape(128, 4, 4, 128, prompt=112),
    "wide": shape(1024, 8, 16, 1024, prompt=512),
}
TINY = shape(32, 1, 2, 32, prompt=24, vocab_size=512)


def write_export(config: Any, weights: dict[str, Tensor], form: str, directory: Path) -> int:
    """Weights, config and code of one form, as export_hf writes them; gives the bytes of the
    weights.
    """
    exported, exported_config = ARCHITECTURES[form](dict(weights), config)
    directory.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in exported.items()},
        directory / "model.safetensors",
    )
    (directory / "config.json").write_text(
        config_json(exported_config, form, "float32", SPECIAL_IDS)
    )
    if form == "tablefree":
        shutil.copyfile(MODELING_FILE, directory / MODELING_FILE.name)
    return sum(tensor.nbytes for tensor in exported.values())


def write_exports(recipe: ModelRecipe, home: Path) -> dict[str, int]:
    """Both forms of one model of random weights, below `home`; gives the bytes of their weights."""
    config = model_config(recipe)
    model = TableFreeForCausalLM(config)
    initialise_parameters(model, 1)
    weights = {name: parameter.detach() for name, parameter in checkpoint_parameters(model)}
    return {form: write_export(model_config(recipe), weights, form, home / form) for form in FORMS}


def load(directory: Path) -> Any:
    """An export's model, ready to generate."""
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def generate(model: Any, prompt: Tensor, new_tokens: int, clock: Clock) -> tuple[float, list[int]]:
    """Seconds, and the new ids."""
    prompt = prompt.to(model.device)
    if prompt.device.type == "cuda":
        torch.cuda.synchronize()
    started = clock()
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
        min_new_tokens=new_tokens, max_new_tokens=new_tokens,
    )  # fmt: skip
    new = output[0, prompt.shape[1] :].tolist()  # waits for the device
    return clock() - started, new


def measure_speed(
    asked: Shape, rounds: int, home: Path, clock: Clock
) -> dict[str, dict[str, list[float]]]:
    """Tokens/s by item and form, a figure for each round; the first round, which warms up, is
    not kept.
    """
    models = {form: load(home / form) for form in FORMS}
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, asked.model.vocab_size, (1, asked.prompt), generator=generator)
    items = {
        "a prompt": (prompt, 1, asked.prompt),
        "new tokens": (prompt[:, :SHORT_PROMPT], asked.new_tokens, None),
    }
    rates: dict[str, dict[str, list[float]]] = {
        item: {form: [] for form in FORMS} for item in items
    }
    for number in range(rounds + 1):
        for item, (ids, new_tokens, counted) in items.items():
            seen = {}
            for form in FORMS if number % 2 else reversed(FORMS):
                seconds, seen[form] = generate(models[form], ids, new_tokens, clock)
                rates[item][form].append((counted or new_tokens) / seconds)
            if seen["tablefree"] != seen["gpt_neox"]:
                raise UserError(
                    "the two forms generate different ids: their speeds can't be compared; that "
                    "is a bug"
                )
    return {
        item: {form: values[1:] for form, values in by_form.items()}
        for item, by_form in rates.items()
    }


def memory_of_this_process() -> dict[str, int]:
    """Bytes that this process holds now, and held at most since `forget_peak`."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def load_and_measure(directory: Path, warm_up: Path) -> None:
    """Print what `from_pretrained` adds to this process at its highest; a small model makes all
    imports before.
    """
    logging.set_verbosity_error()
    AutoModelForCausalLM.from_pretrained(warm_up, trust_remote_code=True)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest memory so far
    before = memory_of_this_process()["VmRSS"]
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    with torch.no_grad():
        # weights may be mapped, not yet read
        touched = sum(float(parameter.sum()) for parameter in model.parameters())
    print(
        json.dumps(
            {"added": memory_of_this_process()["VmHWM"] - before, "finite": touched == touched}
        )
    )


def measure_memory(directory: Path, warm_up: Path) -> int:
    """Bytes that `from_pretrained` adds at its highest, in a process of its own."""
    command = [sys.executable, __file__, "--load", str(directory), "--warm-up", str(warm_up)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise UserError(f"{directory.name}: could not be loaded:\n{result.stderr}")
    return int(json.loads(result.stdout.splitlines()[-1])["added"])


def speed_rows(name: str, rates: dict[str, dict[str, list[float]]]) -> list[str]:
    """Rows of the table of speeds."""
    rows = []
    for item, by_form in rates.items():
        ours, stock = (by_form[form] for form in FORMS)
        ratio = statistics.median(a / b for a, b in zip(ours, stock, strict=True))
        medians = " | ".join(f"{statistics.median(values):,.1f}" for values in (ours, stock))
        rows.append(f"| {name}, {item} | {medians} | {ratio:.2f} |")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"some of {', '.join(SHAPES)}")
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="of the process, in place of the clock's"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test of a few seconds: a tiny model"
    )
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--warm-up", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.load:
        load_and_measure(flags.load, flags.warm_up)
        return
    unknown = set(flags.shapes.split(",")) - SHAPES.keys()
    if unknown:
        raise UserError(
            f"--shapes {flags.shapes}: no shape {min(unknown)}; there are {', '.join(SHAPES)}"
        )
    chosen = (
        {"tiny": TINY} if flags.quick else {name: SHAPES[name] for name in flags.shapes.split(",")}
    )
    clock = time.process_time if flags.cpu_seconds else time.perf_counter
    seconds = "CPU second" if flags.cpu_seconds else "s"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    speeds = [
        f"| tokens/{seconds} (median) | the export's class | stock GPT-NeoX | ratio |",
        "|---|---:|---:|---:|",
    ]
    memory = [
        "| highest memory of `from_pretrained` | weights | added | ratio |",
        "|---|---:|---:|---:|",
    ]
    with TemporaryDirectory() as directory:
        home = Path(directory)
        write_exports(TINY.model, home / "warm-up")
        for name, asked in chosen.items():
            sizes = write_exports(asked.model, home / name)
            speeds += speed_rows(name, measure_speed(asked, flags.rounds, home / name, clock))
            for form, size in sizes.items():
                added = measure_memory(home / name / form, home / "warm-up" / form)
                memory.append(
                    f"| {name}, `{form}` | {size / 1e6:,.0f} MB | {added / 1e6:,.0f} MB | "
                    f"{added / size:.2f} |"
                )
    where = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, fp32, {where}\n")
    print("\n".join(speeds), "\n")
    print("\n".join(memory))


if __name__ == "__main__":
    sys.exit(exit_code(main))

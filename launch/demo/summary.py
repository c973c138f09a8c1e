"""The quick start's last page: its figures, beside what gzip and xz make of the held-out text.

    python launch/demo/summary.py RUN_DIR STOPPED_AT_STEP [STARTED]

Prints it, and writes RUN_DIR/summary.json and summary.txt. STARTED: when the whole job did, in
seconds since 1970.
"""

import gzip
import json
import lzma
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from data_prep.errors import printable
from data_prep.files import write_durably
from data_prep.shards import ShardReader
from pretrain.checkpoint.find import load_for_reading
from pretrain.evaluation.result import read_result
from pretrain.metrics.metrics_file import read_steps
from pretrain.metrics.step_record import tokens_per_second

PROMPT = "The state of the Union"
SAMPLE_TOKENS = 60
LONGEST_BAR = 32  # characters of the page


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What summary.json holds, in its order."""

    vocab_size: int
    parameters: int
    trainable_input_parameters: int
    train_tokens: int
    steps: int
    stopped_at_step: int
    tokens_per_s: float  # of the steps that were trained
    val_loss: float  # nats a token
    val_perplexity: float
    val_bits_per_byte: float
    val_text_bytes: int
    gzip_bits_per_byte: float
    xz_bits_per_byte: float
    dataset_fingerprint: str
    hf_dir: str
    gpt_neox_dir: str
    report: str  # the page
    prompt: str
    sample: str  # the prompt and how it goes on
    seconds: float | None  # of the whole job; None where a part of it was there before


class Bar(NamedTuple):
    """A line of the page's chart."""

    name: str
    bits_per_byte: float
    bar: str


def held_out_text(reader: ShardReader) -> bytes:
    """The text of the validation documents, decoded from the shards: byte for byte what went in."""
    tokenizer = Tokenizer.from_file(str(reader.data_dir / "tokenizer" / "tokenizer.json"))
    shards = reader.manifest.shards_of("validation")
    texts = [
        tokenizer.decode(reader.tokens(shard).tolist(), skip_special_tokens=True)
        for shard in shards
    ]
    text = "".join(texts).encode()
    expected = sum(shard.text_bytes for shard in shards)
    assert len(text) == expected, "decoding did not give back the held-out text"
    return text


def generate(hf_dir: Path) -> str:
    """PROMPT and a continuation, sampled with a fixed seed, from the export alone."""
    transformers_logging.disable_progress_bar()
    # A class that runs no code of the directory.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(hf_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(hf_dir, trust_remote_code=True)
    torch.manual_seed(0)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=True,
        top_k=50,
    )
    return str(tokenizer.decode(output[0].tolist(), skip_special_tokens=True))


def bits_per_byte(compressed: bytes, text: bytes) -> float:
    """Of a text, by what it was compressed to."""
    return 8 * len(compressed) / len(text)


def measure(run_dir: Path, stopped_at_step: int, started: float | None = None) -> Summary:
    """Every figure of the summary, from the files that the stages wrote.

    `started` is in seconds since 1970. Steps of the run may have been skipped.
    """
    checkpoint = load_for_reading(run_dir)
    reader = ShardReader(run_dir / "dataset")
    text = held_out_text(reader)
    evaluation = read_result(run_dir, checkpoint.step)
    assert evaluation, "pretrain.evaluate comes before this"
    measured = evaluation.whole_split
    steps = read_steps(run_dir)
    sizes = {name: math.prod(shape) for name, shape in checkpoint.shapes.items()}
    of_input = [size for name, size in sizes.items() if name.startswith("input_embedding.")]
    return Summary(
        vocab_size=reader.manifest.vocab_size,
        parameters=sum(sizes.values()),
        trainable_input_parameters=sum(of_input),
        train_tokens=steps[-1].tokens,
        steps=checkpoint.step,
        stopped_at_step=stopped_at_step,
        tokens_per_s=tokens_per_second(steps),
        val_loss=measured.loss,
        val_perplexity=measured.perplexity,
        val_bits_per_byte=measured.bits_per_byte,
        val_text_bytes=len(text),
        gzip_bits_per_byte=bits_per_byte(gzip.compress(text, 9, mtime=0), text),
        xz_bits_per_byte=bits_per_byte(lzma.compress(text, preset=9), text),
        dataset_fingerprint=reader.manifest.fingerprint,
        hf_dir=str(run_dir / "hf"),
        gpt_neox_dir=str(run_dir / "gpt_neox"),
        report=str(run_dir / "report.html"),
        prompt=PROMPT,
        sample=generate(run_dir / "hf"),
        seconds=time.time() - started if started else None,
    )


def bars_of(summary: Summary) -> list[Bar]:
    """The chart: the larger, the longer, and the largest as long as the page has room."""
    figures = {
        "gzip -9": summary.gzip_bits_per_byte,
        "xz -9": summary.xz_bits_per_byte,
        "this model": summary.val_bits_per_byte,
    }
    largest = max(figures.values())
    return [
        Bar(name, figure, "█" * round(LONGEST_BAR * figure / largest))
        for name, figure in figures.items()
    ]


def duration(seconds: float) -> str:
    """As people say it."""
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes} min {left} s"


def page(summary: Summary) -> str:
    """The summary as a page of text."""
    source = Path(__file__).with_name("summary.txt.jinja").read_text(encoding="utf-8")
    template = jinja2.Template(source, undefined=jinja2.StrictUndefined)
    rendered: str = template.render(
        asdict(summary),
        val_text_kilobytes=summary.val_text_bytes / 1000,
        bars=bars_of(summary),
        whole_job=duration(summary.seconds) if summary.seconds else "",
    )
    return rendered


def main(arguments: list[str]) -> None:
    """The command."""
    run_dir = Path(arguments[0])
    stopped_at_step = int(arguments[1])
    started = float(arguments[2]) if len(arguments) > 2 else None
    summary = measure(run_dir, stopped_at_step, started)
    content = json.dumps(asdict(summary), indent=1, ensure_ascii=False) + "\n"
    text = page(summary)
    write_durably(run_dir / "summary.json", content.encode())
    write_durably(run_dir / "summary.txt", text.encode())
    print(printable(text))


if __name__ == "__main__":
    main(sys.argv[1:])

"""The quick start's last page: what was measured, beside what gzip and xz make of the same held-out
text.

    python launch/summary.py RUN_DIR STOPPED_AT_STEP [STARTED]

Prints it, and writes RUN_DIR/summary.json and summary.txt. STARTED: when the whole job did, in
seconds since 1970.
"""

import gzip
import json
import lzma
import math
import sys
import time
from pathlib import Path
from typing import Any

import jinja2
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from data_prep.errors import printable
from data_prep.shards import ShardReader, write_durably
from pretrain.checkpoint.reader import load_for_reading
from pretrain.evaluation.result import read_result
from pretrain.metrics.records import read_lines, tokens_per_second
from pretrain.run.claim import METRICS_NAME

PROMPT = "The state of the Union"
SAMPLE_TOKENS = 60


def held_out_text(reader: ShardReader) -> bytes:
    """The text of the validation documents, decoded from the shards: byte for byte what went in."""
    tokenizer = Tokenizer.from_file(str(reader.data_dir / "tokenizer" / "tokenizer.json"))
    shards = reader.manifest.shards_of("validation")
    texts = [
        tokenizer.decode(reader.tokens(shard).tolist(), skip_special_tokens=True)
        for shard in shards
    ]
    text = "".join(texts).encode()
    assert len(text) == sum(shard.text_bytes for shard in shards), (
        "decoding did not give back the held-out text"
    )
    return text


def generate(hf_dir: Path) -> str:
    """PROMPT and a continuation, sampled with a fixed seed, from the export alone."""
    disable_progress_bar()
    # which runs no code of its directory
    tokenizer = PreTrainedTokenizerFast.from_pretrained(hf_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(hf_dir, trust_remote_code=True)
    torch.manual_seed(0)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    mask = torch.ones_like(ids)
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=SAMPLE_TOKENS, do_sample=True, top_k=50
    )
    return str(tokenizer.decode(output[0].tolist(), skip_special_tokens=True))


def measure(run_dir: Path, stopped_at_step: int, started: float | None = None) -> dict[str, Any]:
    """Every figure of the summary, from the files that the stages wrote."""
    checkpoint = load_for_reading(run_dir)
    reader = ShardReader(run_dir / "dataset")
    text = held_out_text(reader)
    result = read_result(run_dir, checkpoint.step)
    assert result is not None, "pretrain.evaluate comes before the summary"
    score = result.whole_split
    metrics = read_lines(run_dir / METRICS_NAME)
    sizes = {name: math.prod(shape) for name, shape in checkpoint.shapes.items()}
    return {
        "vocab_size": reader.manifest.vocab_size,
        "parameters": sum(sizes.values()),
        "trainable_input_parameters": sum(
            n for name, n in sizes.items() if name.startswith("input_embedding.")
        ),
        "train_tokens": metrics[-1]["tokens"],
        "steps": checkpoint.step,
        "stopped_at_step": stopped_at_step,
        "tokens_per_s": tokens_per_second(metrics),
        "val_loss": score.loss,
        "val_perplexity": score.perplexity,
        "val_bits_per_byte": score.bits_per_byte,
        "val_text_bytes": len(text),
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
        "dataset_fingerprint": reader.manifest.fingerprint,
        "hf_dir": str(run_dir / "hf"),
        "gpt_neox_dir": str(run_dir / "gpt_neox"),
        "prompt": PROMPT,
        "sample": generate(run_dir / "hf"),
        "seconds": time.time() - started if started else None,
    }


def page(summary: dict[str, Any]) -> str:
    """The summary as a page of text."""
    template = Path(__file__).with_name("summary.txt.jinja").read_text(encoding="utf-8")
    return jinja2.Template(template, undefined=jinja2.StrictUndefined).render(summary)


if __name__ == "__main__":
    run_dir, stopped_at_step, *started = sys.argv[1:]
    summary = measure(Path(run_dir), int(stopped_at_step), *map(float, started))
    write_durably(
        Path(run_dir, "summary.json"),
        (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode(),
    )
    write_durably(Path(run_dir, "summary.txt"), page(summary).encode())
    print(printable(page(summary)))

"""The quick start's last page: what was measured, beside what gzip and xz make of the same held-out text.

python launch/summary.py RUN_DIR --stopped-at-step N [--started T]   measure, print, write RUN_DIR/summary.json
python launch/summary.py RUN_DIR --show                               print what was written before
"""

import argparse
import gzip
import json
import lzma
import math
import textwrap
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data_prep.shards import ShardReader, write_durably

PROMPT = "The state of the Union"
SAMPLE_TOKENS = 60


def held_out_text(reader: ShardReader) -> bytes:
    """The text of the validation documents, decoded from the shards: byte for byte what went in."""
    tokenizer = Tokenizer.from_file(str(reader.data_dir / "tokenizer" / "tokenizer.json"))
    shards = reader.manifest.shards_of("validation")
    texts = [tokenizer.decode(reader.tokens(shard).tolist(), skip_special_tokens=True) for shard in shards]
    text = "".join(texts).encode()
    assert len(text) == sum(shard.text_bytes for shard in shards), "decoding did not give back the held-out text"
    return text


def generate(hf_dir: Path, prompt: str) -> str:
    """A continuation, sampled with a fixed seed, from the export alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(hf_dir, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(hf_dir, trust_remote_code=True).eval()
    torch.manual_seed(0)
    ids = torch.tensor([tokenizer.encode(prompt)])
    with torch.no_grad():
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=SAMPLE_TOKENS, do_sample=True, top_k=50)
    return str(tokenizer.decode(output[0].tolist(), skip_special_tokens=True))


def measure(run_dir: Path, started: float | None, stopped_at_step: int) -> dict[str, Any]:
    """Every figure of the summary, from the files that the stages wrote."""
    from pretrain.checkpoint import load_for_reading
    from pretrain.run_directory import read_metrics

    checkpoint = load_for_reading(run_dir)
    reader = ShardReader(run_dir / "dataset")
    text = held_out_text(reader)
    evaluation = json.loads((run_dir / "evaluation.json").read_bytes())
    metrics = read_metrics(run_dir)
    sizes = {name: math.prod(shape) for name, shape in checkpoint.shapes.items()}
    return {
        "vocab_size": reader.manifest.vocab_size,
        "parameters": sum(sizes.values()),
        "trainable_input_parameters": sum(n for name, n in sizes.items() if name.startswith("input_embedding.")),
        "train_tokens": metrics[-1]["tokens"],
        "steps": checkpoint.step,
        "stopped_at_step": stopped_at_step,
        "tokens_per_s": metrics[-1]["tokens"] / sum(line["step_s"] for line in metrics),
        **{f"val_{figure}": evaluation[figure] for figure in ("loss", "perplexity", "bits_per_byte")},
        "val_text_bytes": len(text),
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
        "dataset_fingerprint": reader.manifest.fingerprint,
        "hf_dir": str(run_dir / "hf"),
        "gpt_neox_dir": str(run_dir / "gpt_neox"),
        "prompt": PROMPT,
        "sample": generate(run_dir / "hf", PROMPT),
        "seconds": time.time() - started if started else None,
    }


def page(summary: dict[str, Any]) -> str:
    """The summary as a page of text."""
    compressors = {"gzip -9": summary["gzip_bits_per_byte"], "xz -9": summary["xz_bits_per_byte"]}
    figures = {**compressors, "this model": summary["val_bits_per_byte"]}
    longest = max(figures.values())
    chart = "\n".join(f"    {name:<11} {v:5.3f}  {'█' * round(32 * v / longest)}" for name, v in figures.items())
    sample = textwrap.fill(summary["sample"].replace("\n", " "), 76, initial_indent="    ", subsequent_indent="    ")
    seconds = summary["seconds"]
    whole_job = f"  whole job    {seconds // 60:.0f} min {seconds % 60:.0f} s\n" if seconds else ""
    return f"""
  A language model without an input embedding table
  ─────────────────────────────────────────────────
  {summary["parameters"]:,} trained parameters, {summary["trainable_input_parameters"]} of them in the input; \
vocabulary {summary["vocab_size"]:,}
  {summary["train_tokens"]:,} tokens in {summary["steps"]} steps at {summary["tokens_per_s"]:,.0f} tokens/s; \
stopped and resumed at step {summary["stopped_at_step"]}
  held-out loss {summary["val_loss"]:.3f} nats a token, perplexity {summary["val_perplexity"]:,.1f}

  Bits per byte on {summary["val_text_bytes"] / 1e3:,.0f} kB of held-out text (lower is better)
{chart}

  It continues "{summary["prompt"]}":
{sample}

  data set     {summary["dataset_fingerprint"]} (fingerprint)
  table-free   {summary["hf_dir"]}
  GPT-NeoX     {summary["gpt_neox_dir"]}
{whole_job}"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="launch/summary.py", description="The quick start's summary.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--show", action="store_true", help="print the summary that is there")
    parser.add_argument("--started", type=float, help="when the whole job started, in seconds since 1970")
    parser.add_argument("--stopped-at-step", type=int, default=0, help="where training was stopped and resumed")
    flags = parser.parse_args()
    path = flags.run_dir / "summary.json"
    if flags.show:
        summary = json.loads(path.read_bytes())
    else:
        summary = measure(flags.run_dir, flags.started, flags.stopped_at_step)
        write_durably(path, (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
    print(page(summary))


if __name__ == "__main__":
    main()

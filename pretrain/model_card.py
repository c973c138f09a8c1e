"""The model card of an export: what the model is, what it was trained on, how well it does, how to load it."""

from typing import Any

import yaml

from pretrain.evaluate import Score

PAPER = "Language Models Without a Trainable Input Embedding Table: Learning from Fixed Minimal Binary Token Codes"
INPUTS = {
    "binary_code": "Each token id enters as its own {bits} bits (least significant first), repeated to the model "
    "width of {width}. The input has no trainable parameter.",
    "affine_code": "Each token id enters as A * bits xor b over GF(2), {bits} bits repeated to the model width of "
    "{width}; A is invertible, and both are in the config. The input has no trainable parameter.",
    "learned": "Token ids enter through a learned input table of width {width}: the baseline that the table-free "
    "models are measured against.",
}
FORMS = {
    "tablefree": "This repository holds the model as trained, without an input table; the class that runs it comes "
    "along as `modeling_tablefree.py`.",
    "gpt_neox": "This repository holds the model as a stock `GPTNeoXForCausalLM`: what the input computes is written "
    "out as a fixed embedding table, so it loads without remote code and gives the same logits.",
}


def metadata(manifest: dict[str, Any], figures: Score | None) -> str:
    """The YAML block that the Hugging Face hub reads."""
    content: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "see-training-data",
        "tags": ["tablefree", "causal-lm", manifest["recipe"]["model"]["input_embedding"], "arxiv:2605.09751"],
    }
    if figures:
        results = {"val_loss": figures.loss, "perplexity": figures.perplexity, "bits_per_byte": figures.bits_per_byte}
        content["model-index"] = [{"name": "tablefree", "results": [{
            "task": {"type": "text-generation"},
            "dataset": {"name": "validation split", "type": manifest["fingerprint"]},
            "metrics": [{"type": key, "value": round(value, 4)} for key, value in results.items()],
        }]}]  # fmt: skip
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---\n"


def figures_section(figures: Score | None) -> str:
    """Validation figures, or a plain word that there are none."""
    if figures is None:
        return "Not evaluated yet: `python -m pretrain.evaluate` measures loss, perplexity and bits per byte."
    return (
        "| validation targets | loss (nats) | perplexity | bits per byte |\n|---:|---:|---:|---:|\n"
        f"| {figures.targets:,} | {figures.loss:.4f} | {figures.perplexity:.2f} | {figures.bits_per_byte:.4f} |\n\n"
        "Perplexity depends on the tokenizer; bits per byte can be compared between tokenizers."
    )


def data_section(manifest: dict[str, Any]) -> str:
    """The mixture, source by source."""
    rows = [
        f"| {source['name']} | {source['origin']} | {source['weight']:g} | {source['license'] or 'not recorded'} |"
        for source in manifest["data"]["sources"]
    ]
    return "\n".join(["| source | origin | weight | licence |", "|---|---|---:|---|", *rows])


def loading_example(architecture: str) -> str:
    """How to load and generate; the stock form needs no remote code but does not mind the flag."""
    return """With this repository's name, or the path of a copy, for `REPOSITORY`:

```python
import torch
from transformers import AutoTokenizer, AutoModelForCausalLM

repo_id = "REPOSITORY"

tokenizer = AutoTokenizer.from_pretrained(repo_id, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True)
model.eval()

prompt = "Question: What is the capital of France?\\nAnswer:"
input_ids = torch.tensor([tokenizer.encode(prompt)], dtype=torch.long)

with torch.no_grad():
    output_ids = model.generate(input_ids, max_new_tokens=3, do_sample=False)

print(tokenizer.decode(output_ids[0].tolist()))
```
""" + ("" if architecture == "tablefree" else "\n`trust_remote_code` is not needed for this form.\n")


def model_card(
    manifest: dict[str, Any], *, architecture: str, dtype: str, trained_parameters: int, figures: Score | None
) -> str:
    """The whole card, from a checkpoint's manifest."""
    model, recipe = manifest["recipe"]["model"], manifest["recipe"]
    bits = manifest["model_config"].get("code_bits", 16)
    return f"""{metadata(manifest, figures)}
# A {model["input_embedding"].replace("_", " ")} language model

{INPUTS[model["input_embedding"]].format(bits=bits, width=model["d_model"])} The method is that of
*{PAPER}* (arXiv:2605.09751). {FORMS[architecture]}

| trained parameters | layers | width | heads | context | vocabulary | weights |
|---:|---:|---:|---:|---:|---:|---|
| {trained_parameters:,} | {model["num_layers"]} | {model["d_model"]} | {model["num_heads"]} | {model["seq_len"]:,} | \
{model["vocab_size"]:,} | {dtype} |

Decoder-only: pre-LayerNorm, rotary positions, GELU, untied output projection.

## Loading example

{loading_example(architecture)}
## Figures

{figures_section(figures)}

## Training

{manifest["step"] * recipe["batch"]["global_batch_tokens"]:,} tokens in {manifest["step"]:,} steps; AdamW, \
peak learning rate {recipe["optimizer"]["peak_learning_rate"]:g}, seed {manifest["seed"]}. \
Data set fingerprint `{manifest["fingerprint"]}`.

## Training data and licences

{data_section(manifest)}

The terms of the training data are those of its sources; which terms follow for these weights is for their
publisher to say.

## Intended use and limits

A research model for the study of input representations. It was not aligned, filtered or tested for safety: it can
produce text that is false, biased or offensive, and should not be used where that would do harm.

## Citation

```bibtex
@article{{bochkov2026tablefree,
  title   = {{{PAPER}}},
  author  = {{A. Bochkov}},
  journal = {{arXiv preprint arXiv:2605.09751}},
  year    = {{2026}}
}}
```
"""

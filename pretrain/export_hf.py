"""Export a run to Hugging Face format, from the fp32 masters of its newest checkpoint, without DeepSpeed.

    python -m pretrain.export_hf --run-dir RUN_DIR --output-dir DIR [--architecture tablefree|gpt_neox] [--dtype ...]

    tablefree   the model as trained, with no input table; ships pretrain/modeling_tablefree.py as remote code
    gpt_neox    a stock GPTNeoXForCausalLM, with the codes written out as its embedding table

Both give the same logits. An export is a function of the checkpoint and its evaluation: made twice, its files are
equal bit for bit.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPTNeoXConfig, PretrainedConfig

from data_prep.errors import CommandParser, UserError, exit_code, parse_json
from data_prep.shards import TOKENIZER_NAME, replace_directory
from pretrain import modeling_tablefree
from pretrain.checkpoint import Checkpoint, load_for_reading
from pretrain.evaluate import EVALUATION_NAME
from pretrain.modeling_tablefree import LAYER_NORM_EPS, ROTARY_BASE, TableFreeConfig, TokenCode
from pretrain.starts import for_card, read_starts
from pretrain.templates import render

MODELING_FILE = Path(modeling_tablefree.__file__)
WHOLE_HEAD_ROTARY: dict[str, Any] = {"rotary_pct": 1.0, "rotary_emb_base": ROTARY_BASE}

FIGURES = ("targets", "loss", "perplexity", "bits_per_byte")  # of an evaluation, which the card tells

Weights = dict[str, Tensor]

# our parameter's name -> stock GPT-NeoX's (as on disk; transformers 5 reads embed_out as lm_head)
GPT_NEOX_NAMES = {
    "input_embedding.": "gpt_neox.embed_in.",
    "layers.": "gpt_neox.layers.",
    ".attention_norm.": ".input_layernorm.",
    ".attention.output.": ".attention.dense.",
    ".mlp_norm.": ".post_attention_layernorm.",
    ".mlp.up.": ".mlp.dense_h_to_4h.",
    ".mlp.down.": ".mlp.dense_4h_to_h.",
    "final_norm.": "gpt_neox.final_layer_norm.",
    "output_projection.": "embed_out.",
}


def gpt_neox_name(name: str) -> str:
    """The stock name of one of our parameters."""
    for ours, stock in GPT_NEOX_NAMES.items():
        name = name.replace(ours, stock)
    return name


def tablefree_parts(masters: Weights, config: TableFreeConfig) -> tuple[Weights, PretrainedConfig]:
    """Weights and config of the model as trained."""
    config.architectures = ["TableFreeForCausalLM"]
    classes = {"AutoConfig": "TableFreeConfig", "AutoModelForCausalLM": "TableFreeForCausalLM"}
    config.auto_map = {auto: f"{MODELING_FILE.stem}.{own}" for auto, own in classes.items()}
    return masters, config


def gpt_neox_parts(masters: Weights, config: TableFreeConfig) -> tuple[Weights, PretrainedConfig]:
    """Weights and config of a stock GPT-NeoX that computes the same."""
    weights = {gpt_neox_name(name): parameter for name, parameter in masters.items()}
    if config.input_embedding != "learned":  # the codes of all ids, (V, D), stand in for a trained table
        weights["gpt_neox.embed_in.weight"] = TokenCode(config)(torch.arange(config.vocab_size)[None], torch.float32)[0]
    stock = GPTNeoXConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, intermediate_size=4 * config.d_model,
        max_position_embeddings=config.seq_len, hidden_act="gelu", layer_norm_eps=LAYER_NORM_EPS,
        use_parallel_residual=False, attention_bias=True, tie_word_embeddings=False,
        architectures=["GPTNeoXForCausalLM"], **WHOLE_HEAD_ROTARY,
    )  # fmt: skip
    return weights, stock


ARCHITECTURES = {"tablefree": tablefree_parts, "gpt_neox": gpt_neox_parts}


def config_json(config: PretrainedConfig, architecture: str, dtype: str, special_ids: dict[str, int]) -> str:
    """`config.json`; the stock one also in the words of transformers 4."""
    in_words_of_4 = WHOLE_HEAD_ROTARY if architecture == "gpt_neox" else {}
    content = config.to_diff_dict() | special_ids | {"dtype": dtype, "use_cache": True} | in_words_of_4
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def special_token_ids(tokenizer: Path, eos_id: int) -> dict[str, int]:
    """The ids of begin, end and padding as a tokenizer names them; the end-of-document id where it names none."""
    config = json.loads((tokenizer / "tokenizer_config.json").read_bytes())
    added = json.loads((tokenizer / "tokenizer.json").read_bytes()).get("added_tokens", [])
    ids = {token["content"]: token["id"] for token in added}
    names = {kind: config.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
    contents = {kind: name.get("content") if isinstance(name, dict) else name for kind, name in names.items()}
    return {f"{kind}_token_id": ids.get(content, eos_id) for kind, content in contents.items()}


def copy_tokenizer(run_dir: Path, destination: Path, seq_len: int) -> None:
    """The run's tokenizer, file by file, told how long a text the model takes."""
    tokenizer = run_dir / TOKENIZER_NAME
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (tokenizer / name).is_file():
            raise UserError(f"{tokenizer / name}: missing; copy the tokenizer of the run's data set to {tokenizer}")
    for file in sorted(tokenizer.iterdir()):
        shutil.copyfile(file, destination / file.name)
    path = destination / "tokenizer_config.json"
    content = json.loads(path.read_bytes()) | {"model_max_length": seq_len}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_figures(run_dir: Path, step: int) -> dict[str, Any] | None:
    """What `pretrain.evaluate` measured, if it did so at the exported step."""
    path = run_dir / EVALUATION_NAME
    advice = "run python -m pretrain.evaluate again, or remove it"
    content = parse_json(path.read_bytes(), str(path), advice) if path.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: not what pretrain.evaluate writes; {advice}")
    if content.get("step") != step:
        return None
    if not all(isinstance(content.get(name), int | float) for name in FIGURES):
        raise UserError(f"{path}: lacks figures of {', '.join(FIGURES)}; {advice}")
    return content


def write_export(run_dir: Path, checkpoint: Checkpoint, directory: Path, architecture: str, dtype: str) -> None:
    """All files of the export."""
    config = TableFreeConfig.from_dict(checkpoint.manifest["model_config"])
    masters = {name: checkpoint.parameter(name) for name in checkpoint.shapes}
    weights, exported_config = ARCHITECTURES[architecture](masters, config)
    weights = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in weights.items()}
    copy_tokenizer(run_dir, directory, config.seq_len)
    special_ids = special_token_ids(directory, checkpoint.manifest["data"]["eos_id"])
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    card = render(
        "model_card.md.jinja", manifest=checkpoint.manifest, architecture=architecture, dtype=dtype,
        trained_parameters=sum(map(torch.numel, masters.values())), figures=read_figures(run_dir, checkpoint.step),
        starts=for_card(read_starts(run_dir), checkpoint.step),
    )  # fmt: skip
    (directory / "README.md").write_text(card + "\n", encoding="utf-8")
    (directory / "generation_config.json").write_text(json.dumps(special_ids, indent=2) + "\n", encoding="utf-8")
    config_text = config_json(exported_config, architecture, dtype, special_ids)
    (directory / "config.json").write_text(config_text, encoding="utf-8")
    if architecture == "tablefree":
        shutil.copyfile(MODELING_FILE, directory / MODELING_FILE.name)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    about = "Export the newest good checkpoint of a run to Hugging Face format."
    parser = CommandParser(prog="python -m pretrain.export_hf", description=about)
    parser.add_argument("--run-dir", required=True, type=Path, help="directory of a run of pretrain.train")
    parser.add_argument("--output-dir", required=True, type=Path, help="where the export goes")
    forms = "tablefree: as trained, with remote code (default); gpt_neox: loads anywhere, codes as a table"
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="tablefree", help=forms)
    weights = "of the weights (default: float32)"
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help=weights)
    flags = parser.parse_args(arguments)
    run, output, form = flags.run_dir, flags.output_dir, (flags.architecture, flags.dtype)
    checkpoint = load_for_reading(run)
    if output.exists() and not (output / "model.safetensors").is_file() and any(output.iterdir()):
        raise UserError(f"--output-dir {output}: holds something else than an export; give an empty directory")
    replace_directory(output, lambda staged: write_export(run, checkpoint, staged, *form))
    print(f"{output}: {flags.architecture} in {flags.dtype}, from {checkpoint.path}")


if __name__ == "__main__":
    sys.exit(exit_code(main))

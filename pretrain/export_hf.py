"""Export a run to Hugging Face format, from the fp32 masters of a checkpoint, without DeepSpeed.

    python -m pretrain.export_hf --run-dir RUN_DIR --output-dir DIR [--architecture tablefree|gpt_neox] [--dtype ...]
        [--step N] [--overwrite]

    tablefree   the model as trained, with no input table; ships pretrain/modeling_tablefree.py as remote code
    gpt_neox    a stock GPTNeoXForCausalLM, with the codes written out as its embedding table

Both give the same logits. An export is a function of the checkpoint and its evaluation: made twice, its files are
equal bit for bit. What it may replace is in pretrain/export_marker.py.
"""

import json
import shutil
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GPTNeoXConfig, PretrainedConfig

from data_prep.errors import CommandParser, UserError, exit_code, one_line
from data_prep.shards import TOKENIZER_NAME, ShardReader, replace_directory
from pretrain import modeling_tablefree
from pretrain.checkpoint import Checkpoint, load_for_reading
from pretrain.engines import engines_of
from pretrain.evaluate import figures_of, run_of
from pretrain.export_ids import check_ids, hard_texts, texts_of_every_source
from pretrain.export_marker import refuse_to_replace, write_marker
from pretrain.export_tokenizer import ExportedTokenizer, copy_tokenizer, refuse_another_tokenizer
from pretrain.modeling_tablefree import (
    LAYER_NORM_EPS,
    MODELING_VERSION,
    ROTARY_BASE,
    TableFreeConfig,
    TokenCode,
    name_in_model,
)
from pretrain.starts import for_card, read_starts
from pretrain.templates import render
from pretrain.token_codes import aliased_ids

MODELING_FILE = Path(modeling_tablefree.__file__)
WHOLE_HEAD_ROTARY: dict[str, Any] = {"rotary_pct": 1.0, "rotary_emb_base": ROTARY_BASE}

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
    config.modeling_version = MODELING_VERSION
    classes = {
        "AutoConfig": "TableFreeConfig",
        "AutoModel": "TableFreeModel",
        "AutoModelForCausalLM": "TableFreeForCausalLM",
    }
    config.auto_map = {auto: f"{MODELING_FILE.stem}.{own}" for auto, own in classes.items()}
    return {name_in_model(name): parameter for name, parameter in masters.items()}, config


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


def special_token_ids(roles: dict[str, int], eos_id: int) -> dict[str, int]:
    """The ids of begin, end and padding as a tokenizer names them; the end-of-document id where it names none."""
    return {f"{kind}_token_id": roles.get(f"{kind}_token", eos_id) for kind in ("bos", "eos", "pad")}


def save_weights(weights: Weights, path: Path) -> None:
    """A safetensors file with the mode of those beside it: the library makes its own readable by nobody else."""
    save_file(weights, path, metadata={"format": "pt"})
    sibling = path.with_name("tokenizer_config.json")
    path.chmod(stat.S_IMODE(sibling.stat().st_mode))


def tokens_of(tokenizer: Tokenizer, ids: Sequence[int] | None) -> dict[int, str]:
    """Ids and the texts they stand for, quoted."""
    return {token_id: repr(tokenizer.decode([token_id], skip_special_tokens=False)) for token_id in ids or ()}


def write_export(
    run_dir: Path, checkpoint: Checkpoint, directory: Path, architecture: str, dtype: str
) -> ExportedTokenizer:
    """All files of the export."""
    config = TableFreeConfig.from_dict(checkpoint.manifest["model_config"])
    masters = {name: checkpoint.parameter(name) for name in checkpoint.shapes}
    weights, exported_config = ARCHITECTURES[architecture](masters, config)
    weights = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in weights.items()}
    tokenizer = copy_tokenizer(
        run_dir / TOKENIZER_NAME, directory, config.seq_len, names_unknown=architecture == "gpt_neox"
    )
    special_ids = special_token_ids(tokenizer.roles, checkpoint.manifest["data"]["eos_id"])
    save_weights(weights, directory / "model.safetensors")
    card = render(
        "model_card.md.jinja", manifest=checkpoint.manifest, architecture=architecture, dtype=dtype,
        trained_parameters=sum(map(torch.numel, masters.values())), figures=figures_of(run_dir, checkpoint.step),
        starts=for_card(read_starts(run_dir), checkpoint.step),
        one_input=tokens_of(tokenizer.reference, aliased_ids(config.to_dict())), engines=engines_of(architecture),
    )  # fmt: skip
    (directory / "README.md").write_text(card + "\n", encoding="utf-8")
    (directory / "generation_config.json").write_text(json.dumps(special_ids, indent=2) + "\n", encoding="utf-8")
    config_text = config_json(exported_config, architecture, dtype, special_ids)
    (directory / "config.json").write_text(config_text, encoding="utf-8")
    if architecture == "tablefree":
        shutil.copyfile(MODELING_FILE, directory / MODELING_FILE.name)
    write_marker(directory, checkpoint, architecture, dtype)
    return tokenizer


def check_tokenizer(export: Path, tokenizer: ExportedTokenizer, checkpoint: Checkpoint, place: Path) -> str:
    """What AutoTokenizer gives with an export must be the data's ids; returns of what that was seen."""
    check_ids(export, tokenizer.reference, hard_texts(tokenizer.reference), place)
    data_dir = Path(checkpoint.manifest["data_dir"])
    try:
        reader = ShardReader(data_dir)
        if reader.manifest.fingerprint != checkpoint.manifest["fingerprint"]:
            raise UserError(f"{data_dir}: is another data set by now")
        texts = list(texts_of_every_source(reader, tokenizer.reference))
    except (UserError, OSError) as error:  # an export needs no data set: it may be made where there is none
        return f"AutoTokenizer gives the data's ids for hard texts; no documents were compared ({one_line(error)})"
    compared = check_ids(export, tokenizer.reference, texts, place)
    sources = len(reader.manifest.sources)
    return f"AutoTokenizer gives the data's ids for hard texts and {compared} documents of {sources} sources"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    about = "Export a checkpoint of a run, the newest good one unless --step names another, to Hugging Face format."
    parser = CommandParser(prog="python -m pretrain.export_hf", description=about)
    run_help = "directory of a run of pretrain.train, or of one of its checkpoints"
    parser.add_argument("--run-dir", required=True, type=Path, help=run_help)
    output_help = "where the export goes; an export of the same run that is there is replaced, nothing else"
    parser.add_argument("--output-dir", required=True, type=Path, help=output_help)
    parser.add_argument("--step", type=int, metavar="N", help="export the checkpoint after N steps")
    overwrite = "replace an export of another run, or one whose files were edited"
    parser.add_argument("--overwrite", action="store_true", help=overwrite)
    forms = "tablefree: as trained, with remote code (default); gpt_neox: loads anywhere, codes as a table"
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="tablefree", help=forms)
    weights = "of the weights (default: float32)"
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help=weights)
    flags = parser.parse_args(arguments)
    checkpoint = load_for_reading(flags.run_dir, flags.step)
    run_dir = run_of(checkpoint, flags.run_dir)
    if run_dir is None:
        raise UserError(f"--run-dir {flags.run_dir}: a checkpoint outside of its run has no tokenizer; give the run's")
    refuse_another_tokenizer(run_dir / TOKENIZER_NAME, checkpoint.manifest["data"].get("tokenizer_sha256"))
    output = flags.output_dir
    refuse_to_replace(output, checkpoint, overwrite=flags.overwrite)

    about_tokenizer: list[str] = []

    def write(staged: Path) -> None:
        tokenizer = write_export(run_dir, checkpoint, staged, flags.architecture, flags.dtype)
        about_tokenizer.extend(tokenizer.left_out)
        about_tokenizer.append(check_tokenizer(staged, tokenizer, checkpoint, output))
        refuse_to_replace(output, checkpoint, overwrite=flags.overwrite)  # that took a while

    replace_directory(output, write)
    print(f"{output}: {flags.architecture} in {flags.dtype}, from {checkpoint.path}")
    for line in about_tokenizer:
        print(f"tokenizer: {line}")


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Export a run to Hugging Face format or GGUF, from the fp32 masters of a checkpoint, without
DeepSpeed.

    python -m pretrain.export_hf --run-dir RUN_DIR --output-dir DIR [--architecture tablefree|gpt_neox|gguf]
        [--dtype ...] [--step N] [--overwrite]
    python -m pretrain.export_hf --check DIR

    tablefree   the model as trained, with no input table; ships pretrain/modeling_tablefree.py as remote code
    gpt_neox    a stock GPTNeoXForCausalLM, with the codes written out as its embedding table
    gguf        the same as one file for llama.cpp and the engines built on it

All give the same logits, those engines to 0.004. An export is a function of the checkpoint and its
evaluation: made twice, its files are equal bit for bit. What it may replace is in
pretrain/hf/marker.py.
"""

import argparse
import itertools
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
from data_prep.shards import TOKENIZER_NAME, ShardReader, read_tokenizer, replace_directory
from pretrain import modeling_tablefree
from pretrain.checkpoint.reader import Checkpoint, load_for_reading, run_of
from pretrain.evaluation.result import read_result
from pretrain.hf.check import AGAIN, check_export
from pretrain.hf.engines import engines_of
from pretrain.hf.gguf import DTYPES as GGUF_DTYPES
from pretrain.hf.gguf import Vocabulary, gguf_name, require_gguf, write_gguf
from pretrain.hf.ids import check_ids, hard_texts, texts_of_every_source
from pretrain.hf.marker import refuse_to_replace, write_marker
from pretrain.hf.tokenizer import (
    DEFINITION_NAME,
    ExportedTokenizer,
    as_exported,
    refuse_another_tokenizer,
)
from pretrain.model.token_codes import aliased_ids
from pretrain.modeling_tablefree import (
    LAYER_NORM_EPS,
    MODELING_VERSION,
    ROTARY_BASE,
    TableFreeConfig,
    TokenCode,
    name_in_model,
)
from pretrain.run.starts import for_card, read_starts
from pretrain.view.templates import render

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


def gpt_neox_parts(masters: Weights, config: TableFreeConfig) -> tuple[Weights, GPTNeoXConfig]:
    """Weights and config of a stock GPT-NeoX that computes the same."""
    weights = {gpt_neox_name(name): parameter for name, parameter in masters.items()}
    # the codes of all ids, (V, D), stand in for a trained table
    if config.input_embedding != "learned":
        weights["gpt_neox.embed_in.weight"] = TokenCode(config)(
            torch.arange(config.vocab_size)[None], torch.float32
        )[0]
    stock = GPTNeoXConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=4 * config.d_model,
        max_position_embeddings=config.seq_len,
        hidden_act="gelu",
        layer_norm_eps=LAYER_NORM_EPS,
        use_parallel_residual=False,
        attention_bias=True,
        tie_word_embeddings=False,
        architectures=["GPTNeoXForCausalLM"],
        **WHOLE_HEAD_ROTARY,
    )
    return weights, stock


ARCHITECTURES = {"tablefree": tablefree_parts, "gpt_neox": gpt_neox_parts}
DTYPES = {
    "tablefree": ("float32", "bfloat16"),
    "gpt_neox": ("float32", "bfloat16"),
    "gguf": GGUF_DTYPES,
}  # the default first


def config_json(
    config: PretrainedConfig, architecture: str, dtype: str, special_ids: dict[str, int]
) -> str:
    """`config.json`; the stock one also in the words of transformers 4."""
    in_words_of_4 = WHOLE_HEAD_ROTARY if architecture == "gpt_neox" else {}
    content = (
        config.to_diff_dict() | special_ids | {"dtype": dtype, "use_cache": True} | in_words_of_4
    )
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def special_token_ids(roles: dict[str, int], eos_id: int) -> dict[str, int]:
    """The ids of begin, end and padding as a tokenizer names them; the end-of-document id where
    it names none.
    """
    return {
        f"{kind}_token_id": roles.get(f"{kind}_token", eos_id) for kind in ("bos", "eos", "pad")
    }


def write_model(directory: Path, weights: Weights, config_text: str, dtype: str) -> None:
    """Weights and configuration. safetensors makes a file that nobody else may read: it gets the
    mode of the others.
    """
    (directory / "config.json").write_text(config_text, encoding="utf-8")
    path = directory / "model.safetensors"
    converted = {
        name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in weights.items()
    }
    save_file(converted, path, metadata={"format": "pt"})
    path.chmod(stat.S_IMODE((directory / "config.json").stat().st_mode))


def tokens_of(tokenizer: Tokenizer, ids: Sequence[int] | None) -> dict[int, str]:
    """Ids and the texts they stand for, quoted."""
    return {
        token_id: repr(tokenizer.decode([token_id], skip_special_tokens=False))
        for token_id in ids or ()
    }


def write_export(
    run_dir: Path, checkpoint: Checkpoint, directory: Path, architecture: str, dtype: str
) -> ExportedTokenizer:
    """All files of the export."""
    config = TableFreeConfig.from_dict(checkpoint.manifest["model_config"])
    masters = {name: checkpoint.parameter(name) for name in checkpoint.shapes}
    source = run_dir / TOKENIZER_NAME
    tokenizer = as_exported(
        read_tokenizer(source), source, config.seq_len, names_unknown=architecture == "gpt_neox"
    )
    special_ids = special_token_ids(tokenizer.roles, checkpoint.manifest["data"]["eos_id"])
    result = read_result(run_dir, checkpoint.step)
    card = render(
        "model_card.md.jinja",
        manifest=checkpoint.manifest,
        architecture=architecture,
        dtype=dtype,
        trained_parameters=sum(map(torch.numel, masters.values())),
        figures=result.whole_split if result else None,
        starts=for_card(read_starts(run_dir), checkpoint.step),
        one_input=tokens_of(tokenizer.reference, aliased_ids(config.to_dict())),
        gguf_name=gguf_name(dtype),
        end_token=tokenizer.reference.id_to_token(special_ids["eos_token_id"]),
        engines=engines_of(architecture),
    )
    (directory / "README.md").write_text(card + "\n", encoding="utf-8")
    if architecture == "gguf":
        weights, stock = gpt_neox_parts(masters, config)
        vocabulary = Vocabulary(
            definition=json.loads(tokenizer.files[DEFINITION_NAME]),
            tokenizer=tokenizer.reference,
            special_ids=special_ids,
            chat_template=tokenizer.chat_template,
        )
        write_gguf(directory / gguf_name(dtype), weights, stock, vocabulary, dtype)
    else:
        weights, exported_config = ARCHITECTURES[architecture](masters, config)
        tokenizer.write_to(directory)
        write_model(
            directory,
            weights,
            config_json(exported_config, architecture, dtype, special_ids),
            dtype,
        )
        (directory / "generation_config.json").write_text(
            json.dumps(special_ids, indent=2) + "\n", encoding="utf-8"
        )
    if architecture == "tablefree":
        shutil.copyfile(MODELING_FILE, directory / MODELING_FILE.name)
    write_marker(directory, checkpoint, architecture, dtype)
    return tokenizer


def check_tokenizer(
    export: Path, tokenizer: ExportedTokenizer, checkpoint: Checkpoint, place: Path
) -> str:
    """What AutoTokenizer gives with an export must be the data's ids; returns of what that was
    seen.
    """
    check_ids(export, tokenizer.reference, hard_texts(tokenizer.reference), place)
    data_dir = Path(checkpoint.manifest["data_dir"])
    try:
        reader = ShardReader(data_dir)
        if reader.manifest.fingerprint != checkpoint.manifest["fingerprint"]:
            raise UserError(f"{data_dir}: is another data set by now")
        texts = list(texts_of_every_source(reader, tokenizer.reference))
    except (
        UserError,
        OSError,
    ) as error:  # an export needs no data set: it may be made where there is none
        return (
            "AutoTokenizer gives the data's ids for hard texts; no documents were compared "
            f"({one_line(error)})"
        )
    compared = check_ids(export, tokenizer.reference, texts, place)
    return (
        f"AutoTokenizer gives the data's ids for hard texts and {compared} documents, some of "
        "every source"
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises UserError for flags that don't go together."""
    about = (
        "Export a checkpoint of a run, the newest good one unless --step names another, to "
        "Hugging Face format."
    )
    parser = CommandParser(prog="python -m pretrain.export_hf", description=about)
    run_help = "directory of a run of pretrain.train, or of one of its checkpoints"
    parser.add_argument("--run-dir", type=Path, help=run_help)
    output_help = (
        "where the export goes; an export of the same run that is there is replaced, nothing else"
    )
    parser.add_argument("--output-dir", type=Path, help=output_help)
    parser.add_argument("--step", type=int, metavar="N", help="export the checkpoint after N steps")
    overwrite = "replace an export of another run, or one whose files were edited"
    parser.add_argument("--overwrite", action="store_true", help=overwrite)
    forms = (
        "tablefree: as trained, with remote code (default); gpt_neox: loads anywhere, codes as a "
        "table; gguf: the "
    )
    forms += "same for llama.cpp, as one file"
    parser.add_argument("--architecture", choices=DTYPES, default="tablefree", help=forms)
    weights = "of the weights: float32 (default) or bfloat16; of gguf f32 (default), f16 or q8_0"
    parser.add_argument(
        "--dtype", choices=dict.fromkeys(itertools.chain(*DTYPES.values())), help=weights
    )
    check = (
        "tell whether an export is whole and right with the transformers of today, and export "
        "nothing"
    )
    parser.add_argument("--check", type=Path, metavar="DIR", help=check)
    flags = parser.parse_args(arguments)
    if flags.check is not None:
        others = [
            name
            for name, value in vars(flags).items()
            if value != parser.get_default(name) and name != "check"
        ]
        if others:
            parser.error(f"--{others[0].replace('_', '-')} does not go with --check")
        return flags
    for name in ("run_dir", "output_dir"):
        if getattr(flags, name) is None:
            parser.error(f"--{name.replace('_', '-')} is missing")
    possible = DTYPES[flags.architecture]
    if flags.dtype not in (None, *possible):
        raise UserError(
            f"--dtype {flags.dtype}: --architecture {flags.architecture} takes "
            f"{' or '.join(possible)}"
        )
    flags.dtype = flags.dtype or possible[0]
    if flags.architecture == "gguf":
        require_gguf()
    return flags


def report(directory: Path) -> None:
    """Print what is to be said of an export. Raises UserError if something is wrong with it."""
    verdict = check_export(directory)
    print(verdict.about)
    for note in verdict.notes:
        print(f"note: {note}")
    if len(verdict.problems) == 1:
        raise UserError(verdict.problems[0])
    for problem in verdict.problems:
        print(f"problem: {problem}")
    if verdict.problems:
        raise UserError(
            f"{directory}: {len(verdict.problems)} problems; mend them as said above, or {AGAIN}"
        )
    print("whole, and right as far as is known")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    flags = parse_arguments(arguments)
    if flags.check is not None:
        report(flags.check)
        return
    checkpoint = load_for_reading(flags.run_dir, flags.step)
    run_dir = run_of(checkpoint, flags.run_dir)
    if run_dir is None:
        raise UserError(
            f"--run-dir {flags.run_dir}: a checkpoint outside of its run has no tokenizer; give "
            "the run's"
        )
    refuse_another_tokenizer(
        run_dir / TOKENIZER_NAME, checkpoint.manifest["data"].get("tokenizer_sha256")
    )
    output = flags.output_dir
    refuse_to_replace(output, checkpoint, overwrite=flags.overwrite)
    about_tokenizer: list[str] = []

    def write(staged: Path) -> None:
        tokenizer = write_export(run_dir, checkpoint, staged, flags.architecture, flags.dtype)
        about_tokenizer.extend(tokenizer.left_out)
        if flags.architecture in ARCHITECTURES:
            about_tokenizer.append(check_tokenizer(staged, tokenizer, checkpoint, output))
        refuse_to_replace(output, checkpoint, overwrite=flags.overwrite)  # that took a while

    replace_directory(output, write)
    print(f"{output}: {flags.architecture} in {flags.dtype}, from {checkpoint.path}")
    for line in about_tokenizer:
        print(f"tokenizer: {line}")


if __name__ == "__main__":
    sys.exit(exit_code(main))

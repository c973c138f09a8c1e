"""Writes a checkpoint of a run as an export: weights, configuration, tokenizer, card, marker.

An export is a function of the checkpoint and its evaluation: made twice, its files are equal bit
for bit.
"""

import json
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from data_prep.errors import UserError, one_line
from data_prep.files import replace_directory
from data_prep.shards import TOKENIZER_NAME, ShardReader, read_tokenizer
from pretrain.checkpoint.find import load_for_reading, run_of
from pretrain.checkpoint.reader import Checkpoint
from pretrain.data.tokenizer import DEFINITION_NAME, refuse_another_tokenizer
from pretrain.evaluation.result import read_result
from pretrain.hf.architectures import ARCHITECTURES, Weights, config_json, gpt_neox_parts
from pretrain.hf.engines import engines_of
from pretrain.hf.gguf import Vocabulary, write_gguf
from pretrain.hf.ids import check_ids, hard_texts, texts_of_every_source
from pretrain.hf.marker import refuse_to_replace, write_marker
from pretrain.hf.names import (
    CARD_NAME,
    CONFIG_FILE,
    GENERATION_FILE,
    GGUF,
    GPT_NEOX,
    MODELING_FILE,
    TABLEFREE,
    WEIGHTS_FILE,
    gguf_name,
)
from pretrain.hf.tokenizer import ExportedTokenizer, as_exported
from pretrain.model.token_codes import aliased_ids
from pretrain.modeling_tablefree import TableFreeConfig
from pretrain.run.starts import for_card, read_starts
from pretrain.view.templates import render


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be exported, and how."""

    checkpoint: Checkpoint
    run_dir: Path  # its run's
    architecture: str  # one of DTYPES
    dtype: str  # one of its architecture's


def open_asked(place: Path, step: int | None, architecture: str, dtype: str) -> Asked:
    """The checkpoint to export: `place` is a run's directory, or a checkpoint's in its run.

    Raises UserError where there is no good one, or its tokenizer is not at hand.
    """
    checkpoint = load_for_reading(place, step)
    run_dir = run_of(checkpoint, place)
    if run_dir is None:
        raise UserError(
            f"--run-dir {place}: a checkpoint outside of its run has no tokenizer; give the run's"
        )
    expected = checkpoint.manifest.data.tokenizer_sha256
    refuse_another_tokenizer(run_dir / TOKENIZER_NAME, expected)
    return Asked(checkpoint=checkpoint, run_dir=run_dir, architecture=architecture, dtype=dtype)


def export(asked: Asked, output: Path, *, overwrite: bool) -> list[str]:
    """Put an export in place of what is at `output`; returns what there is to say of its tokenizer.

    What may be replaced is in pretrain/hf/marker.py. Raises UserError where it may not, or where
    the tokenizer would give other ids than the data's.
    """
    about_tokenizer: list[str] = []

    def write(staged: Path) -> None:
        tokenizer = write_export(asked, staged)
        about_tokenizer.extend(tokenizer.left_out)
        if asked.architecture in ARCHITECTURES:
            about_tokenizer.append(check_tokenizer(staged, tokenizer, asked.checkpoint, output))
        # Again, since writing took a while.
        refuse_to_replace(output, asked.checkpoint, overwrite=overwrite)

    refuse_to_replace(output, asked.checkpoint, overwrite=overwrite)
    replace_directory(output, write)
    return about_tokenizer


def write_export(asked: Asked, directory: Path) -> ExportedTokenizer:
    """Write all files of an export into an empty directory; the marker, which names them, last."""
    checkpoint = asked.checkpoint
    config = TableFreeConfig.from_dict(checkpoint.manifest.model_config)
    # All in memory at once, 4 bytes a parameter, as transformers will have them too.
    masters = {name: checkpoint.parameter(name) for name in checkpoint.shapes}
    tokenizer = exported_tokenizer(asked, config)
    special_ids = special_token_ids(tokenizer.roles, checkpoint.manifest.data.eos_id)
    card = card_of(asked, config, tokenizer, special_ids)
    (directory / CARD_NAME).write_text(card + "\n", encoding="utf-8")
    if asked.architecture == GGUF:
        # The engines build a GPT-NeoX of their own from it.
        weights, stock = gpt_neox_parts(masters, config)
        vocabulary = Vocabulary(
            definition=json.loads(tokenizer.files[DEFINITION_NAME]),
            tokenizer=tokenizer.reference,
            special_ids=special_ids,
            chat_template=tokenizer.chat_template,
        )
        write_gguf(directory / gguf_name(asked.dtype), weights, stock, vocabulary, asked.dtype)
    else:
        parts = ARCHITECTURES[asked.architecture](masters, config)
        config_text = config_json(parts.config, asked.architecture, asked.dtype, special_ids)
        tokenizer.write_to(directory)
        write_model(directory, parts.weights, config_text, asked.dtype)
        generation = json.dumps(special_ids, indent=2) + "\n"
        (directory / GENERATION_FILE).write_text(generation, encoding="utf-8")
    if asked.architecture == TABLEFREE:
        shutil.copyfile(MODELING_FILE, directory / MODELING_FILE.name)
    # Last, for it holds the digests of all the others.
    write_marker(directory, checkpoint, asked.architecture, asked.dtype)
    return tokenizer


def exported_tokenizer(asked: Asked, config: TableFreeConfig) -> ExportedTokenizer:
    """The run's tokenizer as the export holds it."""
    source = asked.run_dir / TOKENIZER_NAME
    names_unknown = asked.architecture == GPT_NEOX
    return as_exported(read_tokenizer(source), source, config.seq_len, names_unknown=names_unknown)


def special_token_ids(roles: dict[str, int], eos_id: int) -> dict[str, int]:
    """The ids of begin, end and padding, as a tokenizer names them.

    The end-of-document id where it names none.
    """
    return {
        f"{kind}_token_id": roles.get(f"{kind}_token", eos_id) for kind in ("bos", "eos", "pad")
    }


def card_of(
    asked: Asked,
    config: TableFreeConfig,
    tokenizer: ExportedTokenizer,
    special_ids: dict[str, int],
) -> str:
    """The model card of an export."""
    checkpoint = asked.checkpoint
    reference = tokenizer.reference
    result = read_result(asked.run_dir, checkpoint.step)
    step_tokens = checkpoint.manifest.recipe["batch"]["global_batch_tokens"]
    sizes = [torch.Size(shape).numel() for shape in checkpoint.shapes.values()]
    return render(
        "model_card.md.jinja",
        manifest=checkpoint.manifest,
        architecture=asked.architecture,
        dtype=asked.dtype,
        trained_parameters=sum(sizes),
        trained_tokens=checkpoint.step * step_tokens,
        figures=result.whole_split if result else None,
        starts=for_card(read_starts(asked.run_dir), checkpoint.step),
        one_input=tokens_of(reference, aliased_ids(config.to_dict()) or ()),
        gguf_name=gguf_name(asked.dtype),
        end_token=reference.id_to_token(special_ids["eos_token_id"]),
        engines=engines_of(asked.architecture),
    )


def tokens_of(tokenizer: Tokenizer, ids: tuple[int, ...]) -> dict[int, str]:
    """Ids and the texts they stand for, quoted."""
    found = {}
    for token_id in ids:
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        found[token_id] = repr(text)
    return found


def write_model(directory: Path, weights: Weights, config_text: str, dtype: str) -> None:
    """Write weights and configuration.

    safetensors makes a file that nobody else may read: it gets the mode of the others.
    """
    config_path = directory / CONFIG_FILE
    config_path.write_text(config_text, encoding="utf-8")
    path = directory / WEIGHTS_FILE
    torch_dtype = getattr(torch, dtype)
    # safetensors refuses tensors that are views of others with gaps in between.
    converted = {name: tensor.to(torch_dtype).contiguous() for name, tensor in weights.items()}
    save_file(converted, path, metadata={"format": "pt"})
    path.chmod(stat.S_IMODE(config_path.stat().st_mode))


def check_tokenizer(
    staged: Path, tokenizer: ExportedTokenizer, checkpoint: Checkpoint, output: Path
) -> str:
    """See that AutoTokenizer gives the data's ids with an export; returns what was compared.

    The export is in `staged`, and to be called `output`.
    """
    reference = tokenizer.reference
    check_ids(staged, reference, hard_texts(reference), output)
    data_dir = Path(checkpoint.manifest.data_dir)
    try:
        reader = ShardReader(data_dir)
        if reader.manifest.fingerprint != checkpoint.manifest.fingerprint:
            raise UserError(f"{data_dir}: is another data set by now")
        texts = list(texts_of_every_source(reader, reference))
    except (UserError, OSError) as error:
        # An export needs no data set: it may be made where there is none.
        return (
            "AutoTokenizer gives the data's ids for hard texts; no documents were compared "
            f"({one_line(error)})"
        )
    compared = check_ids(staged, reference, texts, output)
    return (
        f"AutoTokenizer gives the data's ids for hard texts and {compared} documents, some of "
        "every source"
    )

"""Writes a checkpoint of a run as an export: weights, configuration, tokenizer, card, marker.

An export is a function of the checkpoint, its evaluation, and whether the data set is at hand: made
twice on one machine, its files are equal bit for bit.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from data_prep.errors import UserError, one_line
from data_prep.files import digest_file, replace_directory
from data_prep.shards import TOKENIZER_NAME, ShardReader, read_tokenizer
from pretrain.checkpoint.find import load_for_reading, run_of
from pretrain.checkpoint.reader import Checkpoint
from pretrain.checkpoint.safetensors_file import write_safetensors
from pretrain.data.stages import DataStage, Json, steps_of_stage
from pretrain.data.tokenizer import refuse_another_tokenizer
from pretrain.data.tokenizer_definition import DEFINITION_NAME
from pretrain.evaluation.result import read_result
from pretrain.hf.architectures import ARCHITECTURES, AnyWeight, config_json, gpt_neox_parts
from pretrain.hf.certificate import Proof
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
from pretrain.hf.proof.process import clean_process
from pretrain.hf.proof.prove import Subject, prove, write_certificate
from pretrain.hf.tokenizer import ExportedTokenizer, as_exported
from pretrain.model.token_codes import aliased_ids
from pretrain.modeling_tablefree import TableFreeConfig
from pretrain.run.starts import for_card, read_starts
from pretrain.run.state import read_state
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
        tokenizer = write_model_and_tokenizer(asked, staged)
        about_tokenizer.extend(tokenizer.left_out)
        proof = None
        if asked.architecture in ARCHITECTURES:
            about_tokenizer.append(check_tokenizer(staged, tokenizer, asked.checkpoint, output))
            proof = prove(staged, subject_of(asked, tokenizer), output)
        write_about(asked, tokenizer, proof, staged)
        # Again, since writing took a while.
        refuse_to_replace(output, asked.checkpoint, overwrite=overwrite)

    refuse_to_replace(output, asked.checkpoint, overwrite=overwrite)
    if asked.architecture in ARCHITECTURES:
        clean_process()  # It imports what it needs while files are written.
    replace_directory(output, write)
    return about_tokenizer


def write_model_and_tokenizer(asked: Asked, directory: Path) -> ExportedTokenizer:
    """Write into an empty directory what is loaded of an export."""
    checkpoint = asked.checkpoint
    config = TableFreeConfig.from_dict(checkpoint.manifest.model_config)
    tokenizer = exported_tokenizer(asked, config)
    special_ids = special_token_ids(tokenizer.roles, checkpoint.manifest.data.eos_id)
    if asked.architecture == GGUF:
        # The package that writes the file wants all in memory at once.
        masters = {name: checkpoint.parameter(name) for name in checkpoint.shapes}
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
        stored: dict[str, AnyWeight] = {name: checkpoint.stored(name) for name in checkpoint.shapes}
        parts = ARCHITECTURES[asked.architecture](stored, config)
        config_text = config_json(parts.config, asked.architecture, asked.dtype, special_ids)
        tokenizer.write_to(directory)
        (directory / CONFIG_FILE).write_text(config_text, encoding="utf-8")
        dtype = getattr(torch, asked.dtype)
        write_safetensors(directory / WEIGHTS_FILE, parts.weights, dtype)
        generation = json.dumps(special_ids, indent=2) + "\n"
        (directory / GENERATION_FILE).write_text(generation, encoding="utf-8")
    if asked.architecture == TABLEFREE:
        shutil.copyfile(MODELING_FILE, directory / MODELING_FILE.name)
    return tokenizer


def write_about(
    asked: Asked, tokenizer: ExportedTokenizer, proof: Proof | None, directory: Path
) -> None:
    """Write what is told of an export: card, certificate, marker.

    In this order: the certificate has the card's digest, the marker those of both. A GGUF file is
    not loaded, as that takes an engine, so there is no proof of it.
    """
    checkpoint = asked.checkpoint
    config = TableFreeConfig.from_dict(checkpoint.manifest.model_config)
    special_ids = special_token_ids(tokenizer.roles, checkpoint.manifest.data.eos_id)
    card = card_of(asked, config, tokenizer, special_ids, proof)
    (directory / CARD_NAME).write_text(card + "\n", encoding="utf-8")
    # Of each file once: weights are large.
    digests = {path.name: digest_file(path) for path in sorted(directory.iterdir())}
    if proof is not None:
        written = write_certificate(directory, subject_of(asked, tokenizer), proof, digests)
        digests[written.name] = digest_file(written)
    write_marker(directory, checkpoint, asked.architecture, asked.dtype, digests)


def subject_of(asked: Asked, tokenizer: ExportedTokenizer) -> Subject:
    """What is proved of an export."""
    return Subject(
        checkpoint=asked.checkpoint,
        tokenizer=tokenizer.reference,
        architecture=asked.architecture,
        dtype=asked.dtype,
    )


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
    proof: Proof | None,
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
        engines=engines_of(asked.architecture, config.input_embedding),
        imported_from=weights_of(asked),
        stages=stages_on_card(checkpoint.manifest.stages),
        proof=proof,
    )


@dataclass(frozen=True, kw_only=True)
class StageOnCard:
    """A data set of a run that had several."""

    fingerprint: str
    steps: str  # in words
    sources: tuple[Json, ...]


def stages_on_card(stages: Sequence[DataStage]) -> list[StageOnCard]:
    """The data sets of a run that had several, oldest first; none of one."""
    return [
        StageOnCard(
            fingerprint=stage.fingerprint,
            steps=steps_of_stage(stages, stage),
            sources=stage.sources,
        )
        for stage in stages
    ]


def weights_of(asked: Asked) -> str | None:
    """The directory whose weights the run began with, by its name alone."""
    imported_from = read_state(asked.run_dir).imported_from
    return Path(imported_from).name if imported_from else None


def tokens_of(tokenizer: Tokenizer, ids: tuple[int, ...]) -> dict[int, str]:
    """Ids and the texts they stand for, quoted."""
    found = {}
    for token_id in ids:
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        found[token_id] = repr(text)
    return found


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
        if not checkpoint.manifest.data_dir:
            raise UserError("the run has trained on no data set yet")
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

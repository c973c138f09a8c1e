"""What can be asked to continue a text: a checkpoint of a run, or an export."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from data_prep.errors import UserError, explained, parse_json
from data_prep.shards import TOKENIZER_NAME
from pretrain.checkpoint.find import load_for_reading, run_of
from pretrain.checkpoint.reader import load_model
from pretrain.data.tokenizer import open_tokenizer, refuse_another_tokenizer
from pretrain.generation.continuation import Speaker
from pretrain.modeling_tablefree import TableFreeConfig, TableFreeForCausalLM

CONFIG_NAME = "config.json"
# What transformers raises for files that are no export of ours, or not whole.
UNLOADABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    SafetensorError,
)
# The classes of both forms, by model_type. Neither runs code of the directory.
FORMS: dict[str, tuple[type[PretrainedConfig], Any]] = {
    TableFreeConfig.model_type: (TableFreeConfig, TableFreeForCausalLM),
    GPTNeoXConfig.model_type: (GPTNeoXConfig, GPTNeoXForCausalLM),
}


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model that was found, with its tokenizer; the weights are not read before `load`."""

    where: str  # the checkpoint's directory and the like, for whoever reads
    tokenizer: Tokenizer
    end_ids: frozenset[int]
    seq_len: int
    weights: Callable[[], Any]

    def load(self) -> Speaker:
        """The model on this machine's device, ready to speak. Raises UserError."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return Speaker(
            model=self.weights().to(device).eval(),
            tokenizer=self.tokenizer,
            end_ids=self.end_ids,
            seq_len=self.seq_len,
        )


def open_run(place: Path, step: int | None) -> Opened:
    """The newest good checkpoint of a run or that of a step, in its fp32 masters.

    `place` is a run's directory, or a checkpoint's in its run. Raises UserError where there is
    none, or its tokenizer is not at hand.
    """
    checkpoint = load_for_reading(place, step)
    run_dir = run_of(checkpoint, place)
    if run_dir is None:
        raise UserError(
            f"--run-dir {place}: a checkpoint outside of its run has no tokenizer; give the run's"
        )
    home = run_dir / TOKENIZER_NAME
    refuse_another_tokenizer(home, checkpoint.manifest.data.tokenizer_sha256)
    return Opened(
        where=str(checkpoint.path),
        tokenizer=open_tokenizer(home),
        end_ids=frozenset([checkpoint.manifest.data.eos_id]),
        seq_len=checkpoint.manifest.model_config["seq_len"],
        weights=lambda: load_model(checkpoint),
    )


def open_export(directory: Path) -> Opened:
    """An export of the form tablefree or gpt_neox, in the precision of its weights.

    Raises UserError for a directory that is none.
    """
    place = f"--model {directory}"
    if not directory.is_dir():
        raise UserError(f"{place}: no such directory; give one of python -m pretrain.export_hf")
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise UserError(
            f"{place}: no {CONFIG_NAME} is there, so it is no export of the form tablefree or "
            "gpt_neox; give one, or --run-dir with a run"
        )
    advice = f"python -m pretrain.export_hf --check {directory} tells what is wrong"
    content = parse_json(path.read_bytes(), str(path), advice)
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind not in FORMS:
        raise UserError(f"{path}: model_type {kind!r} is none of {', '.join(sorted(FORMS))}")
    config_class, model_class = FORMS[kind]
    with explained(UNLOADABLE, f"{path}: not usable", advice):
        config: Any = config_class(**content)
    return Opened(
        where=str(directory),
        tokenizer=open_tokenizer(directory),
        end_ids=end_ids_of(config),
        seq_len=config.max_position_embeddings,
        weights=lambda: weights_of(directory, model_class, advice),
    )


def end_ids_of(config: Any) -> frozenset[int]:
    """The ids that end a document, by a configuration; there may be none, one or several."""
    told = config.eos_token_id
    if told is None:
        return frozenset()
    return frozenset(told if isinstance(told, list) else [told])


def weights_of(directory: Path, model_class: Any, advice: str) -> Any:
    """The model of an export. Raises UserError for weights that are damaged, or lack some.

    transformers would draw at random what is missing, and go on.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with explained(UNLOADABLE, f"--model {directory}: does not load", advice):
        model, loaded = model_class.from_pretrained(
            directory, dtype="auto", output_loading_info=True, local_files_only=True
        )
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise UserError(
            f"--model {directory}: {len(missing)} of its parameters are not in its weights, such "
            f"as {missing[0]}; {advice}"
        )
    return model

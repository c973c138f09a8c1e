"""A directory's decoder as one of ours: its architecture, its input found again, its parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from pretrain.checkpoint.reader import Fragment
from pretrain.config.recipe import ModelRecipe
from pretrain.hf.names import TABLEFREE
from pretrain.importing.codes import FoundCode, find_code, is_code_table
from pretrain.importing.foreign import PUBLISHED, Foreign, read_foreign
from pretrain.importing.masters import ForeignParameters, as_fragment
from pretrain.importing.matching import Match, Shape
from pretrain.importing.names import OUTPUT_BIAS, TABLE, Names, names_of
from pretrain.importing.weights import WeightFiles
from pretrain.model.token_codes import DRAWN
from pretrain.modeling_tablefree import TableFreeConfig, TableFreeForCausalLM, checkpoint_parameters


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder to begin a run with."""

    foreign: Foreign
    config: TableFreeConfig
    parameters: ForeignParameters
    lift: str  # how a code fills the width there

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shape of every parameter, by its name in checkpoints."""
        return {name: list(shape) for name, shape in shapes_of(self.config).items()}

    def fragments(self) -> list[Fragment]:
        """All parameters in our layout, and an optimizer that has seen nothing."""
        return [
            as_fragment(name, self.parameters.read(name, shape, self.lift, self.config.code_bits))
            for name, shape in self.shapes.items()
        ]


def open_decoder(directory: Path, names_file: Path | None, hints: Sequence[ModelRecipe]) -> Decoder:
    """The decoder of a directory.

    `hints` say what input a recipe or a marker tells of; a recipe's comes first. Raises UserError
    for a decoder that is none of ours, naming the key or the tensor.
    """
    foreign = read_foreign(directory)
    files = WeightFiles(directory)
    wanted = wanted_of(foreign)
    names = names_of(foreign.form, list(wanted), names_file)
    match = Match(
        where=str(directory),
        names=names,
        there=files.shapes,
        wanted=wanted,
        may_lack=may_be_missing(foreign, wanted),
    )
    parameters = ForeignParameters(foreign, files, names, match.find())
    parameters.refuse_an_output_bias()
    if foreign.form == TABLEFREE:
        config = TableFreeConfig(**of_our_keys(foreign.config))
        return Decoder(foreign=foreign, config=config, parameters=parameters, lift="repeat")
    code = code_of(parameters, hints)
    config = config_of(foreign, code)
    lift = code.lift if code else "repeat"
    return Decoder(foreign=foreign, config=config, parameters=parameters, lift=lift)


def sizes_of(foreign: Foreign) -> dict[str, int]:
    """The sizes of a decoder, by our keys."""
    return {
        "vocab_size": foreign.vocab_size,
        "d_model": foreign.d_model,
        "num_layers": foreign.num_layers,
        "num_heads": foreign.num_heads,
        "seq_len": foreign.seq_len,
    }


def of_our_keys(config: dict[str, Any]) -> dict[str, Any]:
    """What a config of ours says of the architecture, without what tools and exports add."""
    whole = TableFreeConfig(**config).to_dict()
    kept = [*ModelRecipe.__dataclass_fields__, *(key for keys in DRAWN.values() for key in keys)]
    return {key: whole[key] for key in kept if key in whole}


def config_of(foreign: Foreign, code: FoundCode | None) -> TableFreeConfig:
    """The architecture with the input that was found; without a code, a trained table.

    Raises UserError for sizes that this decoder cannot have.
    """
    keys: dict[str, Any] = {"input_embedding": "learned"}
    if code is not None:
        keys = {"input_embedding": code.input_embedding, "code_bits": code.code_bits, **code.drawn}
    try:
        return TableFreeConfig(**sizes_of(foreign), **keys)
    except ValueError as error:
        raise UserError(f"{foreign.where}: {error}; it can't be imported") from None


def shapes_of(config: TableFreeConfig) -> dict[str, Shape]:
    """The shape of every parameter of an architecture, by its name in checkpoints."""
    with torch.device("meta"):
        model = TableFreeForCausalLM(config)
    return {name: tuple(parameter.shape) for name, parameter in checkpoint_parameters(model)}


def wanted_of(foreign: Foreign) -> dict[str, Shape]:
    """The tensors to look for, by our names, with their shapes there."""
    wanted = shapes_of(config_of(foreign, None))
    is_code = foreign.config.get("input_embedding", "binary_code") != "learned"
    if foreign.form == TABLEFREE and is_code:
        del wanted[TABLE]
    else:
        wanted[TABLE] = (foreign.vocab_size, foreign.input_width)
    if foreign.form == PUBLISHED:
        wanted[OUTPUT_BIAS] = (foreign.vocab_size,)
    return wanted


def may_be_missing(foreign: Foreign, wanted: dict[str, Shape]) -> set[str]:
    """Parameters that a form may lack: what is computed without them is what zeros give.

    The published models may compute their codes, which need no table then.
    """
    biases = {name for name in wanted if name.endswith(".bias") and "norm" not in name}
    if foreign.form == PUBLISHED:
        return biases | {TABLE}
    if foreign.config.get("attention_bias", True) is False:
        return {name for name in biases if ".attention." in name}
    return set()


def code_of(parameters: ForeignParameters, hints: Sequence[ModelRecipe]) -> FoundCode | None:
    """The code that is the input of a decoder, or None for a trained table.

    Raises UserError for a code whose key is not known.
    """
    foreign = parameters.foreign
    names = parameters.names
    if not parameters.found[TABLE]:
        return binary_code_of(foreign, names)
    table = parameters.stored(TABLE)
    wants_table = bool(hints) and hints[0].input_embedding == "learned"
    if not is_code_table(table) or wants_table:
        if foreign.input_width != foreign.d_model:
            raise UserError(
                f"{foreign.where}: n_embd {foreign.input_width} of d_model {foreign.d_model}, and "
                f"{parameters.found[TABLE][0]} is no code of 0 and 1; it can't be imported"
            )
        return None
    if foreign.input_width < foreign.d_model:
        repeats = foreign.d_model // foreign.input_width
        is_interleaved = names.layout.lift == "repeat_interleave"
        table = table.repeat_interleave(repeats, 1) if is_interleaved else table.repeat(1, repeats)
    code = find_code(table, hints)
    if code is None:
        raise UserError(
            f"{foreign.directory}: its input table holds 0 and 1 alone, so it is a fixed code, but "
            "neither a binary nor an affine one, and nothing tells the seed of a permuted one; "
            "give --recipe with its model.input_embedding and model.code_seed, or with learned to "
            "train it as a table"
        )
    return code


def binary_code_of(foreign: Foreign, names: Names) -> FoundCode:
    """The code of a decoder without a table: the bits of the id, as the paper has them.

    Raises UserError where the config has no code, but a table's width.
    """
    if foreign.input_width == foreign.d_model:
        raise UserError(
            f"{foreign.directory}: no tensor is {TABLE}, and n_embd {foreign.input_width} is the "
            "whole width, so no code; give --names with the name that it has there"
        )
    return FoundCode(
        input_embedding="binary_code",
        code_bits=foreign.input_width,
        drawn={},
        lift=names.layout.lift,
    )

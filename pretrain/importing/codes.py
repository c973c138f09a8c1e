"""The fixed code behind a written-out input table, found again.

A stock form has the codes of all ids as its embedding table. Rows of 0 and 1 that are one code,
repeated, are a binary code, an affine one (A and b follow from the rows of 0 and of the powers of
two) or a permuted one, whose keys no table tells: they are drawn again from the seed that the
export's marker or a recipe has. Every row is compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pretrain.config.recipe import MAX_CODE_BITS, ModelRecipe
from pretrain.model.build import model_config
from pretrain.model.token_codes import DRAWN
from pretrain.modeling_tablefree import TokenCode, bits_needed, gf2_rank

Drawn = dict[str, Any]  # of TableFreeConfig: the keys of token_codes.DRAWN


@dataclass(frozen=True, kw_only=True)
class FoundCode:
    """A fixed code, and how it fills the width."""

    input_embedding: str
    code_bits: int
    drawn: Drawn
    lift: str = "repeat"  # or repeat_interleave, each bit again and again


def is_code_table(table: Tensor) -> bool:
    """Whether a table holds 0 and 1 alone, as no trained one does."""
    return bool(((table == 0) | (table == 1)).all())


def codes_in(table: Tensor) -> Iterator[tuple[int, str, Tensor]]:
    """Each way to read rows (V, D) as one code repeated: its bits, its lift, the codes (V, K)."""
    vocab_size, width = table.shape
    for code_bits in range(bits_needed(vocab_size), min(width, MAX_CODE_BITS) + 1):
        repeats, rest = divmod(width, code_bits)
        if rest:
            continue
        codes = table[:, :code_bits]
        if torch.equal(codes.repeat(1, repeats), table):
            yield code_bits, "repeat", codes
        codes = table[:, ::repeats]
        if torch.equal(codes.repeat_interleave(repeats, dim=1), table):
            yield code_bits, "repeat_interleave", codes


def find_code(table: Tensor, hints: Sequence[ModelRecipe]) -> FoundCode | None:
    """The code of a table of 0 and 1, (V, D); None where it is none that is known.

    `hints` are what a marker or a recipe says of the model, whose drawn codes are tried.
    """
    for code_bits, lift, codes in codes_in(table):
        places = torch.arange(code_bits)
        numbers = (codes.long() << places).sum(dim=1)
        found = code_of_numbers(numbers, code_bits, hints)
        if found is not None:
            return replace(found, lift=lift)
    return None


def code_of_numbers(
    numbers: Tensor, code_bits: int, hints: Sequence[ModelRecipe]
) -> FoundCode | None:
    """The code that gives id i the integer `numbers[i]`, or None."""
    if torch.equal(numbers, torch.arange(len(numbers))):
        return FoundCode(input_embedding="binary_code", code_bits=code_bits, drawn={})
    for hint in hints:
        drawn = drawn_again(numbers, replace(hint, code_bits=code_bits))
        if drawn is not None:
            return FoundCode(input_embedding=hint.input_embedding, code_bits=code_bits, drawn=drawn)
    solved = solve_affine(numbers, code_bits)
    if solved is None:
        return None
    return FoundCode(input_embedding="affine_code", code_bits=code_bits, drawn=solved)


def drawn_again(numbers: Tensor, model: ModelRecipe) -> Drawn | None:
    """The drawn code of a model if it gives these numbers, its offset taken from that of id 0.

    (A run's offset also depends on its data set: pretrain/model/token_codes.py.)
    """
    if model.input_embedding not in DRAWN:
        return None
    config = model_config(model)
    key, offset = DRAWN[model.input_embedding]
    places = torch.arange(config.code_bits)
    ids = torch.arange(len(numbers))
    now = (TokenCode(config).code(ids) << places).sum(dim=1)
    difference = int(now[0] ^ numbers[0])
    if not torch.equal(now ^ difference, numbers):
        return None
    return {key: getattr(config, key), offset: getattr(config, offset) ^ difference}


def solve_affine(numbers: Tensor, code_bits: int) -> Drawn | None:
    """A and b with A * bits xor b for every id, or None.

    Columns of A that no id below the vocabulary's size needs are chosen so that A is invertible.
    """
    offset = int(numbers[0])
    columns: list[int] = []
    while 1 << len(columns) < len(numbers):
        columns.append(int(numbers[1 << len(columns)]) ^ offset)
    ids = torch.arange(len(numbers))
    image = torch.full_like(numbers, offset)
    for place, column in enumerate(columns):
        image ^= (ids >> place & 1) * column
    if not torch.equal(image, numbers) or gf2_rank(columns) < len(columns):
        return None
    for place in range(code_bits):
        longer = [*columns, 1 << place]
        if gf2_rank(longer) == len(longer):
            columns = longer
    rows = []
    for i in range(code_bits):
        rows.append(sum((column >> i & 1) << j for j, column in enumerate(columns)))
    return {"affine_rows": rows, "affine_offset": offset}

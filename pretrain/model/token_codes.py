"""The two ids that a fixed code makes one input, and what a run does about them.

LayerNorm takes away what all channels have in common, and every block, and the head, begins with
one. So a constant vector is no input at all: the code of zeros alone and the code of ones alone are
the same to this decoder. It tells all other codes apart. Without a code of ones (vocabulary below 2
** code_bits) nothing is lost. Where both codes stand for ids, these two are harmless if one of them
is given by no text, as `<pad>` at the end of our tokenizers' vocabularies:

    binary_code    ids 0 and V - 1, where V = 2 ** code_bits
    affine_code    two random ids, so b is drawn such that one of them is no text's, if there is any
                   such id
    permuted_code  likewise, by what is xored to the permuted number

A run goes on with the code that its checkpoints hold, also if they were made before codes were
drawn so.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from data_prep.errors import UserError
from data_prep.manifest import Manifest
from data_prep.shards import TOKENIZER_NAME, ShardReader
from pretrain.config.recipe import MAX_CODE_BITS, ModelRecipe

if TYPE_CHECKING:  # both import torch, which takes seconds
    from pretrain.checkpoint.reader import Checkpoint
    from pretrain.modeling_tablefree import TableFreeConfig

Pair = tuple[int, int]

# What the architecture holds of a drawn code: its key, and what is xored to its result.
DRAWN = {
    "affine_code": ("affine_rows", "affine_offset"),
    "permuted_code": ("permutation_keys", "permutation_offset"),
}


def affine_code(rows: list[int], offset: int, token_id: int) -> int:
    """The code A * bits xor b of an id, as an integer; row i of A gives its bit i."""
    code = offset
    for i, row in enumerate(rows):
        parity = (row & token_id).bit_count() % 2
        code ^= parity << i
    return code


def solve_gf2(rows: list[int], value: int) -> int:
    """The one x with A * x = value over GF(2), by elimination; A is square and invertible."""
    width = len(rows)
    # Each equation is a row of A, and its right side as bit `width`.
    equations = []
    for i, row in enumerate(rows):
        right_side = bit(value, i)
        equations.append(row | right_side << width)
    for column in range(width):
        pivot = column
        while not bit(equations[pivot], column):
            pivot += 1
        equations[column], equations[pivot] = equations[pivot], equations[column]
        for i in range(width):
            if i != column and bit(equations[i], column):
                equations[i] ^= equations[column]
    # What is left is x, bit by bit.
    solution = 0
    for i, equation in enumerate(equations):
        solution |= bit(equation, width) << i
    return solution


def permuted_number(keys: list[int], code_bits: int, number: int, *, backwards: bool) -> int:
    """A number below 2 ** code_bits as a permuted code permutes it, before the xor; or back."""
    import torch

    from pretrain.modeling_tablefree import permuted

    image = permuted(torch.tensor(number, device="cpu"), code_bits, keys, backwards=backwards)
    return int(image)


def code_of_id(config: Mapping[str, Any], token_id: int) -> int:
    """The code of an id, as an integer; `config` as for `aliased_ids`, of a drawn code."""
    if config["input_embedding"] == "affine_code":
        return affine_code(config["affine_rows"], config["affine_offset"], token_id)
    keys = config["permutation_keys"]
    number = permuted_number(keys, config["code_bits"], token_id, backwards=False)
    return number ^ int(config["permutation_offset"])


def id_of_code(config: Mapping[str, Any], code: int) -> int:
    """The one id with a code; `config` as for `aliased_ids`."""
    if config["input_embedding"] == "binary_code":
        return code
    if config["input_embedding"] == "affine_code":
        return solve_gf2(config["affine_rows"], config["affine_offset"] ^ code)
    keys = config["permutation_keys"]
    image = code ^ config["permutation_offset"]
    return permuted_number(keys, config["code_bits"], image, backwards=True)


def bit(number: int, place: int) -> int:
    """A bit of a number, 0 or 1."""
    return number >> place & 1


def aliased_ids(config: Mapping[str, Any]) -> Pair | None:
    """The two ids of the vocabulary whose codes are constant, in order; None if there are no two.

    `config` has the keys of TableFreeConfig: vocab_size, code_bits, input_embedding, and those of
    DRAWN.
    """
    if config["input_embedding"] == "learned":
        return None
    zeros_id = id_of_code(config, 0)
    ones_id = id_of_code(config, all_ones(config["code_bits"]))
    low = min(zeros_id, ones_id)
    high = max(zeros_id, ones_id)
    return (low, high) if high < config["vocab_size"] else None


def all_ones(code_bits: int) -> int:
    """The code of ones alone."""
    return (1 << code_bits) - 1


def given_by_no_text(manifest: Manifest) -> set[int]:
    """The special ids of a data set's tokenizer, without the one that ends documents."""
    return set(manifest.special_tokens.values()) - {manifest.eos_id}


def is_harmless(pair: Pair, manifest: Manifest) -> bool:
    """Whether one of the two never occurs in the data set, so that nothing has to be told apart."""
    _, high = pair
    is_beyond = high >= manifest.vocab_size
    return is_beyond or not given_by_no_text(manifest).isdisjoint(pair)


def config_of_run(
    model: ModelRecipe, manifest: Manifest, saved: dict[str, Any] | None = None
) -> "TableFreeConfig":
    """The architecture of a run on a data set.

    `saved` is that of the run's checkpoints, whose drawn code it keeps.
    """
    from pretrain.model.build import model_config  # which imports torch

    config = model_config(model)
    if model.input_embedding not in DRAWN:
        return config
    if saved:
        for name in DRAWN[model.input_embedding]:
            setattr(config, name, saved[name])
        return config
    pair = aliased_ids(config.to_dict())
    if pair is None or is_harmless(pair, manifest):
        return config
    _, offset_name = DRAWN[model.input_embedding]
    setattr(config, offset_name, harmless_offset(config, manifest, model.code_seed))
    return config


def harmless_offset(config: "TableFreeConfig", manifest: Manifest, seed: int) -> int:
    """An offset drawn among all those that give an id of no text a constant code.

    (b of an affine code.) If no id is such, it is the one that there is. This is what drawing the
    code again and again until it is harmless would end in, without the 30,000 attempts that one
    such id among 65,536 takes.
    """
    import torch

    from pretrain.modeling_tablefree import parameter_generator

    _, offset_name = DRAWN[config.input_embedding]
    present = int(getattr(config, offset_name))
    special = sorted(given_by_no_text(manifest))
    codes = 2**config.code_bits
    # Codes above the vocabulary stand for no id of the tokenizer.
    beyond = codes - manifest.vocab_size
    if not special and not beyond:
        return present
    generator = parameter_generator(seed, offset_name)
    drawn, coin = torch.randint(0, 2**62, (2,), generator=generator).tolist()
    chosen = drawn % (len(special) + beyond)
    if chosen < len(special):
        token_id = special[chosen]
    else:
        token_id = manifest.vocab_size + chosen - len(special)
    # With this offset the id has the code of zeros; with its complement that of ones.
    offset = code_of_id(config.to_dict(), token_id) ^ present
    if coin % 2 == 1:
        offset ^= all_ones(config.code_bits)
    return offset


def saved_config(
    model: ModelRecipe, run_dir: Path, branch_from: "Checkpoint | None"
) -> dict[str, Any] | None:
    """The architecture of a run's checkpoints, or of the one it branches off from, or None.

    Only a drawn code has to be looked up; any other follows from the recipe.
    """
    from pretrain.checkpoint.layout import saved_steps
    from pretrain.checkpoint.reader import UNREADABLE, Checkpoint

    if model.input_embedding not in DRAWN:
        return None
    for path in saved_steps(run_dir):
        with contextlib.suppress(*UNREADABLE):  # which is said when it is passed over
            return dict(Checkpoint(path).manifest.model_config)
    return dict(branch_from.manifest.model_config) if branch_from else None


def check_same_code(config: "TableFreeConfig", checkpoint: "Checkpoint") -> None:
    """Raise UserError if a rank has built another code than a checkpoint's.

    It does so where it could not read the checkpoints when it began.
    """
    saved = checkpoint.manifest.model_config
    names = DRAWN.get(config.input_embedding, ())
    if any(getattr(config, name) != saved.get(name) for name in names):
        raise UserError(
            f"{checkpoint.path}: not readable when this rank began; start the same command again"
        )


def wider_code_bits(d_model: int, code_bits: int) -> int | None:
    """The next larger number of bits that tiles the width, or None.

    With it no id has the code of ones.
    """
    for bits in range(code_bits + 1, MAX_CODE_BITS + 1):
        if d_model % bits == 0:
            return bits
    return None


def remedy(d_model: int, code_bits: int) -> str:
    """What tells the two apart."""
    wider = wider_code_bits(d_model, code_bits)
    if wider is None:
        return f"a model.d_model with a divisor above {code_bits}"
    return f"model.code_bits={wider}"


def warnings(config: "TableFreeConfig", reader: ShardReader) -> list[str]:
    """A line if two ids of the data set are one input to the model, with how often each was met."""
    pair = aliased_ids(config.to_dict())
    if pair is None or is_harmless(pair, reader.manifest):
        return []
    counts, counted = reader.count_ids(pair)
    in_all = sum(shard.tokens for shard in reader.manifest.shards)
    is_exact = counted == in_all
    if is_exact and not all(counts):
        return []
    low_count, high_count = counts
    low, high = (describe_id(token_id, reader.data_dir) for token_id in pair)
    tokens = f"all {counted:,} tokens" if is_exact else f"of {counted:,} tokens counted"
    return [
        f"warning: {low} and {high} are one input to this decoder: their codes are constant, and "
        f"LayerNorm takes away what all channels share. They occur {low_count:,} and "
        f"{high_count:,} times in {tokens}; in a new run "
        f"{remedy(config.d_model, config.code_bits)} tells them apart"
    ]


def about_one_input(model: ModelRecipe, manifest: Manifest | None) -> str | None:
    """What a plan says, with or without a data set.

    None where the vocabulary leaves the code of ones to no id.
    """
    last_id = model.vocab_size - 1
    code_bits = model.code_bits or last_id.bit_length()
    codes = 2**code_bits
    if model.input_embedding == "learned" or model.vocab_size < codes:
        return None
    is_binary = model.input_embedding == "binary_code"
    which = f"ids 0 and {last_id:,}" if is_binary else "two ids"
    apart = f"{remedy(model.d_model, code_bits)} tells them apart"
    if manifest is None:
        return (
            f"{which}; harmless where no text gives one of them, as with our tokenizers; else "
            f"{apart}"
        )
    if is_binary:
        harmless = is_harmless((0, last_id), manifest)
    else:  # the code is drawn such that it is, where it can be
        harmless = bool(given_by_no_text(manifest)) or manifest.vocab_size < codes
    return f"{which}; harmless, no text gives one of them" if harmless else f"{which}; {apart}"


def describe_id(token_id: int, data_dir: Path) -> str:
    """An id and its text, if the data set has its tokenizer."""
    file = data_dir / TOKENIZER_NAME / "tokenizer.json"
    if not file.is_file():
        return f"id {token_id}"
    tokenizer = Tokenizer.from_file(str(file))
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    return f"id {token_id} ({text!r})"

"""The two ids that a fixed code makes one input, and what a run does about them.

LayerNorm takes away what all channels have in common, and every block, and the head, begins with
one. So a constant vector is no input at all: the code of zeros alone and the code of ones alone are
the same to this decoder. It tells all other codes apart. Without a code of ones (vocabulary below 2
** code_bits) nothing is lost. Where both codes stand for ids, these two are harmless if one of them
is given by no text, as `<pad>` at the end of our tokenizers' vocabularies:

    binary_code   ids 0 and V - 1, where V = 2 ** code_bits
    affine_code   two random ids, so b is drawn such that one of them is no text's, if there is any such id

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


def affine_code(rows: list[int], offset: int, token_id: int) -> int:
    """The code A * bits xor b of an id, as an integer; row i of A gives its bit i."""
    return offset ^ sum(((row & token_id).bit_count() & 1) << i for i, row in enumerate(rows))


def solve_gf2(rows: list[int], value: int) -> int:
    """The one x with A * x = value over GF(2), by elimination; A is square and invertible."""
    width = len(rows)
    # the right side as bit `width`
    equations = [row | (value >> i & 1) << width for i, row in enumerate(rows)]
    for column in range(width):
        pivot = next(i for i in range(column, width) if equations[i] >> column & 1)
        equations[column], equations[pivot] = equations[pivot], equations[column]
        for i in range(width):
            if i != column and equations[i] >> column & 1:
                equations[i] ^= equations[column]
    return sum((equation >> width) << i for i, equation in enumerate(equations))


def aliased_ids(config: Mapping[str, Any]) -> Pair | None:
    """The two ids of the vocabulary whose codes are constant, in order; None if there are no two.

    `config` has the keys of TableFreeConfig: vocab_size, code_bits, input_embedding, affine_rows,
    affine_offset.
    """
    ones = (1 << config["code_bits"]) - 1
    if config["input_embedding"] == "learned":
        return None
    if config["input_embedding"] == "binary_code":
        pair = (0, ones)
    else:
        rows, offset = config["affine_rows"], config["affine_offset"]
        low, high = sorted((solve_gf2(rows, offset), solve_gf2(rows, offset ^ ones)))
        pair = (low, high)
    return pair if pair[1] < config["vocab_size"] else None


def given_by_no_text(manifest: Manifest) -> set[int]:
    """The special ids of a data set's tokenizer, without the one that ends documents."""
    return set(manifest.special_tokens.values()) - {manifest.eos_id}


def is_harmless(pair: Pair, manifest: Manifest) -> bool:
    """Whether one of the two never occurs in the data set, so that nothing has to be told apart."""
    return not given_by_no_text(manifest).isdisjoint(pair) or pair[1] >= manifest.vocab_size


def config_of_run(
    model: ModelRecipe, manifest: Manifest, saved: dict[str, Any] | None = None
) -> "TableFreeConfig":
    """The architecture of a run on a data set; `saved` is that of its checkpoints, whose affine
    code it keeps.
    """
    from pretrain.model.build import model_config  # which imports torch

    config = model_config(model)
    if model.input_embedding != "affine_code":
        return config
    if saved:
        config.affine_rows, config.affine_offset = saved["affine_rows"], saved["affine_offset"]
        return config
    pair = aliased_ids(config.to_dict())
    if pair is None or is_harmless(pair, manifest):
        return config
    config.affine_offset = harmless_offset(config, manifest, model.code_seed)
    return config


def harmless_offset(config: "TableFreeConfig", manifest: Manifest, seed: int) -> int:
    """b drawn among all those that give an id of no text a constant code; the one there is, if no
    id is such.

    What drawing A and b again and again until they are harmless would end in, without the 30,000
    attempts that one such id among 65,536 takes.
    """
    import torch

    from pretrain.modeling_tablefree import parameter_generator

    special = sorted(given_by_no_text(manifest))
    # codes that stand for no id of the tokenizer
    beyond = (1 << config.code_bits) - manifest.vocab_size
    if not special and not beyond:
        return int(config.affine_offset)
    generator = parameter_generator(seed, "affine_offset")
    chosen, wants_ones = torch.randint(0, 1 << 62, (2,), generator=generator).tolist()
    chosen %= len(special) + beyond
    token_id = (
        special[chosen] if chosen < len(special) else manifest.vocab_size + chosen - len(special)
    )
    offset = affine_code(config.affine_rows, 0, token_id)
    return offset ^ ((1 << config.code_bits) - 1 if wants_ones & 1 else 0)


def saved_config(
    model: ModelRecipe, run_dir: Path, branch_from: "Checkpoint | None"
) -> dict[str, Any] | None:
    """The architecture that a run's checkpoints hold, or the one it branches off from; None at a
    run's beginning.

    Only an affine code has to be looked up; any other follows from the recipe.
    """
    from pretrain.checkpoint.layout import saved_steps
    from pretrain.checkpoint.reader import UNREADABLE, Checkpoint

    if model.input_embedding != "affine_code":
        return None
    for path in saved_steps(run_dir):
        with contextlib.suppress(*UNREADABLE):  # which is said when it is passed over
            return dict(Checkpoint(path).manifest.model_config)
    return dict(branch_from.manifest.model_config) if branch_from else None


def check_same_code(config: "TableFreeConfig", checkpoint: "Checkpoint") -> None:
    """Raise UserError if a rank has built another code, because it could not read the
    checkpoints when it began.
    """
    saved = checkpoint.manifest.model_config
    if any(getattr(config, key) != saved.get(key) for key in ("affine_rows", "affine_offset")):
        raise UserError(
            f"{checkpoint.path}: not readable when this rank began; start the same command again"
        )


def wider_code_bits(d_model: int, code_bits: int) -> int | None:
    """The next larger number of bits that tiles the width; then no id has the code of ones. None
    if there is none.
    """
    return next(
        (bits for bits in range(code_bits + 1, MAX_CODE_BITS + 1) if d_model % bits == 0), None
    )


def remedy(d_model: int, code_bits: int) -> str:
    """What tells the two apart."""
    wider = wider_code_bits(d_model, code_bits)
    return (
        f"model.code_bits={wider}" if wider else f"a model.d_model with a divisor above {code_bits}"
    )


def warnings(config: "TableFreeConfig", reader: ShardReader) -> list[str]:
    """A line if two ids of the data set are one input to the model, with how often each was met."""
    pair = aliased_ids(config.to_dict())
    if pair is None or is_harmless(pair, reader.manifest):
        return []
    counts, counted = reader.count_ids(pair)
    is_exact = counted == sum(shard.tokens for shard in reader.manifest.shards)
    if is_exact and not all(counts):
        return []
    low, high = (describe_id(token_id, reader.data_dir) for token_id in pair)
    amount = "all" if is_exact else "of"
    return [
        f"warning: {low} and {high} are one input to this decoder: their codes are constant, and "
        f"LayerNorm takes away what all channels share. They occur {counts[0]:,} and "
        f"{counts[1]:,} times in {amount} {counted:,} tokens{'' if is_exact else ' counted'}; in "
        f"a new run {remedy(config.d_model, config.code_bits)} tells them apart"
    ]


def about_one_input(model: ModelRecipe, manifest: Manifest | None) -> str | None:
    """What a plan says, with or without a data set; None where the vocabulary leaves the code of
    ones to no id.
    """
    code_bits = model.code_bits or (model.vocab_size - 1).bit_length()
    is_binary = model.input_embedding == "binary_code"
    if model.input_embedding == "learned" or model.vocab_size < 1 << code_bits:
        return None
    which = f"ids 0 and {model.vocab_size - 1:,}" if is_binary else "two ids"
    apart = f"{remedy(model.d_model, code_bits)} tells them apart"
    if manifest is None:
        return (
            f"{which}; harmless where no text gives one of them, as with our tokenizers; else "
            f"{apart}"
        )
    has_spare = bool(given_by_no_text(manifest)) or manifest.vocab_size < 1 << code_bits
    harmless = is_harmless((0, model.vocab_size - 1), manifest) if is_binary else has_spare
    return f"{which}; harmless, no text gives one of them" if harmless else f"{which}; {apart}"


def describe_id(token_id: int, data_dir: Path) -> str:
    """An id and its text, if the data set has its tokenizer."""
    file = data_dir / TOKENIZER_NAME / "tokenizer.json"
    if not file.is_file():
        return f"id {token_id}"
    return (
        f"id {token_id} "
        f"({Tokenizer.from_file(str(file)).decode([token_id], skip_special_tokens=False)!r})"
    )

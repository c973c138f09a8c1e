"""What a directory to import says it holds: its form, and the sizes of its decoder.

tablefree   an export of that form, or a checkpoint of others that was saved by its class
gpt_neox    a stock GPT-NeoX: an export of that form, or any other with sequential residual and
            rotary positions over the whole head
published   a config with the keys of the paper's published models (PUBLISHED_KEYS)

Whatever a config asks for that this decoder does not compute is refused, naming the key.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError, one_line, parse_json
from pretrain.hf.names import CONFIG_FILE, GPT_NEOX, TABLEFREE
from pretrain.modeling_tablefree import (
    LAYER_NORM_EPS,
    ROTARY_BASE,
    WORDS_OF_A_MODEL,
    TableFreeConfig,
    bits_needed,
)

PUBLISHED = "published"
PUBLISHED_KEYS = ("vocab_size", "block_size", "n_embd", "d_model", "n_layer", "n_head", "pad_id")
PUBLISHED_TYPE = "model_"  # what their model_type begins with
# A stock GPT-NeoX's keys, what they have to be, and what transformers takes where they are missing.
STOCK_DEFAULTS: dict[str, Any] = {
    "use_parallel_residual": (False, True),
    "hidden_act": ("gelu", "gelu"),
    "layer_norm_eps": (LAYER_NORM_EPS, 1e-5),
    "tie_word_embeddings": (False, False),
    "rope_scaling": (None, None),
}
# Of the rotary positions, whichever of the names a version writes, here or in rope_parameters.
ROTARY_SHARES = ("rotary_pct", "partial_rotary_factor")
ROTARY_BASES = ("rotary_emb_base", "rope_theta")
STOCK_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "seq_len": "max_position_embeddings",
}
ADVICE = "it can't be imported"

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A decoder as its config.json tells it."""

    directory: Path
    form: str  # tablefree, gpt_neox or published
    config: Json
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    seq_len: int
    input_width: int  # of a row of its table, or of its code, before that is repeated to d_model

    @property
    def where(self) -> str:
        """The config file, for what is said of it."""
        return str(self.directory / CONFIG_FILE)


def read_foreign(directory: Path) -> Foreign:
    """What a directory holds. Raises UserError for what this decoder does not compute."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"--from {directory}: no {CONFIG_FILE} there; give an export's directory")
    config = parse_json(path.read_bytes(), str(path), ADVICE)
    if not isinstance(config, dict):
        raise UserError(f"{path}: a JSON {type(config).__name__}, expected an object; {ADVICE}")
    kind = config.get("model_type")
    if kind == TABLEFREE:
        return of_tablefree(directory, config)
    if kind == GPT_NEOX:
        return of_stock(directory, config)
    if isinstance(kind, str) and kind.startswith(PUBLISHED_TYPE):
        return of_published(directory, config)
    raise UserError(
        f"{path}: model_type {kind!r}; what can be imported is {TABLEFREE}, {GPT_NEOX}, or one "
        f"that begins with {PUBLISHED_TYPE}"
    )


def of_tablefree(directory: Path, config: Json) -> Foreign:
    """Of a config of this project's own class, which says itself what it does not compute."""
    try:
        own = TableFreeConfig(**config)
    except Exception as error:  # transformers checks no types, and raises what comes of them
        problem = one_line(error).removeprefix(f"{CONFIG_FILE}: ")
        raise UserError(f"{directory / CONFIG_FILE}: {problem}; {ADVICE}") from None
    return Foreign(
        directory=directory,
        form=TABLEFREE,
        config=config,
        vocab_size=own.vocab_size,
        d_model=own.d_model,
        num_layers=own.num_layers,
        num_heads=own.num_heads,
        seq_len=own.seq_len,
        input_width=own.d_model,
    )


def of_stock(directory: Path, config: Json) -> Foreign:
    """Of a stock GPT-NeoX. Raises UserError, naming the key, for another block than ours."""
    where = directory / CONFIG_FILE
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters is no object; {ADVICE}")
    for key, (wanted, default) in STOCK_DEFAULTS.items():
        refuse_other(where, key, config.get(key, default), wanted)
    refuse_other(where, "rope_type", rope.get("rope_type", "default"), "default")
    both = config | rope
    shares = {key: both[key] for key in ROTARY_SHARES if key in both}
    for key, share in (shares or {"rotary_pct": 0.25}).items():  # transformers' own default
        refuse_other(where, key, share, 1.0)
    for key in ROTARY_BASES:
        refuse_other(where, key, both.get(key, ROTARY_BASE), ROTARY_BASE)
    told = {ours: positive(where, config, theirs) for ours, theirs in STOCK_SIZES.items()}
    refuse_other(where, "intermediate_size", config.get("intermediate_size"), 4 * told["d_model"])
    return Foreign(
        directory=directory, form=GPT_NEOX, config=config, input_width=told["d_model"], **told
    )


def of_published(directory: Path, config: Json) -> Foreign:
    """Of a config with the published models' keys. Raises UserError where they contradict."""
    where = directory / CONFIG_FILE
    vocab_size, seq_len, input_width, width, layers, heads = (
        positive(where, config, key) for key in PUBLISHED_KEYS[:-1]
    )
    if config.get("tie_word_embeddings"):
        refuse_other(where, "tie_word_embeddings", config["tie_word_embeddings"], False)
    if width % input_width:
        raise UserError(
            f"{where}: n_embd {input_width} does not fill d_model {width} evenly; {ADVICE}"
        )
    if input_width < width and input_width < bits_needed(vocab_size):
        raise UserError(
            f"{where}: a code of n_embd {input_width} bits tells fewer than vocab_size "
            f"{vocab_size} ids apart; {ADVICE}"
        )
    pad_id = config.get("pad_id")
    if not isinstance(pad_id, int) or not 0 <= pad_id < vocab_size:
        raise UserError(f"{where}: pad_id {pad_id!r} is no id below vocab_size {vocab_size}")
    known = {*PUBLISHED_KEYS, "tie_word_embeddings"}
    for key, value in config.items():
        # Without dropout a model computes what it does with a dropout of 0, and in use.
        is_dropout = "dropout" in key
        names_a_part = not WORDS_OF_A_MODEL.isdisjoint(key.split("_"))
        if names_a_part and not is_dropout and key not in known and value is not None:
            raise UserError(
                f"{where}: {key} {value!r} is unknown here and by its name changes the model; "
                f"{ADVICE}"
            )
    return Foreign(
        directory=directory,
        form=PUBLISHED,
        config=config,
        vocab_size=vocab_size,
        d_model=width,
        num_layers=layers,
        num_heads=heads,
        seq_len=seq_len,
        input_width=input_width,
    )


def refuse_other(where: Path, key: str, value: Any, wanted: Any) -> None:
    """Raise UserError for a value that means another model than this decoder computes."""
    if value != wanted:
        raise UserError(
            f"{where}: {key} is {value!r}, and this decoder computes {wanted!r} alone; {ADVICE}"
        )


def positive(where: Path, config: Json, key: str) -> int:
    """A size. Raises UserError for what is no positive whole number."""
    if key not in config:
        raise UserError(f"{where}: {key} is missing; {ADVICE}")
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {key} {value!r} is no positive whole number; {ADVICE}")
    return value

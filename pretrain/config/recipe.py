"""The recipe: everything that makes a run what it is, as frozen dataclasses read from YAML.

The recipe owns model, data order, tokens, batch, optimizer, schedule, activation checkpointing and
intervals. What belongs to the engine (ZeRO, precision, offload) stays in the DeepSpeed JSON; see
pretrain/engine/engine.py.
"""

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic
import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from data_prep.errors import UserError, first_problem, nearest, parse_yaml
from data_prep.manifest import MAX_VOCAB_SIZE
from data_prep.shards import ShardReader
from pretrain.config.recipe_names import OURS, suggest_key

if TYPE_CHECKING:
    from pretrain.modeling_tablefree import TableFreeConfig

RECIPES_DIR = Path(__file__).parent.parent / "recipes"
MAX_CODE_BITS = 62
NEAR = 0.6  # difflib's ratio from which two names of files are alike
AUTO = "auto"  # in the place of model.vocab_size: that of the data set
STRICT = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

# What a resumed run may change, keys and sections: none of it alters what a step computes, but for
# the order of float sums. Decisions on bad steps are recorded and replayed; of the engine, the
# merged configuration is compared instead.
MAY_CHANGE_ON_RESUME = frozenset(
    {
        "batch.micro_batch_size",
        "compile",
        "loss_head",
        "data",
        "activation_checkpointing",
        "validation",
        "checkpoints",
    }
    | {"bad_steps", "stalls", "engine"}
)
MAY_CHANGE_ON_BRANCH = MAY_CHANGE_ON_RESUME | {"train_tokens", "schedule"}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelRecipe:
    """Architecture of the decoder."""

    # in a recipe's file also `auto`, see load_recipe
    vocab_size: int = Field(ge=2, le=MAX_VOCAB_SIZE)
    d_model: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    seq_len: int = Field(ge=1)
    input_embedding: Literal["binary_code", "affine_code", "learned"]
    # default: ceil(log2 vocab_size)
    code_bits: int | None = Field(default=None, ge=1, le=MAX_CODE_BITS)
    code_seed: int = 0  # draws A and b of an affine code


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BatchRecipe:
    """How many tokens make a step, and how many windows one rank takes at a time."""

    global_batch_tokens: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerRecipe:
    """AdamW; weight decay acts on matrices only."""

    peak_learning_rate: float = Field(gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    gradient_clipping: float = Field(default=1.0, gt=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScheduleRecipe:
    """Linear warm-up to the peak, then a decay to a fraction of it at the last step; see
    pretrain/engine/optim.py.

    `cosine` and `linear` decay from the end of the warm-up, `wsd` (warmup-stable-decay) over its
    last `decay_steps`, or `decay_fraction` of all steps; `constant` stays at the peak.
    """

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_fraction: float = Field(default=0.01, ge=0, lt=1)
    warmup_steps: int | None = Field(default=None, ge=0)  # instead of the fraction
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    decay_steps: int | None = Field(default=None, ge=1)  # instead of the fraction
    final_fraction: float = Field(default=0.1, ge=0, le=1)

    def warmup(self, total_steps: int) -> int:
        """Steps of the warm-up."""
        return (
            math.ceil(self.warmup_fraction * total_steps)
            if self.warmup_steps is None
            else self.warmup_steps
        )

    def decay(self, total_steps: int) -> int:
        """Steps of the decay of `wsd`."""
        return (
            math.ceil(self.decay_fraction * total_steps)
            if self.decay_steps is None
            else self.decay_steps
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataRecipe:
    """How a node gets at the shards."""

    stage_dir: str | None = None  # a local disk of each node, to which the data set is copied once
    # the shards' digests, before a start's first step; once a node
    verify: Literal["once", "always", "never"] = "once"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ActivationCheckpointingRecipe:
    """Which blocks recompute their activations; see pretrain/model/activation_checkpointing.py."""

    mode: Literal["none", "selective", "full"] = "none"
    every_n_layers: int = Field(default=1, ge=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ValidationRecipe:
    """How often, and on how many tokens of the validation split, always the same ones."""

    every_steps: int = Field(ge=1)
    eval_tokens: int = Field(default=2_097_152, ge=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointsRecipe:
    """How often to save, and which checkpoints to keep: the newest ones, and those of each
    multiple of some steps.
    """

    every_steps: int = Field(ge=1)
    keep_last: int = Field(default=2, ge=1)
    keep_every: int | None = Field(default=None, ge=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BadStepsRecipe:
    """What becomes of a step whose loss or gradient norm is no number, or a spike; see
    pretrain/run/bad_steps.py.
    """

    policy: Literal["skip", "rewind", "stop"] = "skip"
    # above the running median; default: none is a spike
    spike_deviations: float | None = Field(default=None, gt=0)
    max_in_a_row: int = Field(default=10, ge=1)  # after so many the run has diverged, and stops


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StallsRecipe:
    """When a run that does nothing has stalled: after so many median steps, but not before so
    many seconds.
    """

    after_medians: float = Field(default=30.0, ge=1)
    after_s: float = Field(default=300.0, gt=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """A whole run."""

    model: ModelRecipe
    batch: BatchRecipe
    optimizer: OptimizerRecipe
    schedule: ScheduleRecipe = Field(default_factory=ScheduleRecipe)
    data: DataRecipe = Field(default_factory=DataRecipe)
    activation_checkpointing: ActivationCheckpointingRecipe = Field(
        default_factory=ActivationCheckpointingRecipe
    )
    validation: ValidationRecipe
    checkpoints: CheckpointsRecipe
    bad_steps: BadStepsRecipe = Field(default_factory=BadStepsRecipe)
    stalls: StallsRecipe = Field(default_factory=StallsRecipe)
    train_tokens: int = Field(ge=1)
    seed: int = Field(default=1, ge=0)
    # no token sees another document of its window; positions restart
    intra_document_masking: bool = False
    compile: bool = False  # torch.compile of the blocks
    loss_head: Literal["chunked", "whole", "liger"] = "chunked"  # see pretrain/model/loss.py
    deterministic: bool = False  # CUDA only: slower kernels that give the same bits each time
    engine: str = "zero2_bf16"  # a file of ds_configs/, by name, or a path

    @property
    def global_batch_size(self) -> int:
        """Windows in a step, over all ranks."""
        return self.batch.global_batch_tokens // self.model.seq_len

    @property
    def total_steps(self) -> int:
        """Steps until train_tokens are consumed; the last step is a whole one."""
        return -(-self.train_tokens // self.batch.global_batch_tokens)


def dotted_keys(section: Any, prefix: str = "") -> list[str]:
    """Every key of a recipe, sections and what is in them."""
    keys = []
    for key in fields(section):
        inside = dotted_keys(key.type, f"{prefix}{key.name}.") if is_dataclass(key.type) else []
        keys += [prefix + key.name, *inside]
    return keys


def shipped_file(name: str, directory: Path, suffix: str, key: str) -> Path:
    """A file that the project ships, by its name, or the path itself."""
    path = Path(name) if Path(name).suffix else directory / f"{name}{suffix}"
    if not path.is_file():
        raise UserError(f"{key} {name}: no such file; {nearest_file(name, directory, suffix)}")
    return path


def nearest_file(name: str, directory: Path, suffix: str) -> str:
    """A suggestion for the name of a file that is not there: a file beside it, or a shipped one."""
    shipped = [known.stem for known in directory.glob(f"*{suffix}")]
    path = Path(name)
    if not path.suffix:
        return f"{nearest(name, shipped)} (or give a {suffix} file)"
    beside = [known.name for known in path.parent.glob(f"*{suffix}")]
    if close := difflib.get_close_matches(path.name, beside, n=1, cutoff=NEAR):
        return f"did you mean {path.with_name(close[0])}?"
    if path.stem in shipped:
        return f"did you mean the shipped {path.stem}, without {suffix}?"
    return f"{nearest(path.stem, shipped)} (shipped), or give the path of a {suffix} file"


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set `--dotted.key=value` arguments in the recipe's nested dictionary; values are read as
    YAML.
    """
    for argument in overrides:
        dotted, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            key = OURS.get(dotted.rpartition(".")[2].replace("-", "_"))
            form = f"--{key}=value" if key else "--dotted.key=value"
            raise UserError(
                f"{argument}: not a known flag; a recipe key is set as {form}, with the sign ="
            )
        *sections, key = dotted.split(".")
        target = content
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise UserError(f"{argument}: {section} is a value, not a section of the recipe")
        target[key] = parse_yaml(text, argument)


def as_numbers(value: Any) -> Any:
    """Read the numbers that YAML takes for text, `6e-4` and `17e9`, and make whole ones
    integers.
    """
    if isinstance(value, dict):
        return {key: as_numbers(inner) for key, inner in value.items()}
    if not isinstance(value, str | float):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() else number


def nearest_key(dotted: str) -> str:
    """A suggestion for an unknown recipe key."""
    return suggest_key(dotted, dotted_keys(Recipe))


def build_recipe(content: Any, origin: str) -> Recipe:
    """Check a nested dictionary and make it a Recipe. Raises UserError for the first thing that
    is wrong.
    """
    if not isinstance(content, dict):
        raise UserError(f"{origin}: not a recipe: expected keys and values in YAML")
    try:
        recipe = pydantic.TypeAdapter(Recipe).validate_json(
            json.dumps(as_numbers(content), default=str)
        )
        check_recipe(recipe, origin)
    except pydantic.ValidationError as error:
        raise UserError(f"{origin}: {first_problem(error, nearest_key)}") from None
    except (
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:  # keys that are lists, endless numbers
        raise UserError(f"{origin}: {error}") from None
    return recipe


def check_recipe(recipe: Recipe, origin: str) -> None:
    """Rules that tie several keys together."""
    model = recipe.model
    if model.d_model % model.num_heads or (model.d_model // model.num_heads) % 2:
        raise UserError(
            f"{origin}: model.d_model {model.d_model} over model.num_heads {model.num_heads} is "
            f"{model.d_model / model.num_heads:g}; rotary heads need a whole, even width"
        )
    if model.input_embedding != "learned":
        check_code_bits(model, origin)
    check_schedule(recipe, origin)
    if recipe.batch.global_batch_tokens % model.seq_len:
        below = recipe.global_batch_size * model.seq_len
        near = f"{below} and {below + model.seq_len}" if below else f"{model.seq_len}"
        raise UserError(
            f"{origin}: batch.global_batch_tokens {recipe.batch.global_batch_tokens} is not a "
            f"whole number of windows of model.seq_len {model.seq_len}; the nearest are {near}"
        )


def check_schedule(recipe: Recipe, origin: str) -> None:
    """Warm-up and decay must fit into the run."""
    schedule, total = recipe.schedule, recipe.total_steps
    if schedule.kind != "wsd" and schedule.decay_steps is not None:
        raise UserError(
            f"{origin}: schedule.decay_steps belongs to schedule.kind wsd, not {schedule.kind}"
        )
    warmup = schedule.warmup(total)
    decay = schedule.decay(total) if schedule.kind == "wsd" else 0
    if warmup + decay > total:
        raise UserError(
            f"{origin}: schedule: {warmup:,} steps of "
            f"warm-up{f' and {decay:,} of decay' if decay else ''} are longer than the run of "
            f"{total:,} steps; make them shorter or train_tokens larger"
        )


def check_code_bits(model: ModelRecipe, origin: str) -> None:
    """The code must tell all ids apart and tile the model width."""
    needed = (model.vocab_size - 1).bit_length()  # ceil(log2 V)
    bits = model.code_bits or needed
    if bits < needed:
        raise UserError(
            f"{origin}: model.code_bits {bits} cannot tell {model.vocab_size:,} ids apart; set it "
            f"to {needed} or more"
        )
    if model.d_model % bits:
        fitting = next((k for k in range(bits, MAX_CODE_BITS + 1) if model.d_model % k == 0), None)
        advice = (
            f"set model.code_bits to {fitting}, the next that does"
            if fitting
            else "change model.d_model"
        )
        raise UserError(
            f"{origin}: model.code_bits {bits} does not divide model.d_model {model.d_model}; "
            f"{advice}"
        )


def load_recipe(name: str, overrides: Sequence[str] = (), data_dir: Path | None = None) -> Recipe:
    """Read a shipped recipe by name or a file by path, with `--dotted.key=value` overrides.

    `model.vocab_size: auto` becomes the number of ids of the data set. Raises UserError.
    """
    path = shipped_file(name, RECIPES_DIR, ".yaml", "--recipe")
    content = parse_yaml(path.read_bytes(), str(path))
    if isinstance(content, dict):
        apply_overrides(content, overrides)
        resolve_vocab_size(content, data_dir, str(path))
    return build_recipe(content, " ".join([str(path), *overrides]))


def resolve_vocab_size(content: dict[str, Any], data_dir: Path | None, origin: str) -> None:
    """Put the number of the data set's ids in the place of `model.vocab_size: auto`. Raises
    UserError without one.
    """
    model = content.get("model")
    if not isinstance(model, dict) or model.get("vocab_size") != AUTO:
        return
    if data_dir is None:
        advice = "give --data-dir, or a number as --model.vocab_size=N"
        raise UserError(
            f"{origin}: model.vocab_size is {AUTO}, the number of the data set's ids; {advice}"
        )
    model["vocab_size"] = ShardReader(data_dir).manifest.vocab_size


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as nested dictionaries."""
    return asdict(recipe)  # type: ignore[call-overload]


def recipe_to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as a file that reads back equal."""
    return yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False)


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= (
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def refuse_changes(
    saved: dict[str, Any], now: dict[str, Any], may_change: frozenset[str], origin: str
) -> None:
    """Raise UserError for the first dotted key whose value differs, unless it, or its section,
    may change.
    """
    old, new = flatten(saved), flatten(now)
    for key in [*old, *(k for k in new if k not in old)]:
        if old.get(key) != new.get(key) and may_change.isdisjoint((key, key.partition(".")[0])):
            raise UserError(
                f"{origin}: this run was started with {key}={old.get(key)!r}, got "
                f"{new.get(key)!r}; give the old value to continue it, or another --run-dir to "
                "start a new run"
            )


def model_config(model: ModelRecipe) -> "TableFreeConfig":
    """The architecture as the modelling file wants it, the affine code drawn."""
    # torch takes seconds
    from pretrain.modeling_tablefree import TableFreeConfig, bits_needed, draw_affine_code

    code_bits = model.code_bits or bits_needed(model.vocab_size)
    architecture = asdict(model) | {"code_bits": code_bits}  # type: ignore[call-overload]
    seed = architecture.pop("code_seed")
    if model.input_embedding == "affine_code":
        architecture["affine_rows"], architecture["affine_offset"] = draw_affine_code(
            code_bits, seed
        )
    return TableFreeConfig(**architecture)

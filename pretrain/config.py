"""The recipe: everything that makes a run what it is, as frozen dataclasses read from YAML.

The recipe owns model, data order, tokens, batch, optimizer, schedule, activation checkpointing and intervals.
What belongs to the engine (ZeRO, precision, offload) stays in the DeepSpeed JSON; see pretrain/engine.py.
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

from data_prep.errors import UserError, parse_yaml
from data_prep.shards import MAX_VOCAB_SIZE

if TYPE_CHECKING:
    from pretrain.modeling_tablefree import TableFreeConfig

RECIPES_DIR = Path(__file__).parent / "recipes"
STRICT = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

# What a resumed run may change: none of it alters what a step computes, but for the order of float sums.
MAY_CHANGE_ON_RESUME = frozenset(
    {
        "batch.micro_batch_size",
        "compile",
        "loss_head",
        "data.stage_dir",
        "activation_checkpointing.mode",
        "activation_checkpointing.every_n_layers",
        "validation.every_steps",
        "validation.eval_tokens",
        "checkpoints.every_steps",
        "checkpoints.keep_last",
        "checkpoints.keep_every",
        "bad_steps.policy",  # what was decided before is replayed
        "bad_steps.spike_deviations",
        "bad_steps.max_in_a_row",
        "stalls.after_medians",
        "stalls.after_s",
        "engine",  # the merged DeepSpeed configuration is compared instead
    }
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelRecipe:
    """Architecture of the decoder."""

    vocab_size: int = Field(ge=2, le=MAX_VOCAB_SIZE)
    d_model: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    seq_len: int = Field(ge=1)
    input_embedding: Literal["binary_code", "affine_code", "learned"]
    code_bits: int | None = Field(default=None, ge=1)  # default: ceil(log2 vocab_size)
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
    """Linear warm-up to the peak, then a decay to a fraction of it at the last step; see pretrain/optim.py.

    `cosine` and `linear` decay from the end of the warm-up, `wsd` (warmup-stable-decay) over its last
    `decay_steps`, or `decay_fraction` of all steps; `constant` stays at the peak.
    """

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_fraction: float = Field(default=0.01, ge=0, lt=1)
    warmup_steps: int | None = Field(default=None, ge=0)  # instead of the fraction
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    decay_steps: int | None = Field(default=None, ge=1)  # instead of the fraction
    final_fraction: float = Field(default=0.1, ge=0, le=1)

    def warmup(self, total_steps: int) -> int:
        """Steps of the warm-up."""
        return math.ceil(self.warmup_fraction * total_steps) if self.warmup_steps is None else self.warmup_steps

    def decay(self, total_steps: int) -> int:
        """Steps of the decay of `wsd`."""
        return math.ceil(self.decay_fraction * total_steps) if self.decay_steps is None else self.decay_steps


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataRecipe:
    """How a node gets at the shards."""

    stage_dir: str | None = None  # a local disk of each node, to which the data set is copied once


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ActivationCheckpointingRecipe:
    """Which blocks recompute their activations; see pretrain/activation_checkpointing.py."""

    mode: Literal["none", "selective", "full"] = "none"
    every_n_layers: int = Field(default=1, ge=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ValidationRecipe:
    """How often, and on how many tokens of the validation split, always the same ones."""

    every_steps: int = Field(ge=1)
    eval_tokens: int = Field(default=2_097_152, ge=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointsRecipe:
    """How often to save, and which checkpoints to keep: the newest ones, and those of each multiple of some steps."""

    every_steps: int = Field(ge=1)
    keep_last: int = Field(default=2, ge=1)
    keep_every: int | None = Field(default=None, ge=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BadStepsRecipe:
    """What becomes of a step whose loss or gradient norm is no number, or a spike; see pretrain/bad_steps.py."""

    policy: Literal["skip", "rewind", "stop"] = "skip"
    spike_deviations: float | None = Field(default=None, gt=0)  # above the running median; default: none is a spike
    max_in_a_row: int = Field(default=10, ge=1)  # after so many the run has diverged, and stops


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StallsRecipe:
    """When a run that does nothing has stalled: after so many median steps, but not before so many seconds."""

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
    activation_checkpointing: ActivationCheckpointingRecipe = Field(default_factory=ActivationCheckpointingRecipe)
    validation: ValidationRecipe
    checkpoints: CheckpointsRecipe
    bad_steps: BadStepsRecipe = Field(default_factory=BadStepsRecipe)
    stalls: StallsRecipe = Field(default_factory=StallsRecipe)
    train_tokens: int = Field(ge=1)
    seed: int = Field(default=1, ge=0)
    intra_document_masking: bool = False  # no token sees another document of its window; positions restart
    compile: bool = False  # torch.compile of the blocks
    loss_head: Literal["chunked", "whole", "liger"] = "chunked"  # see pretrain/loss.py
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


def nearest(name: str, known: Sequence[str]) -> str:
    """A suggestion for a misspelt name: `; did you mean x?`, or the list of what there is."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(sorted(known))}"


def dotted_keys(recipe_class: Any, prefix: str = "") -> list[str]:
    """Every key of a recipe, sections and what is in them."""
    keys = []
    for name, section in known_keys(recipe_class).items():
        keys.append(prefix + name)
        keys += dotted_keys(section, f"{prefix}{name}.") if section is not None else []
    return keys


def nearest_key(dotted: str, siblings: Sequence[str]) -> str:
    """A suggestion for a misspelt recipe key: by its last name anywhere, or close to it, or what its section has."""
    keys = dotted_keys(Recipe)
    same_name = [key for key in keys if key.rpartition(".")[2] == dotted.rpartition(".")[2]]
    close = same_name or difflib.get_close_matches(dotted, keys, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(sorted(siblings))}"


def known_keys(recipe_class: Any) -> dict[str, Any]:
    """Field names of a recipe section and, for a nested one, its class."""
    return {f.name: f.type if is_dataclass(f.type) else None for f in fields(recipe_class)}


def check_keys(content: dict[str, Any], recipe_class: Any, origin: str, prefix: str = "") -> None:
    """Raise UserError for the first key that no recipe has, naming the nearest right one."""
    known = known_keys(recipe_class)
    for key, value in content.items():
        if key not in known:
            suggestion = nearest_key(f"{prefix}{key}", [prefix + name for name in known])
            raise UserError(f"{origin}: unknown recipe key {prefix}{key}; {suggestion}")
        if known[key] is not None:
            if not isinstance(value, dict):
                raise UserError(f"{origin}: {prefix}{key}: got {value!r}, expected the keys of a section")
            check_keys(value, known[key], origin, f"{prefix}{key}.")


def recipe_path(name: str) -> Path:
    """The file of a shipped recipe's name, or the path itself."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"--recipe {name}: no such file")
        return path
    shipped = sorted(p.stem for p in RECIPES_DIR.glob("*.yaml"))
    if name not in shipped:
        raise UserError(f"--recipe {name}: no such recipe; {nearest(name, shipped)} (or give a .yaml file)")
    return RECIPES_DIR / f"{name}.yaml"


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set `--dotted.key=value` arguments in the recipe's nested dictionary; values are read as YAML."""
    for argument in overrides:
        dotted, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            raise UserError(f"{argument}: not a known flag; recipe keys are set as --dotted.key=value, with the sign =")
        if not equals:
            raise UserError(f"{argument}: not a known flag; to set a recipe key write {argument}=VALUE")
        *sections, key = dotted.split(".")
        target = content
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise UserError(f"{argument}: {section} is a value, not a section of the recipe")
        try:
            target[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{argument}: the value is not valid YAML: {error}") from None


def as_numbers(content: dict[str, Any], recipe_class: Any) -> dict[str, Any]:
    """Read the numbers that YAML takes for text or another kind: a float `6e-4` or `1`, an int `17e9` or `2.0`."""
    types = {f.name: f.type for f in fields(recipe_class)}
    result = {}
    for key, value in content.items():
        if is_dataclass(types[key]):
            value = as_numbers(value, types[key])
        elif types[key] in (int, float) and isinstance(value, str | int | float) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:  # a whole number of hundreds of digits
                number = math.inf
            except ValueError:
                number = None
            if number is not None:
                exact = types[key] is int and number.is_integer()
                value = (value if isinstance(value, int) else int(number)) if exact else number
        result[key] = value
    return result


def build_recipe(content: Any, origin: str) -> Recipe:
    """Check a nested dictionary and make it a Recipe. Raises UserError for the first thing that is wrong."""
    if not isinstance(content, dict):
        raise UserError(f"{origin}: not a recipe: expected keys and values in YAML")
    check_keys(content, Recipe, origin)
    try:
        recipe = pydantic.TypeAdapter(Recipe).validate_json(json.dumps(as_numbers(content, Recipe)))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        dotted = ".".join(map(str, first["loc"]))
        if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
            raise UserError(f"{origin}: {dotted} is missing") from None
        raise UserError(f"{origin}: {dotted}: got {first['input']!r}; {first['msg']}") from None
    except (TypeError, ValueError) as error:  # a date or another YAML value that no recipe holds
        raise UserError(f"{origin}: {error}") from None
    check_recipe(recipe, origin)
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
        near = nearest_multiples(recipe.batch.global_batch_tokens, model.seq_len)
        raise UserError(
            f"{origin}: batch.global_batch_tokens {recipe.batch.global_batch_tokens} is not a whole number of "
            f"windows of model.seq_len {model.seq_len}; the nearest are {near}"
        )


def check_schedule(recipe: Recipe, origin: str) -> None:
    """Warm-up and decay must fit into the run."""
    schedule, total = recipe.schedule, recipe.total_steps
    if schedule.kind != "wsd" and schedule.decay_steps is not None:
        raise UserError(f"{origin}: schedule.decay_steps belongs to schedule.kind wsd, not {schedule.kind}")
    warmup = schedule.warmup(total)
    decay = schedule.decay(total) if schedule.kind == "wsd" else 0
    if warmup + decay > total:
        raise UserError(
            f"{origin}: schedule: {warmup:,} steps of warm-up{f' and {decay:,} of decay' if decay else ''} are longer "
            f"than the run of {total:,} steps; make them shorter or train_tokens larger"
        )


def fewest_bits(vocab_size: int) -> int:
    """K = ceil(log2 V): what tells V ids apart."""
    return max(1, (vocab_size - 1).bit_length())


def check_code_bits(model: ModelRecipe, origin: str) -> None:
    """The code must tell all ids apart and tile the model width."""
    needed = fewest_bits(model.vocab_size)
    bits = model.code_bits or needed
    if bits < needed:
        raise UserError(
            f"{origin}: model.code_bits {bits} cannot tell {model.vocab_size:,} ids apart; set it to {needed} or more"
        )
    if bits > 62:
        raise UserError(f"{origin}: model.code_bits {bits}: expected at most 62")
    if model.d_model % bits:
        fitting = next((k for k in range(bits, 63) if model.d_model % k == 0), None)
        advice = f"set model.code_bits to {fitting}, the next that does" if fitting else "change model.d_model"
        raise UserError(f"{origin}: model.code_bits {bits} does not divide model.d_model {model.d_model}; {advice}")


def nearest_multiples(value: int, of: int) -> str:
    """The multiples of a number around a value, as words: `96 and 104`."""
    below = value // of * of
    return f"{below} and {below + of}" if below else f"{of}"


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name or a file by path, with `--dotted.key=value` overrides."""
    path = recipe_path(name)
    content = parse_yaml(path.read_bytes(), str(path))
    if isinstance(content, dict):
        apply_overrides(content, overrides)
    return build_recipe(content, str(path))


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
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def refuse_changes(saved: dict[str, Any], now: dict[str, Any], may_change: frozenset[str], origin: str) -> None:
    """Raise UserError for the first dotted key whose value differs, unless it may change on resume."""
    old, new = flatten(saved), flatten(now)
    for key in [*old, *(k for k in new if k not in old)]:
        if old.get(key) != new.get(key) and key not in may_change:
            raise UserError(
                f"{origin}: this run was started with {key}={old.get(key)!r}, got {new.get(key)!r}; "
                f"give the old value to continue it, or another --run-dir to start a new run"
            )


def model_config(model: ModelRecipe) -> "TableFreeConfig":
    """The architecture as the modelling file wants it, the affine code drawn."""
    from pretrain.modeling_tablefree import TableFreeConfig, draw_affine_code  # torch takes seconds to import

    rows = offset = None
    code_bits = model.code_bits or fewest_bits(model.vocab_size)
    if model.input_embedding == "affine_code":
        rows, offset = draw_affine_code(code_bits, model.code_seed)
    return TableFreeConfig(
        vocab_size=model.vocab_size,
        d_model=model.d_model,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        seq_len=model.seq_len,
        input_embedding=model.input_embedding,
        code_bits=code_bits,
        affine_rows=rows,
        affine_offset=offset,
    )

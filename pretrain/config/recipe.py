"""The recipe: everything that makes a run what it is, as frozen dataclasses read from YAML.

The recipe owns model, data order, tokens, batch, optimizer, schedule, activation checkpointing and
intervals. What belongs to the engine (ZeRO, precision, offload) stays in the DeepSpeed JSON; see
pretrain/config/deepspeed.py.
"""

import math
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from data_prep.errors import nearest
from data_prep.manifest import MAX_VOCAB_SIZE

MAX_CODE_BITS = 62
SINKS = ("tensorboard", "trackio", "wandb")  # pretrain/metrics/sinks.py has a row for each
STRICT = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelRecipe:
    """Architecture of the decoder."""

    vocab_size: int = Field(ge=2, le=MAX_VOCAB_SIZE)  # in a file also `auto`; see load_recipe
    d_model: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    seq_len: int = Field(ge=1)
    input_embedding: Literal["binary_code", "affine_code", "permuted_code", "learned"]
    # By default as few as tell all ids apart: ceil(log2 vocab_size).
    code_bits: int | None = Field(default=None, ge=1, le=MAX_CODE_BITS)
    code_seed: int = 0  # draws A and b of an affine code, the keys of a permuted one


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
    """Linear warm-up to the peak, then a decay to a fraction of it at the last step.

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
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil(self.warmup_fraction * total_steps)

    def decay(self, total_steps: int) -> int:
        """Steps of the decay of `wsd`."""
        if self.decay_steps is not None:
            return self.decay_steps
        return math.ceil(self.decay_fraction * total_steps)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataRecipe:
    """How a node gets at the shards."""

    stage_dir: str | None = None  # a local disk of each node, to which the data set is copied once
    # The shards' digests, before a start's first step: once a node, at every start, or not at all.
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
    """How often to save, and which checkpoints to keep."""

    every_steps: int = Field(ge=1)
    keep_last: int = Field(default=2, ge=1)  # the newest ones
    keep_every: int | None = Field(default=None, ge=1)  # those of each multiple of so many steps
    # Exports of these checkpoints, in RUN_DIR/exports; see pretrain/run/exports/exporter.py.
    export_every_steps: int | None = Field(default=None, ge=1)  # a multiple of every_steps
    export_architecture: Literal["tablefree", "gpt_neox"] = "tablefree"
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    export_keep_last: int = Field(default=2, ge=1)  # the newest, and those of keep_every


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BadStepsRecipe:
    """What becomes of a step whose loss or gradient norm is no number, or a spike.

    See pretrain/run/bad_steps.py.
    """

    policy: Literal["skip", "rewind", "stop"] = "skip"
    # A spike lies so far above the running median. By default none is a spike.
    spike_deviations: float | None = Field(default=None, gt=0)
    max_in_a_row: int = Field(default=10, ge=1)  # after so many the run has diverged, and stops


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StallsRecipe:
    """When a run that does nothing has stalled: after both."""

    after_medians: float = Field(default=30.0, ge=1)  # of the seconds of its steps
    after_s: float = Field(default=300.0, gt=0)


def known_sinks(value: Any) -> Any:
    """Names of sinks, each once; also one name alone, as a command line gives it.

    Raises ValueError for an unknown one, or another type.
    """
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if not isinstance(value, list | tuple):
        raise ValueError(f"got {value!r}; give a list of sinks: {', '.join(SINKS)}")
    for name in value:
        if name not in SINKS:
            raise ValueError(f"unknown sink {name!r}; {nearest(str(name), SINKS)}")
    return tuple(dict.fromkeys(value))


def list_of_texts(value: Any) -> Any:
    """Texts as a list; also one alone, as a command line gives it. Raises ValueError for others."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"got {value!r}; give a list of texts, in quotes")
    return tuple(value)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogRecipe:
    """What a run says of itself while it trains, beside metrics.jsonl."""

    # Who draws it: see pretrain/metrics/sinks.py.
    sinks: Annotated[tuple[str, ...], BeforeValidator(known_sinks)] = ()
    # Between two lines of the log, which stand for the block where stderr is no terminal.
    every_s: float = Field(default=15.0, gt=0)
    every_steps: int | None = Field(default=None, ge=1)  # instead of the time
    # Continued greedily at each validation; see pretrain/generation/samples.py.
    prompts: Annotated[tuple[str, ...], BeforeValidator(list_of_texts)] = ()
    sample_tokens: int = Field(default=64, ge=1)  # of a continuation, at most


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
    log: LogRecipe = Field(default_factory=LogRecipe)
    train_tokens: int = Field(ge=1)
    seed: int = Field(default=1, ge=0)
    # No token sees another document of its window; positions restart.
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

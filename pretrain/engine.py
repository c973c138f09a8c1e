"""The DeepSpeed engine: the only module that imports deepspeed, and all that touches its internals.

The DeepSpeed JSON holds engine knobs (ZeRO, precision, communication); this module adds what the recipe owns
(batch sizes, clipping) and refuses a JSON that repeats it, so that every value has one home.
"""

import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.errors import UserError
from data_prep.shards import Tokens
from pretrain.checkpoint import Checkpoint, Fragment
from pretrain.config import Recipe, nearest
from pretrain.distributed import World, gather, set_rendezvous
from pretrain.loss import LanguageModelLoss
from pretrain.modeling_tablefree import TableFreeForCausalLM
from pretrain.optim import build_optimizer

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said, not guessed: DeepSpeed warns when it has to guess
import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

DS_CONFIGS_DIR = Path(__file__).parent.parent / "ds_configs"
OWNED_BY_RECIPE = {
    "train_batch_size": "batch.global_batch_tokens",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.global_batch_tokens and batch.micro_batch_size",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "activation_checkpointing": "activation_checkpointing",
}
# Keys of the merged configuration that may differ when a run is resumed: they don't change what a step computes.
MAY_CHANGE_ON_RESUME = frozenset(
    {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print"}
)
# What may stand in the JSON: DeepSpeed ignores a key it doesn't know, so a misspelt one would do nothing.
KNOWN_KEYS = frozenset(
    {
        "zero_optimization",
        "bf16",
        "fp16",
        "data_types",
        "communication_data_type",
        "zero_allow_untested_optimizer",
        "prescale_gradients",
        "gradient_predivide_factor",
        "dump_state",
        "memory_breakdown",
        "wall_clock_breakdown",
        "steps_per_print",
        "flops_profiler",
        "comms_logger",
        "csv_monitor",
        "tensorboard",
        "wandb",
    }
)
STATES = ("master", "exp_avg", "exp_avg_sq")


def engine_config_path(name: str) -> Path:
    """A file of ds_configs/ by name, or the path itself."""
    path = Path(name)
    if path.suffix == ".json":
        if not path.is_file():
            raise UserError(f"--deepspeed-config {name}: no such file")
        return path
    shipped = sorted(p.stem for p in DS_CONFIGS_DIR.glob("*.json"))
    if name not in shipped:
        raise UserError(f"engine {name}: no such DeepSpeed configuration; {nearest(name, shipped)} (or give a file)")
    return DS_CONFIGS_DIR / f"{name}.json"


def load_engine_config(name: str) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON. Raises UserError for what this pipeline can't honour."""
    path = engine_config_path(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object of DeepSpeed keys")
    for key, home in OWNED_BY_RECIPE.items():
        if key in config:
            raise UserError(f"{path}: {key} belongs to the recipe ({home}); remove it here")
    if '"auto"' in json.dumps(config):
        raise UserError(f'{path}: holds an "auto" value; write the value you want, or leave the key out')
    for key in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f"{path}: {key} is {config[key]!r}, expected a JSON object")
    for key in config:
        if key not in KNOWN_KEYS:
            raise UserError(f"{path}: unknown key {key}; {nearest(key, sorted(KNOWN_KEYS))}")
    zero_keys = sorted(DeepSpeedZeroConfig.model_fields)
    for key in config.get("zero_optimization", {}):
        if key not in zero_keys:
            raise UserError(f"{path}: unknown key zero_optimization.{key}; {nearest(key, zero_keys)}")
    if "enabled" not in config.get("bf16", {"enabled": False}):
        raise UserError(f'{path}: bf16 has no key enabled; write "bf16": {{"enabled": true}}')
    if "offload_optimizer" in config.get("zero_optimization", {}):
        raise UserError(f"{path}: zero_optimization.offload_optimizer is not supported; remove it")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage != 2:
        raise UserError(f"{path}: zero_optimization.stage is {stage}, expected 2")
    if config.get("fp16", {}).get("enabled"):
        raise UserError(f"{path}: fp16 is not supported; use bf16, or neither for fp32")
    return config


def accumulation_steps(recipe: Recipe, world_size: int) -> int:
    """Micro-batches that each rank takes in a step. Raises UserError unless the batch divides evenly."""
    batch, at_once = recipe.global_batch_size, world_size * recipe.batch.micro_batch_size
    if batch % at_once == 0:
        return batch // at_once
    below = batch // at_once * at_once
    nearest_tokens = " or ".join(f"{n * recipe.model.seq_len}" for n in (below, below + at_once) if n)
    fitting = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= recipe.batch.micro_batch_size)
    fitting_ranks = [n for n in range(1, world_size + 1) if batch % (n * recipe.batch.micro_batch_size) == 0]
    ways = [f"batch.global_batch_tokens {nearest_tokens}"]
    per_rank = [n for n in range(fitting, 0, -1) if batch % (world_size * n) == 0]
    if per_rank:
        ways.append(f"batch.micro_batch_size {per_rank[0]}")
    if fitting_ranks:
        ways.append(f"{fitting_ranks[-1]} rank{'s' if fitting_ranks[-1] > 1 else ''}")
    raise UserError(
        f"a step of {batch} windows does not divide over {world_size} ranks x micro-batch "
        f"{recipe.batch.micro_batch_size}; nearest that do: {', or '.join(ways)}"
    )


def merge_config(recipe: Recipe, engine_config: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The one dictionary that DeepSpeed gets. Gradients add up and travel in fp32 unless the JSON says otherwise."""
    return {
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        **engine_config,
        "train_batch_size": recipe.global_batch_size,
        "train_micro_batch_size_per_gpu": recipe.batch.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(recipe, world_size),
        "gradient_clipping": recipe.optimizer.gradient_clipping,
        "steps_per_print": 2**31,  # this pipeline reports its own figures
    }


def start_process_group(world: World) -> torch.device:
    """Join the other ranks; returns this rank's device."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of DeepSpeed's calls
    # DeepSpeed would compile this CPU extension for a minute, and hang on the lock of a killed build.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    set_rendezvous(world)
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(world.local_rank)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return torch.device(accelerator.current_device_name())


class Engine:
    """A model under ZeRO-2: takes token ids, trains, and gives and takes its state as fragments."""

    def __init__(
        self, model: TableFreeForCausalLM, recipe: Recipe, config: dict[str, Any], world: World, device: torch.device
    ) -> None:
        self.recipe = recipe
        self.world = world
        self.device = device
        self.accumulation_steps = int(config["gradient_accumulation_steps"])
        module = LanguageModelLoss(model)
        optimizer = build_optimizer(module.to(device), recipe.optimizer)
        try:
            self.deepspeed, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config, dist_init_required=False
            )
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"the DeepSpeed configuration: {where}: got {first['input']!r}; {first['msg']}") from None

    def rows_of(self, micro_step: int) -> slice:
        """Which rows of the global batch this rank takes in a micro-step."""
        size = self.recipe.batch.micro_batch_size
        start = (micro_step * self.world.world_size + self.world.rank) * size
        return slice(start, start + size)

    def to_device(self, ids: Tokens) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64. All ids up to 65,535 are ordinary: uint16 widens before torch sees it."""
        wide_BT = torch.from_numpy(ids.astype("int64")).to(self.device)
        return wide_BT[:, :-1], wide_BT[:, 1:]

    def train_step(self, micro_batches: list[Tokens], learning_rate: float) -> tuple[float, float]:
        """One optimizer step over this rank's micro-batches; global mean loss in nats and gradient norm."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.train()
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        for ids in micro_batches:
            micro_loss = self.deepspeed(*self.to_device(ids))
            self.deepspeed.backward(micro_loss)
            self.deepspeed.step()
            loss += micro_loss.detach()
        dist.all_reduce(loss)
        batches = self.accumulation_steps * self.world.world_size
        return loss.item() / batches, float(self.deepspeed.get_global_grad_norm())

    def mean_nats(self, batches: Iterator[Tokens]) -> float:
        """Mean cross-entropy over the targets of all ranks' batches, in nats."""
        self.deepspeed.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for ids in batches:
            inputs, targets = self.to_device(ids)
            sums[0] += self.deepspeed.module.nats(inputs, targets).sum(dtype=torch.float64)
            sums[1] += targets.numel()
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def parameter_shapes(self) -> dict[str, list[int]]:
        """Every trained parameter's name, as in the model, and shape."""
        return {name: list(parameter.shape) for name, parameter in self.deepspeed.module.model.named_parameters()}

    # What follows reads and writes DeepSpeed's internals. Under ZeRO-1/2 each parameter's `_hp_mapping` says which
    # part of it this rank owns, and where that lies in the rank's flat fp32 partition of the parameter's group.

    def _owned(self) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
        """Name, first element and fp32 views of the part of each parameter that this rank owns."""
        zero = self.deepspeed.optimizer
        for name, parameter in self.deepspeed.module.model.named_parameters():
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
            state = {"master": flat, **zero.optimizer.state[flat]}
            place = mapping.hp_fragment_address
            views = {key: state[key].detach().narrow(0, place.start, place.numel) for key in STATES}
            yield name, mapping.lp_fragment_address.start, views

    def read_state(self) -> tuple[list[Fragment], int]:
        """This rank's fragments of masters and moments, and the number of optimizer steps taken."""
        zero = self.deepspeed.optimizer
        zero._lazy_init_hp_params_optimizer_state()
        fragments = [Fragment(name=name, start=start, states=views) for name, start, views in self._owned()]
        steps = {int(state["step"]) for state in zero.optimizer.state.values()}
        assert len(steps) == 1, f"parameter groups took different numbers of steps: {steps}"
        return fragments, steps.pop()

    def write_state(self, checkpoint: Checkpoint) -> None:
        """Fill this rank's fragments from a checkpoint saved at any world size."""
        zero = self.deepspeed.optimizer
        for flat in zero.single_partition_of_fp32_groups:
            zero.optimizer.state[flat] = {
                "step": torch.tensor(float(checkpoint.optimizer_step), device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        for name, start, views in self._owned():
            for state, view in views.items():
                view.copy_(checkpoint.read(name, state, start, view.numel()))
        zero.update_lp_params()

    def close(self) -> None:
        """Leave the process group."""
        gather(None)
        dist.destroy_process_group()

"""The DeepSpeed engine: the only module that imports deepspeed, and all that touches its internals.

What it is configured with comes from pretrain/engine_config.py.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pydantic
import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.errors import UserError
from data_prep.shards import Tokens
from pretrain.checkpoint import Checkpoint, Fragment
from pretrain.config import Recipe
from pretrain.distributed import World, gather, set_rendezvous
from pretrain.loss import LanguageModelLoss
from pretrain.modeling_tablefree import TableFreeForCausalLM
from pretrain.optim import build_optimizer

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said, not guessed: DeepSpeed warns when it has to guess
import deepspeed
from deepspeed.accelerator import get_accelerator

STATES = ("master", "exp_avg", "exp_avg_sq")


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
